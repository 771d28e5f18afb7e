"""The shape that the generations share: attention and a gated feed-forward, their norms, and scaled embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pluglm_blocks.reading import Sizes

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


def norm(size: int, eps: float) -> Norm:
    """Gemma's: the weight is stored less one, and multiplied before rounding."""
    return Norm("rms", size, eps, offset=1.0, cast_late=True)


def attention(
    sizes: Sizes,
    layer: int,
    *,
    rope: Rope,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: bool = False,
    qk_norm: Norm | None = None,
) -> Attention:
    """Grouped-query attention of one layer, in the slot of that number. bias: of all four projections."""
    spec = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        v_head_dim=sizes.head_dim,
        scale=scale,
        mask=MaskSpec(window=window),
        softcap=softcap,
    )
    return Attention(
        spec, slot=layer, rope=rope, q_bias=bias, k_bias=bias, v_bias=bias, o_bias=bias, qk_norm=qk_norm
    )  # fmt: skip


def decoder(
    sizes: Sizes,
    attentions: Sequence[Attention],
    *,
    max_seq_len: int,
    norms: Literal["before", "around"],
    softcap: float | None = None,
) -> DecoderProgram:
    """The whole decoder.

    Args:
        attentions: one a layer.
        norms: x + op(norm(x)) (Gemma), or x + norm(op(norm(x))) (Gemma 2 and 3). softcap: of the logits.
    """
    each = norm(sizes.hidden_size, sizes.norm_eps)
    feed_forward = FeedForward(sizes.hidden_size, sizes.intermediate_size, sizes.activation)

    def branch(name: str, op: Attention | FeedForward) -> Branch:
        return Branch((Part(name, op, norm_in=each, norm_out=each if norms == "around" else None),))

    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size, scale=sizes.hidden_size**0.5),
        layers=tuple(Layer((branch("attn", op), branch("mlp", feed_forward))) for op in attentions),
        final_norm=each,
        head=Head(tied=sizes.tied, softcap=softcap),
        slots=tuple(
            KVSlot(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim, window=op.spec.mask.window) for op in attentions
        ),
        max_seq_len=max_seq_len,
    )
