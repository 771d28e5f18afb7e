"""The shape that both share: attention with linear biases, then a plain feed-forward, a layer norm before each."""

from __future__ import annotations

from dataclasses import dataclass

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
)
from pluglm.contracts.program import Activation


@dataclass(frozen=True)
class Sizes:
    """In the program's names. Both are four times as wide inside the feed-forward, and each head has its own keys.

    max_seq_len: None: nothing in the file says it; the biases know no limit.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_seq_len: int | None
    norm_eps: float
    tied: bool

    @property
    def head_dim(self) -> int:
        """Exact: the readers have refused the rest."""
        return self.hidden_size // self.num_heads


def decoder(
    sizes: Sizes,
    slopes: tuple[float, ...],
    *,
    activation: Activation,
    bias: bool,
    scale: float | None = None,
    embedding_norm: bool = False,
    qkv_clip: float | None = None,
) -> DecoderProgram:
    """The whole decoder.

    Args:
        slopes: of the linear biases, one a head. bias: norms and projections have one.
        scale: factor on q·k; None: head_dim ** -0.5. The biases are added to the scaled scores as they are.
    """
    H, D = sizes.num_heads, sizes.head_dim
    norm = Norm("layer", sizes.hidden_size, sizes.norm_eps, bias=bias)
    spec = AttentionSpec(
        H, H, head_dim=D, v_head_dim=D, scale=D**-0.5 if scale is None else scale, alibi_slopes=slopes
    )  # fmt: skip
    feed_forward = FeedForward(sizes.hidden_size, 4 * sizes.hidden_size, activation, gated=False, bias=bias)

    def layer(i: int) -> Layer:
        attention = Attention(
            spec, slot=i, q_bias=bias, k_bias=bias, v_bias=bias, o_bias=bias, qkv_clip=qkv_clip
        )  # fmt: skip
        return Layer((Branch((Part("attn", attention, norm),)), Branch((Part("mlp", feed_forward, norm),))))

    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size, norm=norm if embedding_norm else None),
        layers=tuple(layer(i) for i in range(sizes.num_layers)),
        final_norm=norm,
        head=Head(tied=sizes.tied),
        slots=(KVSlot(H, D, D),) * sizes.num_layers,
        max_seq_len=sizes.max_seq_len,
    )
