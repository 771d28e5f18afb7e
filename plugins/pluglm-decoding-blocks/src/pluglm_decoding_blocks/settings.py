"""A GenerationConfig, checked against what a strategy honours, as the numbers that the loop works with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pluglm.contracts import GenerationConfig
from pluglm.errors import InputError
from pluglm.generation import EXTRA_SAMPLING, SAMPLING
from pluglm_decoding_blocks.failures import not_honoured
from pluglm_decoding_blocks.fields import read_fields
from pluglm_decoding_blocks.values import flag, whole

#: Fields of processors that depend on their arguments alone, so that beams and guesses may be shown to them too.
PROCESSOR_FIELDS = frozenset({
    "sequence_bias", "encoder_repetition_penalty", "repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens", "prefix_allowed_tokens_fn",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "renormalize_logits",
})  # fmt: skip
#: Fields that every strategy honours which is built with `Processors` and `criteria.call_criteria`; `seed` is one of
#: them, since a seed changes no greedy choice.
COMMON_FIELDS = PROCESSOR_FIELDS | {
    "max_new_tokens", "max_length", "max_time", "eos_token_id", "bos_token_id", "pad_token_id", "stop_strings",
    "num_return_sequences", "seed", "prefill_chunk_size", "return_logprobs",
}  # fmt: skip
#: Fields of `Warpers`: for strategies that draw.
SAMPLING_FIELDS = frozenset((*SAMPLING, *EXTRA_SAMPLING))
#: What makes a watermark may remember what it was shown: for strategies that go on by one certain token at a time.
WATERMARK_FIELDS = frozenset({"watermarking_config"})
#: Classifier-free guidance: for strategies that run the model on a second prompt.
GUIDANCE_FIELDS = frozenset({"guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"})
#: What `loop.run` records step by step.
OUTPUT_FIELDS = frozenset({"output_scores", "output_logits", "output_hidden_states"})


@dataclass(frozen=True)
class Settings:
    """One call's settings. What they mean stands at `GenerationConfig`.

    Attributes:
        max_new, max_length: limits; at least one is there. min_new: no end token and no stop string ends a row before.
        eos: end tokens. pad: fills rows that have ended. bos: stands for an empty prompt.
        stop: stop strings. copies: sequences of each prompt.
        chunk: tokens of one prefill pass at most. logprobs, scores, logits, hidden_states: whether to record them.
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
    scores: bool = False
    logits: bool = False
    hidden_states: bool = False

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
    if config.max_length is not None and (whole(config, "min_length") or 0) > config.max_length:
        raise InputError(
            f"min_length={said['min_length']} is more than max_length={config.max_length}.",
            why="both count the prompt.", fix="Raise max_length, or lower min_length.", argument="min_length",
        )  # fmt: skip
    read_fields(config).check_ids(vocab_size)
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
        config.num_return_sequences or 1, whole(config, "prefill_chunk_size", 1), flag(config, "return_logprobs"),
        flag(config, "output_scores"), flag(config, "output_logits"), flag(config, "output_hidden_states"),
    )  # fmt: skip
