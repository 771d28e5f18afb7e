"""The generation fields that code written for transformers sets: their defaults, and which mean something when.

Source: transformers 5.23, `GenerationConfig` and its global defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Every field with the value at which it changes nothing, or that holds when nobody says anything.
DEFAULTS: Mapping[str, Any] = {
    # length
    "max_length": 20, "max_new_tokens": None, "min_length": 0, "min_new_tokens": None, "early_stopping": False,
    "max_time": None, "stop_strings": None,
    # strategy
    "do_sample": False, "num_beams": 1, "use_mtp": None, "prefill_chunk_size": None,
    # cache
    "use_cache": True, "cache_implementation": None, "cache_config": None, "max_cache_len": None,
    # logits
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None,
    "renormalize_logits": False, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "remove_invalid_values": False, "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "token_healing": False, "guidance_scale": None,
    "watermarking_config": None,
    # outputs
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False,
    "output_logits": False, "return_dict_in_generate": False,
    # tokens
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "decoder_start_token_id": None,
    # assistants
    "is_assistant": False, "num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4, "prompt_lookup_num_tokens": None, "max_matching_ngram_size": 2,
    "assistant_early_exit": None, "assistant_lookbehind": 10, "target_lookbehind": 10,
    "assistant_ensemble_weight": None, "speculation_type": None,
    # performance
    "compile_config": None, "disable_compile": False,
    # searches and methods that the reference moved to the Hub
    "low_memory": False, "penalty_alpha": None, "dola_layers": None, "diversity_penalty": 0.0, "num_beam_groups": 1,
    "constraints": None, "force_words_ids": None,
    # pluglm's own: draws of a call from a seed of its own
    "seed": None,
}  # fmt: skip

#: Keys of generation_config.json that say who wrote it, and nothing of how tokens are chosen.
RECORDS = ("transformers_version", "_from_model_config", "_commit_hash", "trust_remote_code")
#: Fields that are read only while tokens are drawn.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
#: Fields that are read only by searches.
BEAMS = ("early_stopping", "length_penalty", "diversity_penalty")
#: Fields that only an assistant's or a look-up's guesses read.
GUESSING = (
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
)  # fmt: skip
#: Fields that say what `generate` returns.
OUTPUTS = ("output_scores", "output_logits", "output_hidden_states")
