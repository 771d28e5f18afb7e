"""A GenerationConfig, checked against what a strategy honours, as the numbers that the loop works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pluglm.contracts import GenerationConfig
from pluglm.errors import InputError
from pluglm_decoding_blocks.failures import not_honoured

#: Fields that every strategy of this package honours; `seed` is one of them, since a seed changes no greedy choice.
COMMON_FIELDS = frozenset({
    "max_new_tokens", "max_length", "min_new_tokens", "repetition_penalty", "eos_token_id", "bos_token_id",
    "pad_token_id", "stop_strings", "num_return_sequences", "seed", "prefill_chunk_size", "return_logprobs",
})  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """One call's settings. What they mean stands at `GenerationConfig`.

    Attributes:
        max_new, max_length: limits; at least one is there. min_new: no end token and no stop string ends a row before.
        eos: end tokens. pad: fills rows that have ended. bos: stands for an empty prompt.
        stop: stop strings. copies: sequences of each prompt.
        chunk: tokens of one prefill pass at most. logprobs: whether to record them.
    """

    max_new: int | None
    max_length: int | None
    min_new: int
    eos: tuple[int, ...]
    pad: int
    bos: int | None
    stop: tuple[str, ...]
    copies: int
    chunk: int | None
    logprobs: bool

    def alone(self) -> Settings:
        """The same with one sequence of each prompt: for a prompt whose rows are copies already."""
        return dataclasses.replace(self, copies=1)

    def limits(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """New tokens of each row at most. lengths: real tokens of each prompt.

        `max_length` counts a row's own tokens and no padding, so a row ends where it would end alone.
        """
        limits = []
        for row, length in enumerate(lengths):
            room = self.max_length - length if self.max_length is not None else None
            if room is not None and room <= 0 and self.max_new != 0:
                raise InputError(
                    f"max_length={self.max_length} leaves no room: the prompt of row {row} has {length} tokens.",
                    fix="Raise max_length, or use max_new_tokens, which does not count the prompt.",
                    argument="max_length",
                )
            limits.append(min(limit for limit in (self.max_new, room) if limit is not None))
        return tuple(limits)


def read_settings(
    config: GenerationConfig, strategy: str, fields: frozenset[str], *, vocab_size: int,
    decode: Callable[[Sequence[int]], str] | None,
) -> Settings:  # fmt: skip
    """Check `config` and take it apart.

    Raises: UnsupportedRequestError for a field outside `fields`, InputError for values that cannot be honoured.
    """
    said = config.set_fields()
    if set(said) - fields:
        raise not_honoured(strategy, said, fields)
    if config.max_new_tokens is None and config.max_length is None:
        raise InputError(
            "the call does not say how long the completion may be.",
            fix="Set max_new_tokens (or max_length, which counts the prompt too).", argument="max_new_tokens",
        )  # fmt: skip
    if (config.min_new_tokens or 0) > (config.max_new_tokens if config.max_new_tokens is not None else float("inf")):
        raise InputError(
            f"min_new_tokens={config.min_new_tokens} is more than max_new_tokens={config.max_new_tokens}.",
            fix="Raise max_new_tokens, or lower min_new_tokens.", argument="min_new_tokens",
        )  # fmt: skip
    stop = config.stop_strings or ()
    if stop and decode is None:
        raise InputError(
            "stop_strings cannot be honoured: this model has no tokenizer.", why="they are looked for in the text.",
            fix="Use eos_token_id, or load the model with a tokenizer.", argument="stop_strings",
        )  # fmt: skip
    if not all(stop):
        raise InputError("a stop string is empty.", why="every text contains it.", fix="Leave it out.",
                         argument="stop_strings")  # fmt: skip
    eos = config.eos_token_id or ()
    pad = config.pad_token_id if config.pad_token_id is not None else (eos or (0,))[0]
    for name, ids in (("eos_token_id", eos), ("pad_token_id", (pad,))):
        if not all(0 <= i < vocab_size for i in ids):
            raise InputError(
                f"{name}={getattr(config, name)!r} is outside the vocabulary of {vocab_size}.",
                fix="Pass the id of this model's token.", argument=name,
            )  # fmt: skip
    return Settings(
        config.max_new_tokens, config.max_length, config.min_new_tokens or 0, eos, pad, config.bos_token_id, stop,
        config.num_return_sequences or 1, _chunk(config), _flag(config, "return_logprobs"),
    )  # fmt: skip


def _chunk(config: GenerationConfig) -> int | None:
    size = config.extra.get("prefill_chunk_size")
    if size is not None and (type(size) is not int or size < 1):
        raise InputError(f"prefill_chunk_size={size!r} makes no sense: it must be an integer >= 1.",
                         argument="prefill_chunk_size")  # fmt: skip
    return size


def _flag(config: GenerationConfig, name: str) -> bool:
    value = config.extra.get(name)
    if value not in (None, True, False):
        raise InputError(f"{name}={value!r} makes no sense: it must be True or False.", argument=name)
    return bool(value)
