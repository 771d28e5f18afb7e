"""How a speculative call is read and run, whatever guesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pluglm_decoding_blocks.criteria import call_criteria
from pluglm_decoding_blocks.failures import refused
from pluglm_decoding_blocks.processors import Processors
from pluglm_decoding_blocks.prompt import Prompt, read_prompt
from pluglm_decoding_blocks.rng import call_seeds
from pluglm_decoding_blocks.settings import COMMON_FIELDS, SAMPLING_FIELDS, read_settings
from pluglm_decoding_blocks.source import Source, encoder_source
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
from pluglm_decoding_speculative.choosing import Chooser, Greedy, Sampled
from pluglm_decoding_speculative.loop import Job, Shape, Statistics, Texts, run
from pluglm_decoding_speculative.passes import Passes
from pluglm_decoding_speculative.proposals import Proposer
from pluglm_decoding_speculative.room import make_feed


@dataclass(frozen=True)
class Plan:
    """What one strategy does of its own in one call.

    Attributes:
        proposer: makes what guesses, once the prompt's cache is there. sampled: how tokens are drawn.
    """

    proposer: Callable[[Job], Proposer]
    sampled: type[Sampled] = Sampled


class Speculative:
    """What the strategies share. Greedy, unless a field that reshapes the distribution is set: then tokens are drawn.

    Attributes:
        statistics: of the last call that ended; for measurements.
    """

    name: str
    fields: frozenset[str] = COMMON_FIELDS | SAMPLING_FIELDS
    needs: frozenset[str] = frozenset({"rollback"})

    def __init__(self, request: DecodingRequest) -> None:
        self._request = request
        self.statistics = Statistics(0, 0, 0)

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
        """Generate, without gradients. See `DecodingStrategy`; `model_kwargs` may hold attention_mask, past_key_values
        and position_ids. A processor must depend on its arguments alone: it is asked about guesses, too."""
        config = generation_config or GenerationConfig()
        try:
            with torch.no_grad():
                criteria = call_criteria(config, stopping_criteria)
                settings = read_settings(
                    config, self.name, self.fields, vocab_size=self._request.vocab_size, decode=self._request.decode
                )
                plan = self.read(config, model)
                prompt = read_prompt(
                    input_ids, model_kwargs.pop("attention_mask", None), bos=settings.bos,
                    vocab_size=self._request.vocab_size,
                )  # fmt: skip
                copies = prompt.repeated(settings.copies)
                limits = settings.limits(copies.lengths)
                choose = self._chooser(config, copies, plan.sampled)
                feed = make_feed(model, prompt, settings, limits, model_kwargs, self.name, choose)
                process, shape = _processing(config, logits_processor, copies, choose, encoder_source(model))
                seen = not process.idle or bool(criteria)
                texts = Texts(copies, max(limits), settings.pad, wanted=seen)
                passes = Passes(model, feed.cache, copies.ids.device)
                job = Job(
                    settings, copies, limits, feed, passes, process, shape, choose, criteria, streamer,
                    self._request.decode, texts,
                )  # fmt: skip
                output, self.statistics = run(job, plan.proposer(job))
                return output
        finally:
            if streamer is not None:
                streamer.end()

    def read(self, config: GenerationConfig, model: Any) -> Plan:
        """Check the fields that only this strategy has, and the model that is to run."""
        raise NotImplementedError

    def _chooser(self, config: GenerationConfig, prompt: Prompt, sampled: type[Sampled]) -> Chooser:
        """prompt: copies included."""
        if SAMPLING_FIELDS & config.set_fields().keys():
            return sampled(config, call_seeds(config.seed, len(prompt.lengths), prompt.ids.device))
        if (config.num_return_sequences or 1) > 1:
            reason = f"num_return_sequences={config.num_return_sequences}: all of them would be the same"
            raise refused(self.name, (reason,), "Set temperature (1.0 changes nothing), or ask for one sequence.")
        return Greedy()


def _processing(
    config: GenerationConfig, own: Sequence[LogitsProcessor] | None, prompt: Prompt, choose: Chooser,
    source: Source | None,
) -> tuple[Processors, Shape]:  # fmt: skip
    """The processors of a call, and what shapes their scores.

    Warpers stand among the processors in an order that matters. Where there are no processors, they alone need neither
    the text nor the rows that are not asked about: then they are no processors but the shape.
    """

    def processors(warpers: Warpers | None) -> Processors:
        return Processors(
            config, own, prompt_length=prompt.width, mask=prompt.mask, device=prompt.ids.device, incremental=False,
            source=source, warpers=warpers,
        )  # fmt: skip

    process = processors(None)
    if process.idle and choose.warpers is not None:
        return process, choose.warpers
    return processors(choose.warpers), _as_they_are


def _as_they_are(scores: Tensor) -> Tensor:
    return scores
