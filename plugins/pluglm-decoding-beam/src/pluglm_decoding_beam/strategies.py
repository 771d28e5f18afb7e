"""`beam`, `beam-sampling`, `diverse-beam` and `constrained-beam`: what each honours, and how it picks candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pluglm_decoding_blocks.criteria import call_criteria
from pluglm_decoding_blocks.failures import refused
from pluglm_decoding_blocks.processors import Processors
from pluglm_decoding_blocks.prompt import Prompt, read_prompt
from pluglm_decoding_blocks.rng import call_seeds
from pluglm_decoding_blocks.settings import (
    COMMON_FIELDS,
    OUTPUT_FIELDS,
    SAMPLING_FIELDS,
    Settings,
    read_settings,
)
from pluglm_decoding_blocks.source import encoder_source
from pluglm_decoding_blocks.warpers import Warpers
from torch import Tensor

from pluglm.contracts import (
    DecodingRequest,
    GenerationConfig,
    GenerationOutput,
    LogitsProcessor,
    StoppingCriterion,
    Streamer,
)
from pluglm_decoding_beam import picking
from pluglm_decoding_beam.beam_feed import NEEDS, BeamFeed
from pluglm_decoding_beam.beam_settings import BEAM_FIELDS, GROUP_FIELDS, read_beam_settings
from pluglm_decoding_beam.certain import Announcer
from pluglm_decoding_beam.ends import Ends
from pluglm_decoding_beam.guide import Guide
from pluglm_decoding_beam.phrases import PHRASE_FIELDS, read_phrases
from pluglm_decoding_beam.picking import Drawn, Pick
from pluglm_decoding_beam.search import run
from pluglm_decoding_beam.step import Job
from pluglm_decoding_beam.tracker import Tracker

_FIELDS = COMMON_FIELDS | BEAM_FIELDS | OUTPUT_FIELDS


class BeamSearch:
    """The most likely completions that a search of `num_beams` hypotheses finds.

    A seed changes nothing and is accepted. A streamer is told of each prompt's best sequence, as soon as it is certain.
    """

    name = "beam"
    fields: frozenset[str] = _FIELDS
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
    ) -> GenerationOutput:
        """Generate, without gradients. See `DecodingStrategy`; `model_kwargs` may hold attention_mask, past_key_values,
        use_cache and position_ids. Processors get one row a beam, [B * num_beams, S], and log-probabilities; criteria
        get one row a candidate, and None for scores."""
        config = generation_config or GenerationConfig()
        try:
            with torch.no_grad():
                return self._run(
                    model, input_ids, logits_processor, tuple(stopping_criteria or ()), config, streamer, model_kwargs
                )
        finally:
            if streamer is not None:
                streamer.end()

    def _run(
        self, model: Any, input_ids: Tensor, processors: Sequence[LogitsProcessor] | None,
        criteria: Sequence[StoppingCriterion], config: GenerationConfig, streamer: Streamer | None,
        model_kwargs: dict[str, Any],
    ) -> GenerationOutput:  # fmt: skip
        request, grouped = self._request, self.fields >= GROUP_FIELDS
        settings = read_settings(config, self.name, self.fields, vocab_size=request.vocab_size, decode=request.decode)
        beams = read_beam_settings(config, grouped=grouped)
        prompt = read_prompt(
            input_ids, model_kwargs.pop("attention_mask", None), bos=settings.bos, vocab_size=request.vocab_size
        )
        warpers, pick = self._picking(config, settings, prompt)
        limits = settings.limits(prompt.lengths)
        guide = self._guide(config, settings, limits, prompt.ids.device)
        rows = prompt.repeated(beams.beams)
        process = Processors(
            config, processors, prompt_length=prompt.width, mask=rows.mask, device=prompt.ids.device, incremental=False,
            beams=beams.beams, source=encoder_source(model), warpers=warpers,
        )  # fmt: skip
        if settings.hidden_states:
            model_kwargs["output_hidden_states"] = True
        feed = BeamFeed(model, prompt, settings, beams.beams, prompt.width + max(limits), model_kwargs)
        ends = Ends(settings, call_criteria(config, criteria), request.decode)
        told = Announcer(streamer, len(limits), prompt.ids.device) if streamer is not None else None
        select = picking.first
        if guide is not None:
            pick, select = guide.pick, guide.select
        job = Job(settings, beams, prompt, limits, feed, process, pick, select, guide, ends, told)
        try:
            return run(job)
        except BaseException:
            feed.take_back()
            raise

    def _picking(self, config: GenerationConfig, settings: Settings, prompt: Prompt) -> tuple[Warpers | None, Pick]:
        """What reshapes scores after the processors, and how candidates are picked by their totals."""
        return None, picking.best

    def _guide(
        self, config: GenerationConfig, settings: Settings, limits: Sequence[int], device: torch.device
    ) -> Guide | None:
        """What keeps to phrases that must occur."""
        return None


class BeamSampling(BeamSearch):
    """Candidates are drawn without replacement, by their totals; the best of what was drawn goes on.

    A seed belongs to a prompt, and all its sequences come out of one search.
    """

    name = "beam-sampling"
    fields = _FIELDS | SAMPLING_FIELDS

    def _picking(self, config: GenerationConfig, settings: Settings, prompt: Prompt) -> tuple[Warpers | None, Pick]:
        device = prompt.ids.device
        # One more than there are end tokens, as in transformers 5.23, so that a beam can go on.
        warpers = Warpers([config], device, keep=1 + max(1, len(settings.eos)))
        return warpers, Drawn(call_seeds(config.seed, prompt.ids.shape[0], device))


class DiverseBeamSearch(BeamSearch):
    """Groups of beams, one after the other at each token; a token costs more for each earlier beam that has taken it.

    Source: Vijayakumar et al. 2018, "Diverse Beam Search", algorithm 1, with Hamming diversity (section 5).
    """

    name = "diverse-beam"
    fields = _FIELDS | GROUP_FIELDS


class ConstrainedBeamSearch(BeamSearch):
    """Beam search whose hypotheses end only when they hold every phrase that was asked for; see `Guide`.

    Without a phrase it is `beam`.
    """

    name = "constrained-beam"
    fields = _FIELDS | PHRASE_FIELDS

    def _guide(
        self, config: GenerationConfig, settings: Settings, limits: Sequence[int], device: torch.device
    ) -> Guide | None:
        constraints = read_phrases(config, vocab_size=self._request.vocab_size, eos=settings.eos)
        return Guide(Tracker(constraints), settings.eos, limits, device) if constraints else None


_STRATEGIES: dict[str, Callable[[DecodingRequest], BeamSearch]] = {
    strategy.name: strategy for strategy in (BeamSearch, BeamSampling, DiverseBeamSearch, ConstrainedBeamSearch)
}


def build(name: str, request: DecodingRequest) -> BeamSearch:
    """The strategy of this name. Raises UnsupportedRequestError for a variant or option: there are none."""
    reasons = [f"option {option!r} is not known" for option, _ in request.options]
    if request.variant is not None:
        reasons.insert(0, f"variant {request.variant!r} is not known")
    if reasons:
        raise refused(name, reasons, f'Write decoding="{name}"; settings are arguments of the call.')
    return _STRATEGIES[name](request)
