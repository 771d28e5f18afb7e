"""Checkpoints of `pluglm-arch-gpt2`, and the knobs of learned positions, layer norms and plain feed-forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from checkpoints import NO_TOKENS, VOCAB_SIZE, Variant
from rewriting import Knob, field, on

from pluglm.contracts import AttentionSpec, DecoderProgram, Embedding, Norm


def _variant(model_type: str, **settings: Any) -> Variant:
    sizes = {
        "vocab_size": VOCAB_SIZE, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 120,
        "layer_norm_epsilon": 1e-4, **NO_TOKENS,
    }  # fmt: skip
    return Variant(model_type, {**sizes, **settings})


VARIANTS: dict[str, Variant] = {
    "gpt2-inverse": _variant("gpt2", n_inner=84, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "gpt2-unscaled": _variant(
        "gpt2", n_head=4, activation_function="relu", scale_attn_weights=False, tie_word_embeddings=False
    ),
    "gpt-bigcode-shared": _variant("gpt_bigcode", n_inner=84, multi_query=True),
    "gpt-bigcode-each": _variant(
        "gpt_bigcode", multi_query=False, activation_function="gelu", scale_attn_weights=False,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def _scale_of_the_first_layer(program: DecoderProgram) -> DecoderProgram | None:
    specs = program.attention_specs()
    return on(AttentionSpec, lambda spec: replace(spec, scale=specs[0].scale))(program)


KNOBS: dict[str, Knob] = {
    "embedding.learned_positions": field(Embedding, "learned_positions", lambda _: None),
    "norm.bias": field(Norm, "bias", lambda _: False),
    "norm.kind of layer norms": on(
        Norm, lambda norm: replace(norm, kind="rms", bias=False) if norm.kind == "layer" else norm),
    "spec.scale of the first layer": _scale_of_the_first_layer,
}  # fmt: skip

NOT_BROKEN = {"FeedForward.gated": "a gate has weights of its own"}
