"""A processor of the caller's own takes the place of the built-in one of its kind, as in the reference.

Source: transformers 5.23, `GenerationMixin._merge_criteria_processor_list`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pluglm.contracts.decoding import Placed

if TYPE_CHECKING:
    from pluglm.contracts.decoding import GenerationConfig

#: Class of a processor -> the field that makes a built-in one, and the stage at which that stands.
KINDS: Mapping[str, tuple[str, str]] = {
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "repetition_penalty"),
    "NoRepeatNGramLogitsProcessor": ("no_repeat_ngram_size", "no_repeat_ngram"),
    "NoBadWordsLogitsProcessor": ("bad_words_ids", "bad_words"),
    "SequenceBiasLogitsProcessor": ("sequence_bias", "sequence_bias"),
    "ForcedBOSTokenLogitsProcessor": ("forced_bos_token_id", "forced_bos"),
    "ForcedEOSTokenLogitsProcessor": ("forced_eos_token_id", "forced_eos"),
    "InfNanRemoveLogitsProcessor": ("remove_invalid_values", "remove_invalid_values"),
    "ExponentialDecayLengthPenalty": ("exponential_decay_length_penalty", "exponential_decay"),
    "SuppressTokensLogitsProcessor": ("suppress_tokens", "suppress"),
    "SuppressTokensAtBeginLogitsProcessor": ("begin_suppress_tokens", "begin_suppress"),
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopHLogitsWarper": ("top_h", "top_h"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "TypicalLogitsWarper": ("typical_p", "typical"),
    "EpsilonLogitsWarper": ("epsilon_cutoff", "epsilon"),
    "EtaLogitsWarper": ("eta_cutoff", "eta"),
}


def replaced(config: GenerationConfig, processors: Sequence[Any]) -> tuple[GenerationConfig, list[Any]]:
    """Settings without the fields whose place a processor takes, and the processors with their places.

    One whose kind has no field set stays among the caller's own.
    """
    placed: list[Any] = []
    for process in processors:
        name, stage = KINDS.get(type(process).__name__, ("", ""))
        if name in config.set_fields():
            config, process = without(config, name), Placed(process, after=stage)
        placed.append(process)
    return config, placed


def without(config: GenerationConfig, name: str) -> GenerationConfig:
    """The settings with one field unset."""
    if name in config.extra:
        return dataclasses.replace(config, extra={k: v for k, v in config.extra.items() if k != name})
    changed: dict[str, Any] = {name: None}
    return dataclasses.replace(config, **changed)
