"""Everything that changes scores before a token is chosen, in order, as one object for a call.

The order is that of `pluglm.contracts.STAGES`, the numbers are those of transformers 5.23. What the stages do stands in
`biases`, `penalties`, `ngrams`, `lengths`, `allowed` and `warpers`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import GenerationConfig, LogitsProcessor, Placed
from pluglm.errors import InputError
from pluglm_decoding_blocks.allowed import PrefixAllowed, Suppress, remove_invalid
from pluglm_decoding_blocks.biases import SequenceBias, bad_words
from pluglm_decoding_blocks.fields import ProcessorFields, read_fields
from pluglm_decoding_blocks.lengths import MinLength, MinNewTokens, begin_suppressed, forced_bos, forced_eos
from pluglm_decoding_blocks.ngrams import NoCopy, NoRepeat
from pluglm_decoding_blocks.order import in_order
from pluglm_decoding_blocks.penalties import ExponentialDecay, RepetitionPenalty, SourcePenalty
from pluglm_decoding_blocks.source import Source
from pluglm_decoding_blocks.texts import Texts
from pluglm_decoding_blocks.values import described
from pluglm_decoding_blocks.warpers import Stage, Warpers


class Processors:
    """All processors of one call, in order, on float32 scores.

    Args:
        own: the caller's; one that is `Placed` stands where it says. prompt_length, mask: of the prompts, [R, S].
        incremental: as in `RepetitionPenalty`.
        beams: rows of each prompt, of which a caller's prefix_allowed_tokens_fn is told nothing.
        source: of an encoder-decoder. warpers: of a strategy that draws; they stand among the other stages, and the
            caller applies none itself. guidance: what mixes the scores with those of another prompt.

    Attributes:
        names: of the stages that have something to do, in `STAGES`; "user" for any processor of the caller's.
    Raises: InputError for values that make no sense.
    """

    def __init__(
        self, config: GenerationConfig, own: Sequence[LogitsProcessor] | None, *, prompt_length: int,
        mask: Tensor | None, device: torch.device, incremental: bool = True, beams: int = 1,
        source: Source | None = None, warpers: Warpers | None = None, guidance: LogitsProcessor | None = None,
    ) -> None:  # fmt: skip
        fields, texts = read_fields(config), Texts(prompt_length, mask)
        stages: dict[str, LogitsProcessor] = {"guidance": guidance} if guidance is not None else {}
        stages |= _by_content(fields, texts, mask, device, incremental, source)
        stages |= _by_place(fields, texts, device, beams, _limits(config, texts))
        if warpers is not None:
            stages |= {name: _without_ids(stage) for name, stage in warpers.stages}
        if fields.watermarking_config is not None:
            stages["watermark"] = _Watermark(fields.watermarking_config, texts, device)
        if fields.renormalize_logits:
            stages["renormalize"] = _without_ids(lambda scores: scores.log_softmax(-1))
        self.names = frozenset(stages) | ({"user"} if own else set())
        self._chain = in_order(stages, [_looked_at(process) for process in own or ()])
        # Whoever asks for invalid values to be removed wants to go on where the model gave some.
        self._foreign = bool(own) and not fields.remove_invalid_values

    @property
    def idle(self) -> bool:
        """There is nothing to do: scores are the logits."""
        return not self._chain

    def __call__(self, input_ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Process the model's logits.

        Args:
            input_ids: [R, S]. logits: [R, V] in the model's dtype, left as they are.
        Returns: scores [R, V] float32 (the logits themselves if there is nothing to do), and the best of the untouched
            logits [R] if a caller's processor could have hidden that they are not finite.
        """
        if not self._chain:
            return logits, None
        raw = logits.amax(-1).float() if self._foreign else None
        # A caller's processor may write in place; the model's output may be a buffer it uses again.
        scores = logits.to(torch.float32, copy=True)
        for process in self._chain:
            scores = process(input_ids, scores)
        return scores, raw


