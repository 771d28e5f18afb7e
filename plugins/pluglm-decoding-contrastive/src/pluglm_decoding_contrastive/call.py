"""One call of either strategy: read and checked, then run by the loop of one token a row and pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pluglm_decoding_blocks.criteria import call_criteria
from pluglm_decoding_blocks.failures import refused
from pluglm_decoding_blocks.feed import Feed
from pluglm_decoding_blocks.loop import Choose, Job, run
from pluglm_decoding_blocks.processors import Processors
from pluglm_decoding_blocks.prompt import Prompt, read_prompt
from pluglm_decoding_blocks.settings import COMMON_FIELDS, OUTPUT_FIELDS, WATERMARK_FIELDS, Settings, read_settings
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
from pluglm.errors import PluglmError


@dataclass(frozen=True)
class Prepared:
    """What a strategy makes of one call.

    Attributes:
        prompt: one row a sequence to be made. chooser: how a token is chosen, given the call's processors.
        warpers: what reshapes scores before a draw. undo: called when the loop fails.
    """

    feed: Feed
    prompt: Prompt
    chooser: Callable[[Processors], Choose]
    warpers: Warpers | None = None
    undo: Callable[[], None] | None = None


class ContrastiveStrategy:
    """What both strategies share."""

    name: str
    fields: frozenset[str] = COMMON_FIELDS | OUTPUT_FIELDS | WATERMARK_FIELDS
    needs: frozenset[str] = frozenset()

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
        use_cache and position_ids, and whatever else the model's forward call takes."""
        config, request = generation_config or GenerationConfig(), self._request
        try:
            with torch.no_grad():
                criteria = call_criteria(config, stopping_criteria)
                settings = read_settings(
                    config, self.name, self.fields, vocab_size=request.vocab_size, decode=request.decode
                )
                prompt = read_prompt(
                    input_ids, model_kwargs.pop("attention_mask", None), bos=settings.bos, vocab_size=request.vocab_size
                )
                if model_kwargs.pop("output_hidden_states", False):  # by either way in
                    settings = replace(settings, hidden_states=True)
                made = self._prepare(model, prompt, config, settings, model_kwargs)
                rows = made.prompt
                process = Processors(
                    config, logits_processor, prompt_length=rows.width, mask=rows.mask, device=rows.ids.device,
                    source=encoder_source(model), warpers=made.warpers,
                )  # fmt: skip
                job = Job(
                    settings, rows, settings.limits(rows.lengths), made.feed, made.chooser(process), criteria, streamer,
                    request.decode,
                )  # fmt: skip
                return _run(job, made.undo)
        finally:
            if streamer is not None:
                streamer.end()

    def _prepare(
        self, model: Any, prompt: Prompt, config: GenerationConfig, settings: Settings, model_kwargs: dict[str, Any]
    ) -> Prepared:
        """What only this strategy does. prompt: one row a prompt."""
        raise NotImplementedError


def _run(job: Job, undo: Callable[[], None] | None) -> GenerationOutput:
    try:
        return run(job)
    except BaseException:
        if undo is not None:
            undo()
        raise


def all_the_same(name: str, copies: int, fix: str) -> PluglmError:
    """The error for several sequences of a prompt where nothing is drawn."""
    return refused(name, (f"num_return_sequences={copies}: all of a prompt's sequences would be the same",), fix)
