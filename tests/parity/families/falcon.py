"""Checkpoints of `pluglm-arch-falcon`, and the knob of a norm that two parts share."""

from __future__ import annotations

from typing import Any

from checkpoints import LINEAR, LLAMA3, NO_TOKENS, VOCAB_SIZE, Variant
from rewriting import Knob, field

from pluglm.contracts import Part


def _falcon(**settings: Any) -> Variant:
    """6 heads: their slopes are powers of two, which is where rounding products to bfloat16 changes nothing."""
    sizes = {
        "vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
        "max_position_embeddings": 120, "layer_norm_epsilon": 1e-4, **NO_TOKENS,
    }  # fmt: skip
    return Variant("falcon", {**sizes, **settings})


VARIANTS: dict[str, Variant] = {
    "falcon-grouped": _falcon(
        new_decoder_architecture=True, num_kv_heads=2, bias=True, ffn_hidden_size=84, rope_parameters=dict(LINEAR)
    ),
    "falcon-grouped-one-norm": _falcon(
        new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1, rope_parameters=dict(LLAMA3),
        activation="relu", tie_word_embeddings=False,
    ),
    "falcon-shared": _falcon(multi_query=True, parallel_attn=True),
    "falcon-sequential": _falcon(
        multi_query=False, parallel_attn=False, bias=True, activation="silu", tie_word_embeddings=False
    ),
    "falcon-alibi": _falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
    "falcon-alibi-shared": _falcon(alibi=True, multi_query=True, parallel_attn=True, num_attention_heads=4),
}  # fmt: skip


def _biases_once(reference: Any) -> Any:
    """Transformers 5.23.0 puts linear biases into the mask, for sdpa; its eager attention adds them once more."""
    if not reference.config.alibi:
        return reference
    again = type(reference).from_pretrained(
        reference.name_or_path, attn_implementation="sdpa", dtype=reference.dtype
    )  # fmt: skip
    return again.eval()


ADAPTERS = {"falcon": _biases_once}

KNOBS: dict[str, Knob] = {"part.share_norm_in": field(Part, "share_norm_in", lambda _: False)}
