"""Falcon's layers as a program: both parts in one residual branch, or one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
    Norm,
    Part,
    Rope,
)
from pluglm.contracts.program import Activation

#: "two": x + attn(norm_a(x)) + mlp(norm_b(x)); "shared": the same with one norm; "sequential": one branch each.
Norms = Literal["two", "shared", "sequential"]


@dataclass(frozen=True)
class Sizes:
    """In the program's names. bias: projections have one; norms always do."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    norm_eps: float
    activation: Activation
    bias: bool
    tied: bool

    @property
    def head_dim(self) -> int:
        """Exact: the reader has refused the rest."""
        return self.hidden_size // self.num_heads


def decoder(
    sizes: Sizes,
    norms: Norms,
    *,
    rope: Rope | None = None,
    slopes: tuple[float, ...] | None = None,
    max_seq_len: int,
) -> DecoderProgram:
    """The whole decoder. rope, slopes: one of the two says where a key stands; slopes are those of scaled scores."""
    D, bias = sizes.head_dim, sizes.bias
    norm = Norm("layer", sizes.hidden_size, sizes.norm_eps, bias=True)
    spec = AttentionSpec(
        sizes.num_heads, sizes.num_kv_heads, head_dim=D, v_head_dim=D, scale=D**-0.5, alibi_slopes=slopes
    )  # fmt: skip
    feed_forward = FeedForward(
        sizes.hidden_size, sizes.intermediate_size, sizes.activation, gated=False, bias=bias
    )  # fmt: skip

    def layer(i: int) -> Layer:
        op = Attention(spec, slot=i, rope=rope, q_bias=bias, k_bias=bias, v_bias=bias, o_bias=bias)
        attention = Part("attn", op, norm_in=norm)
        if norms == "sequential":
            return Layer((Branch((attention,)), Branch((Part("mlp", feed_forward, norm_in=norm),))))
        if norms == "shared":
            return Layer((Branch((attention, Part("mlp", feed_forward, share_norm_in=True))),))
        return Layer((Branch((attention, Part("mlp", feed_forward, norm_in=norm))),))

    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size),
        layers=tuple(layer(i) for i in range(sizes.num_layers)),
        final_norm=norm,
        head=Head(tied=sizes.tied),
        slots=(KVSlot(sizes.num_kv_heads, D, D),) * sizes.num_layers,
        max_seq_len=max_seq_len,
    )
