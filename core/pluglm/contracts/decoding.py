"""Decoding: strategies that turn a prompt into a completion, and what they are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pluglm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

#: (input_ids [B, S], scores [B, V] float32) -> scores [B, V]; may change `scores` in place.
LogitsProcessor = Callable[["Tensor", "Tensor"], "Tensor"]
#: Where the stages of score processing stand, in the order of transformers 5.23. "user": the caller's own.
STAGES = (
    "guidance", "sequence_bias", "encoder_repetition_penalty", "repetition_penalty", "no_repeat_ngram",
    "encoder_no_repeat_ngram", "bad_words", "min_length", "min_new_tokens", "prefix_allowed_tokens", "forced_bos",
    "forced_eos", "remove_invalid_values", "exponential_decay", "suppress", "begin_suppress", "user", "constraint",
    "temperature", "top_h", "top_k", "top_p", "min_p", "typical", "epsilon", "eta", "watermark", "renormalize",
)  # fmt: skip
#: (input_ids [B, S], scores [B, V] or None) -> [B] bool, True where a row shall end.
StoppingCriterion = Callable[["Tensor", "Tensor | None"], "Tensor"]
FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class Placed:
    """A logits processor of the caller's with its place in the order; without one it stands at "user".

    Attributes:
        process: the processor. before, after: a name of `STAGES`; exactly one of them. Where a strategy or a call has
            nothing at that stage, the place is kept all the same.
    """

    process: LogitsProcessor
    before: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        stage = self.before if self.before is not None else self.after
        if (self.before is None) == (self.after is None) or stage not in STAGES:
            raise InputError(
                f"Placed(before={self.before!r}, after={self.after!r}) names no place.",
                fix=f"Give one of them, a stage: {', '.join(STAGES)}.", argument="logits_processor",
            )  # fmt: skip

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """As the processor: a strategy that knows no places runs it among the caller's own."""
        return self.process(input_ids, scores)


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate. None means "not said": the strategy's own default holds.

    Names and meanings are the field's (`generation_config.json`). A strategy lists the fields it honours; a field that
    is set and not honoured is refused, never ignored.

    Attributes:
        max_new_tokens: new tokens a row at most. max_length: prompt and new tokens together at most.
        min_new_tokens: no end before that many.
        temperature: > 0, divides the scores. top_k: keep the k best. top_p: keep the smallest set with that mass
            (Holtzman et al. 2020). min_p: keep tokens with at least min_p times the best one's probability
            (Nguyen et al. 2024). repetition_penalty: > 0, CTRL (Keskar et al. 2019, section 4.1).
        seed: one for all rows (row r draws with (seed, r)) or one a row.
        eos_token_id: ends a row; several are allowed. pad_token_id: fills ended rows.
        stop_strings: end a row when its new text contains one; the text is cut before it.
        num_return_sequences: completions of each prompt.
        extra: fields that only some strategies know ("num_beams"), by name.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | tuple[int, ...] | None = None
    eos_token_id: tuple[int, ...] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] | None = None
    num_return_sequences: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise InputError(f"{name}={getattr(self, name)!r} makes no sense: it must be {rule}.", argument=name)

        for name in ("seed", "eos_token_id", "stop_strings"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        for name in ("max_new_tokens", "max_length", "min_new_tokens", "num_return_sequences", "top_k"):
            value = getattr(self, name)
            low = 1 if name == "num_return_sequences" else 0
            check(name, value is None or (type(value) is int and value >= low), f"an integer >= {low}")
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            check(name, value is None or (_is_number(value) and 0 < value < float("inf")), "a number > 0")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            check(name, value is None or (_is_number(value) and 0 <= value <= 1), "a number from 0 to 1")
        check("top_p", self.top_p is None or self.top_p > 0, "a number from 0 to 1, and not 0")
        for name, kind, rule in (("eos_token_id", int, "an id or several"), ("stop_strings", str, "a text or several")):
            value = getattr(self, name)
            check(name, value is None or (isinstance(value, tuple) and all(type(v) is kind for v in value)), rule)
        for name in ("bos_token_id", "pad_token_id"):
            check(name, getattr(self, name) is None or type(getattr(self, name)) is int, "the id of a token")
        seeds = self.seed if isinstance(self.seed, tuple) else () if self.seed is None else (self.seed,)
        check(
            "seed",
            all(type(s) is int and 0 <= s < 2**64 for s in seeds),
            "an integer from 0 to 2**64 - 1, or one a row",
        )

    def set_fields(self) -> dict[str, Any]:
        """The fields that say something, `extra` merged in."""
        said = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name != "extra" and getattr(self, f.name) is not None
        }
        return {**said, **self.extra}

    def updated(self, **fields: Any) -> GenerationConfig:
        """A copy with these fields; names that are not fields of this class go to `extra`."""
        known = {f.name for f in dataclasses.fields(self)} - {"extra"}
        plain = {name: _plain(name, value) for name, value in fields.items() if name in known}
        extra = {name: value for name, value in fields.items() if name not in known}
        return dataclasses.replace(self, **plain, extra={**self.extra, **extra})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(name: str, value: Any) -> Any:
    """Lists as users write them, as the tuples this class keeps."""
    if name == "eos_token_id" and isinstance(value, int):
        return (value,)
    if name == "stop_strings" and isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class GenerationOutput:
    """What a strategy returns.

    Attributes:
        sequences: [B * num_return_sequences, S] int64: prompt and completion, left-aligned as the prompt came in,
            ended rows filled with the pad token.
        prompt_length: cells of the prompt in `sequences` (padding included).
        num_new_tokens: a row; an end token counts.
        finish_reasons: a row.
        logprobs: [rows][new tokens] of the chosen tokens, if asked for.
        sequence_scores: a row, of strategies that rank sequences: the score that ranked it.
        beam_indices: [rows][new tokens] which row of the search each token came from, of strategies that search.
        scores: a step: [R, V] float32, after processors and warpers, if asked for with output_scores.
        logits: a step: [R, V] as the model gave them, if asked for with output_logits.
        hidden_states: a step: L + 1 tensors [R, T, C], if asked for with output_hidden_states; T is the prompt's length
            at first, then 1.
    """

    sequences: Tensor
    prompt_length: int
    num_new_tokens: tuple[int, ...]
    finish_reasons: tuple[FinishReason, ...]
    logprobs: tuple[tuple[float, ...], ...] | None = None
    sequence_scores: tuple[float, ...] | None = None
    beam_indices: tuple[tuple[int, ...], ...] | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None

    def completion(self, row: int) -> list[int]:
        """The new token ids of one row, padding cut off."""
        new: list[int] = self.sequences[row, self.prompt_length :][: self.num_new_tokens[row]].tolist()
        return new


