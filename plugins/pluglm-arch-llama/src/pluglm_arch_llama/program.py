"""The shape that these families share: attention and a gated feed-forward, each in a residual branch with one norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pluglm_blocks.reading import Sizes, stretched

from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    Embedding,
    FeedForward,
    Head,
    KVSlot,
    Layer,
    MaskSpec,
    Norm,
    Part,
    Rope,
)


def attention(
    sizes: Sizes,
    layer: int,
    *,
    rope: Rope | None,
    window: int | None = None,
    scale: float | None = None,
    qkv_bias: bool = False,
    o_bias: bool = False,
    qk_norm: Norm | None = None,
    qk_norm_over: Literal["head", "all"] = "head",
) -> Attention:
    """Grouped-query attention of one layer, in the slot of that number. scale: None: head_dim ** -0.5."""
    spec = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        v_head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5 if scale is None else scale,
        mask=MaskSpec(window=window),
    )
    return Attention(
        spec, slot=layer, rope=rope, q_bias=qkv_bias, k_bias=qkv_bias, v_bias=qkv_bias, o_bias=o_bias,
        qk_norm=qk_norm, qk_norm_over=qk_norm_over,
    )  # fmt: skip


def decoder(
    sizes: Sizes,
    attentions: Sequence[Attention],
    rope: Rope,
    *,
    norms: Literal["before", "after"] = "before",
    cast_late: bool = False,
    mlp_bias: bool = False,
    embedding_scale: float = 1.0,
    residual_scale: float = 1.0,
    logit_scale: float = 1.0,
) -> DecoderProgram:
    """The whole decoder.

    Args:
        attentions: one a layer. rope: the rotation of those layers that have one; it says how long a text may be.
        norms: x + op(norm(x)) (Llama), or x + norm(op(x)) (OLMo 2).
    """
    norm = Norm("rms", sizes.hidden_size, sizes.norm_eps, cast_late=cast_late)
    feed_forward = FeedForward(sizes.hidden_size, sizes.intermediate_size, sizes.activation, bias=mlp_bias)

    def branch(name: str, op: Attention | FeedForward) -> Branch:
        part = Part(name, op, norm_in=norm) if norms == "before" else Part(name, op, norm_out=norm)
        return Branch((part,), residual_scale)

    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size, scale=embedding_scale),
        layers=tuple(Layer((branch("attn", op), branch("mlp", feed_forward))) for op in attentions),
        final_norm=norm,
        head=Head(tied=sizes.tied, scale=logit_scale),
        slots=tuple(
            KVSlot(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim, window=op.spec.mask.window) for op in attentions
        ),
        max_seq_len=stretched(rope),
    )
