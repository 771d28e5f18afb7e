"""`beam`, `beam-sampling` and `diverse-beam`: what each honours, and how it picks candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pluglm_decoding_blocks.failures import refused
from pluglm_decoding_blocks.processors import Processors
from pluglm_decoding_blocks.prompt import Prompt, read_prompt
from pluglm_decoding_blocks.rng import call_seeds
from pluglm_decoding_blocks.settings import COMMON_FIELDS, Settings, read_settings
from torch import Tensor

from pluglm.contracts import DecodingRequest, GenerationConfig, LogitsProcessor, StoppingCriterion, Streamer
from pluglm_decoding_beam import picking
from pluglm_decoding_beam.beam_feed import NEEDS, BeamFeed
from pluglm_decoding_beam.beam_settings import BEAM_FIELDS, GROUP_FIELDS, read_beam_settings
from pluglm_decoding_beam.ends import Ends
from pluglm_decoding_beam.picking import BeamWarpers, Drawn, Pick
from pluglm_decoding_beam.search import BeamOutput, Job, run


class BeamSearch:
    """The most likely completions that a search of `num_beams` hypotheses finds.

    A seed changes nothing and is accepted. A streamer is told everything at the end: until then no token is certain.
    """

    name = "beam"
    fields: frozenset[str] = COMMON_FIELDS | BEAM_FIELDS
    needs: frozenset[str] = NEEDS

    def __init__(self, request: DecodingRequest) -> None:
        self._request = request

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriterion] | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Streamer | None = None,
        **model_kwargs: Any,
    ) -> BeamOutput:
        """Generate, without gradients. See `DecodingStrategy`; `model_kwargs` may hold attention_mask, past_key_values,
        use_cache and position_ids. Processors get one row a beam, [B * num_beams, S], and log-probabilities; criteria
        get one row a candidate, and None for scores."""
        config = generation_config or GenerationConfig()
        try:
            with torch.no_grad():
                output = self._run(
                    model, input_ids, logits_processor, tuple(stopping_criteria or ()), config, model_kwargs
                )
                if streamer is not None:
                    for tokens in output.sequences[:, output.prompt_length :].T:
                        streamer.put(tokens)
                return output
        finally:
            if streamer is not None:
                streamer.end()

    def _run(
        self, model: Any, input_ids: Tensor, processors: Sequence[LogitsProcessor] | None,
        criteria: Sequence[StoppingCriterion], config: GenerationConfig, model_kwargs: dict[str, Any],
    ) -> BeamOutput:  # fmt: skip
        request, grouped = self._request, self.fields >= GROUP_FIELDS
        settings = read_settings(config, self.name, self.fields, vocab_size=request.vocab_size, decode=request.decode)
        beams = read_beam_settings(config, grouped=grouped)
        prompt = read_prompt(
            input_ids, model_kwargs.pop("attention_mask", None), bos=settings.bos, vocab_size=request.vocab_size
        )
        warp, pick = self._picking(config, settings, prompt)
        limits = settings.limits(prompt.lengths)
        rows = prompt.repeated(beams.beams)
        process = Processors(
            config, processors, prompt_length=prompt.width, mask=rows.mask, device=prompt.ids.device, incremental=False
        )
        feed = BeamFeed(model, prompt, settings, beams.beams, prompt.width + max(limits), model_kwargs)
        job = Job(settings, beams, prompt, limits, feed, process, warp, pick, Ends(settings, criteria, request.decode))
        try:
            return run(job)
        except BaseException:
            feed.take_back()
            raise

    def _picking(
        self, config: GenerationConfig, settings: Settings, prompt: Prompt
    ) -> tuple[Callable[[Tensor], Tensor], Pick]:
        """How processed scores are reshaped, and how candidates are picked by their totals."""
        return _as_they_are, picking.best


class BeamSampling(BeamSearch):
    """Candidates are drawn without replacement, by their totals; the best of what was drawn goes on.

    A seed belongs to a prompt, and all its sequences come out of one search.
    """

    name = "beam-sampling"
    fields = COMMON_FIELDS | BEAM_FIELDS | {"temperature", "top_k", "top_p", "min_p"}

    def _picking(
        self, config: GenerationConfig, settings: Settings, prompt: Prompt
    ) -> tuple[Callable[[Tensor], Tensor], Pick]:
        device = prompt.ids.device
        keep = 1 + max(1, len(settings.eos))
        return BeamWarpers(config, keep, device), Drawn(call_seeds(config.seed, prompt.ids.shape[0], device))


class DiverseBeamSearch(BeamSearch):
    """Groups of beams, one after the other at each token; a token costs more for each earlier beam that has taken it.

    Source: Vijayakumar et al. 2018, "Diverse Beam Search", algorithm 1, with Hamming diversity (section 5).
    """

    name = "diverse-beam"
    fields = COMMON_FIELDS | BEAM_FIELDS | GROUP_FIELDS


def _as_they_are(scores: Tensor) -> Tensor:
    return scores


_STRATEGIES: dict[str, Callable[[DecodingRequest], BeamSearch]] = {
    strategy.name: strategy for strategy in (BeamSearch, BeamSampling, DiverseBeamSearch)
}


def build(name: str, request: DecodingRequest) -> BeamSearch:
    """The strategy of this name. Raises UnsupportedRequestError for a variant or option: there are none."""
    reasons = [f"option {option!r} is not known" for option, _ in request.options]
    if request.variant is not None:
        reasons.insert(0, f"variant {request.variant!r} is not known")
    if reasons:
        raise refused(name, reasons, f'Write decoding="{name}"; settings are arguments of the call.')
    return _STRATEGIES[name](request)