class Streamer(Protocol):
    """Receives token ids while they are made."""

    def put(self, token_ids: Tensor) -> None:
        """[B] the next token of every row, -1 for a row that has ended before; the prompt is not sent.

        Of a strategy that searches, the rows are the prompts, and what is told is each one's best sequence.
        """
        ...

    def end(self) -> None:
        """Nothing more will come."""
        ...


@dataclass(frozen=True)
class DecodingRequest:
    """What the planner asks a decoding provider to build for one model.

    Attributes:
        vocab_size: V. device: of the model.
        decode: token ids -> text, for stop strings; None if there is no tokenizer.
        variant: what the user wrote after the colon. options: keyword options; unknown ones must be refused.
        encode: text -> token ids, no special ones added; None if there is no tokenizer.
    """

    vocab_size: int
    device: str
    decode: Callable[[Sequence[int]], str] | None
    variant: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    encode: Callable[[str], Sequence[int]] | None = None


@runtime_checkable
class DecodingStrategy(Protocol):
    """Turns a prompt into a completion. The call has the shape of the Hub's `custom_generate` callables."""

    name: str
    #: Fields of GenerationConfig, or names in its `extra`, that it honours.
    fields: frozenset[str]
    #: Cache operations it uses beyond appending.
    needs: frozenset[str]

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriterion] | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Streamer | None = None,
        **model_kwargs: Any,
    ) -> GenerationOutput | Tensor:
        """Generate.

        Args:
            model: a `pluglm.forward.CausalLM`; `model(input_ids, …)` is the forward contract of the field.
            input_ids: [B, T] int64.
            logits_processor: the caller's own, applied in order, before the strategy's warpers.
            stopping_criteria: the caller's own.
            generation_config: complete: eos, pad and limits are filled in.
            streamer: told of every step's tokens.
            **model_kwargs: go to every forward call: attention_mask [B, T], past_key_values (a Cache), …
        Returns: a GenerationOutput, or the bare sequences as Hub callables return them.
        """
        ...


@runtime_checkable
class TokenSelector(Protocol):
    """One token at a time, for rows of unrelated requests: what engines batch over.

    The draw for a token depends on its row's seed and position alone, never on what else is in the batch.
    """

    def select(self, logits: Tensor, configs: Sequence[GenerationConfig], seeds: Tensor, positions: Tensor) -> Tensor:
        """[B] int64 chosen ids.

        Args:
            logits: [B, V] of the last position, processors applied.
            configs: a row. seeds: [B] int64. positions: [B] int64, number of new tokens so far.
        """
        ...
