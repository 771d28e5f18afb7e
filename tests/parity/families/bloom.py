"""Checkpoints of `pluglm-arch-bloom`, and the knobs of linear biases, a norm on embeddings and clipped projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from checkpoints import NO_TOKENS, VOCAB_SIZE, Variant
from rewriting import Knob, field, on

from pluglm.contracts import Attention, AttentionSpec, Embedding


def _bloom(**settings: Any) -> Variant:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "n_layer": 3, "layer_norm_epsilon": 1e-4, **NO_TOKENS}
    return Variant("bloom", {**sizes, **settings})


def _mpt(attn_config: dict[str, Any], **settings: Any) -> Variant:
    sizes = {
        "vocab_size": VOCAB_SIZE, "d_model": 48, "n_layers": 3, "max_seq_len": 120, "layer_norm_epsilon": 1e-4,
        **NO_TOKENS,
    }  # fmt: skip
    return Variant("mpt", {**sizes, **settings, "attn_config": attn_config})


VARIANTS: dict[str, Variant] = {
    # 6 and 12 heads: slopes of 4 and 8 heads, and further ones between them.
    "bloom-six": _bloom(n_head=6, seq_length=120),
    "bloom-untied": _bloom(n_head=4, seq_length=120, tie_word_embeddings=False),
    "mpt-clip": _mpt({"clip_qkv": 0.9, "softmax_scale": 0.21}, n_heads=12),
    "mpt-untied": _mpt({}, n_heads=4, tie_word_embeddings=False),
}


def _of_slopes(change: Any) -> Knob:
    def changed(spec: AttentionSpec) -> AttentionSpec:
        return spec if spec.alibi_slopes is None else replace(spec, alibi_slopes=change(spec.alibi_slopes))

    return on(AttentionSpec, changed)


KNOBS: dict[str, Knob] = {
    "spec.alibi_slopes none": field(AttentionSpec, "alibi_slopes", lambda _: None),
    "spec.alibi_slopes steeper": _of_slopes(lambda slopes: tuple(1.1 * slope for slope in slopes)),
    "spec.alibi_slopes of the next head": _of_slopes(lambda slopes: slopes[1:] + slopes[:1]),
    "embedding.norm": field(Embedding, "norm", lambda _: None),
    "embedding.norm.eps": on(
        Embedding, lambda e: e if e.norm is None else replace(e, norm=replace(e.norm, eps=0.05))),
    "attention.qkv_clip none": field(Attention, "qkv_clip", lambda _: None),
    "attention.qkv_clip wider": on(
        Attention, lambda op: op if op.qkv_clip is None else replace(op, qkv_clip=1.1 * op.qkv_clip)),
}  # fmt: skip