def _looked_at(process: LogitsProcessor) -> LogitsProcessor:
    """A processor of the caller's, at its place, that fails where it returns no scores for every token."""
    if isinstance(process, Placed):
        return dataclasses.replace(process, process=_looked_at(process.process))

    def run(input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = scores.shape
        found: Any = process(input_ids, scores)
        if not isinstance(found, Tensor) or found.shape != wanted:
            raise InputError(
                f"a logits processor returned {described(found)}.",
                why=f"it must return scores of the shape that it was given, {tuple(wanted)}.",
                fix="Return the scores, changed in place or anew.", argument="logits_processor",
            )  # fmt: skip
        return found

    return run


def known_best(best: Tensor, raw: Tensor | None) -> Tensor:
    """The best score; where the model's own was no finite number, that one, whatever a processor made of it.

    Args:
        best: [R] after all processing. raw: as `Processors` gave it.
    """
    return best if raw is None else torch.where(raw.isfinite(), best.float(), raw)


def _by_content(
    fields: ProcessorFields, texts: Texts, mask: Tensor | None, device: torch.device, incremental: bool,
    source: Source | None,
) -> dict[str, LogitsProcessor]:  # fmt: skip
    """The stages that go by what the text and its source hold."""
    stages: dict[str, LogitsProcessor] = {}
    ids, source_mask = (source.ids, source.mask) if source is not None else (None, None)
    if fields.sequence_bias:
        stages["sequence_bias"] = SequenceBias(texts, fields.sequence_bias, device)
    if fields.encoder_repetition_penalty != 1.0:
        stages["encoder_repetition_penalty"] = SourcePenalty(
            fields.encoder_repetition_penalty, ids, mask if ids is None else source_mask, length=texts.prompt_length
        )
    if fields.repetition_penalty != 1.0:
        stages["repetition_penalty"] = RepetitionPenalty(fields.repetition_penalty, mask, incremental=incremental)
    if fields.no_repeat_ngram_size:
        stages["no_repeat_ngram"] = NoRepeat(texts, fields.no_repeat_ngram_size)
    if fields.encoder_no_repeat_ngram_size:
        stages["encoder_no_repeat_ngram"] = NoCopy(texts, fields.encoder_no_repeat_ngram_size, ids, source_mask)
    if words := bad_words(fields.bad_words_ids, fields.eos):
        stages["bad_words"] = SequenceBias(texts, words, device)
    return stages


def _by_place(
    fields: ProcessorFields, texts: Texts, device: torch.device, beams: int, limits: Sequence[int]
) -> dict[str, LogitsProcessor]:
    """The stages that go by where a text stands, or by nothing. limits: new tokens of each row, or of all."""

    def tokens(ids: Sequence[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=device)

    stages: dict[str, LogitsProcessor] = {}
    if fields.min_length and fields.eos:
        stages["min_length"] = MinLength(texts, fields.min_length, tokens(fields.eos))
    if fields.min_new_tokens and fields.eos:
        stages["min_new_tokens"] = MinNewTokens(texts.prompt_length, fields.min_new_tokens, tokens(fields.eos))
    if fields.prefix_allowed_tokens_fn is not None:
        stages["prefix_allowed_tokens"] = PrefixAllowed(texts, fields.prefix_allowed_tokens_fn, beams)
    if fields.forced_bos_token_id:
        stages["forced_bos"] = forced_bos(texts, tokens(fields.forced_bos_token_id))
    if fields.forced_eos_token_id:
        stages["forced_eos"] = forced_eos(texts, limits, tokens(fields.forced_eos_token_id))
    if fields.remove_invalid_values:
        stages["remove_invalid_values"] = _without_ids(remove_invalid)
    if fields.exponential_decay_length_penalty is not None:
        start, factor = fields.exponential_decay_length_penalty
        stages["exponential_decay"] = ExponentialDecay(texts, start, factor, tokens(fields.eos))
    if fields.suppress_tokens:
        stages["suppress"] = Suppress(tokens(fields.suppress_tokens))
    if fields.begin_suppress_tokens:
        forced = bool(fields.forced_bos_token_id)
        stages["begin_suppress"] = begin_suppressed(texts, tokens(fields.begin_suppress_tokens), bos_forced=forced)
    return stages


class _Watermark:
    """The processor that a watermarking config makes, on texts whose padding, if any, is on the left."""

    def __init__(self, config: Any, texts: Texts, device: torch.device) -> None:
        self._config, self._texts, self._device = config, texts, device
        self._process: LogitsProcessor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._process is None:  # the first scores say how many tokens there are
            self._process = self._config.construct_processor(scores.shape[-1], self._device)
        assert self._process is not None
        return self._process(self._texts.left_padded(input_ids), scores)


def _without_ids(stage: Stage) -> LogitsProcessor:
    return lambda _, scores: stage(scores)


def _limits(config: GenerationConfig, texts: Texts) -> tuple[int, ...]:
    """As `Settings.limits`: new tokens of each row at most; -1 where nothing says so."""
    limits = []
    for length in texts.lengths:
        room = None if config.max_length is None else config.max_length - length
        limits.append(min((limit for limit in (config.max_new_tokens, room) if limit is not None), default=-1))
    return tuple(limits)
