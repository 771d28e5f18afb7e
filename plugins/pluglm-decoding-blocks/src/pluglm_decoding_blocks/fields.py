"""What a call says of its processors, checked once; nothing is read or checked token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pluglm.contracts import GenerationConfig
from pluglm.errors import InputError
from pluglm_decoding_blocks import values
from pluglm_decoding_blocks.allowed import PrefixFunction


@dataclass(frozen=True)
class ProcessorFields:
    """The fields of `settings.PROCESSOR_FIELDS` and "watermarking_config"; what they mean stands in the reference.

    A number at which a processor does nothing, an empty tuple, or None: it is off.
    """

    sequence_bias: Mapping[tuple[int, ...], float]
    encoder_repetition_penalty: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    encoder_no_repeat_ngram_size: int
    bad_words_ids: tuple[tuple[int, ...], ...]
    min_length: int
    min_new_tokens: int
    prefix_allowed_tokens_fn: PrefixFunction | None
    forced_bos_token_id: tuple[int, ...]
    forced_eos_token_id: tuple[int, ...]
    remove_invalid_values: bool
    exponential_decay_length_penalty: tuple[int, float] | None
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    watermarking_config: Any
    renormalize_logits: bool
    eos: tuple[int, ...]

    def check_ids(self, vocab_size: int) -> None:
        """Raises InputError for an id outside the vocabulary."""
        named = {
            "sequence_bias": [i for ids in self.sequence_bias for i in ids],
            "bad_words_ids": [i for ids in self.bad_words_ids for i in ids],
        }
        for name in ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"):
            named[name] = list(getattr(self, name))
        for name, ids in named.items():
            if ids and max(ids) >= vocab_size:
                raise InputError(
                    f"{name} names token {max(ids)}, which is outside the vocabulary of {vocab_size}.",
                    fix="Pass ids of this model's tokens.", argument=name,
                )  # fmt: skip


def read_fields(config: GenerationConfig) -> ProcessorFields:
    """Take them out of a config. Raises InputError for values that make no sense or cannot be honoured."""
    bos = values.token_ids(config, "forced_bos_token_id")
    if len(bos) > 1:
        raise values.senseless("forced_bos_token_id", bos, "the id of one token")
    function = values.said(config, "prefix_allowed_tokens_fn")
    if function is not None and not callable(function):
        raise values.senseless("prefix_allowed_tokens_fn", function, "a function (prompt number, ids) -> ids")
    watermark = values.said(config, "watermarking_config")
    if watermark is not None and not callable(getattr(watermark, "construct_processor", None)):
        rule = "an object with construct_processor(vocab_size, device)"
        raise values.senseless("watermarking_config", watermark, rule)
    return ProcessorFields(
        values.biases(config, "sequence_bias"),
        values.number(config, "encoder_repetition_penalty", above=0) or 1.0,
        float(config.repetition_penalty or 1.0),
        values.whole(config, "no_repeat_ngram_size") or 0,
        values.whole(config, "encoder_no_repeat_ngram_size") or 0,
        values.words(config, "bad_words_ids"),
        values.whole(config, "min_length") or 0,
        config.min_new_tokens or 0,
        function,
        bos,
        values.token_ids(config, "forced_eos_token_id"),
        values.flag(config, "remove_invalid_values"),
        _decay(config),
        values.token_ids(config, "suppress_tokens"),
        values.token_ids(config, "begin_suppress_tokens"),
        watermark,
        values.flag(config, "renormalize_logits"),
        config.eos_token_id or (),
    )


def _decay(config: GenerationConfig) -> tuple[int, float] | None:
    name = "exponential_decay_length_penalty"
    value = values.said(config, name)
    if value is None:
        return None
    start, factor = value if isinstance(value, list | tuple) and len(value) == 2 else (-1, -1.0)
    numbers = type(start) is int and isinstance(factor, int | float) and not isinstance(factor, bool)
    if not (numbers and start >= 0 and 0 < factor < float("inf")):
        raise values.senseless(name, value, "(new tokens before it begins, a factor > 0)")
    if not config.eos_token_id:
        raise InputError(
            f"{name} cannot be honoured: the call has no end token.", why="it makes end tokens likelier.",
            fix="Pass eos_token_id, or leave it out.", argument=name,
        )  # fmt: skip
    return start, float(factor)
