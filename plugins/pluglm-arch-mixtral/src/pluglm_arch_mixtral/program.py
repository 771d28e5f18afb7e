"""The shape that both families share: attention, then experts or one feed-forward, each after a norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pluglm_blocks.reading import Sizes, stretched

from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    Embedding,
    Experts,
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
    sizes: Sizes, rope: Rope, window: int | None, *, bias: bool = False, qk_norm: Norm | None = None
) -> Attention:
    """Grouped-query attention of every layer, in the slot of the first. bias: of all four projections."""
    spec = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        v_head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        mask=MaskSpec(window=window),
    )
    return Attention(spec, 0, rope, q_bias=bias, k_bias=bias, v_bias=bias, o_bias=bias, qk_norm=qk_norm)


def decoder(sizes: Sizes, attn: Attention, mlps: Sequence[Experts | FeedForward]) -> DecoderProgram:
    """The whole decoder: x + op(norm(x)) twice a layer. mlps: one a layer."""
    norm = Norm("rms", sizes.hidden_size, sizes.norm_eps)
    assert attn.rope is not None, "both families rotate all layers"
    slot = KVSlot(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim, window=attn.spec.mask.window)
    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size),
        layers=tuple(
            Layer((Branch((Part("attn", replace(attn, slot=i), norm_in=norm),)), Branch((Part("mlp", mlp, norm),))))
            for i, mlp in enumerate(mlps)
        ),
        final_norm=norm,
        head=Head(tied=sizes.tied),
        slots=(slot,) * len(mlps),
        max_seq_len=stretched(attn.rope),
    )
