"""The shape that both share: learned positions, then attention and a plain feed-forward with a norm before each."""

from __future__ import annotations

from collections.abc import Sequence

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
from pluglm_arch_gpt2.sizes import Sizes


def decoder(sizes: Sizes, scales: Sequence[float], *, num_kv_heads: int) -> DecoderProgram:
    """The whole decoder. scales: the factor on q·k of each layer.

    A text is at most as long as the table of positions: there is no vector for a position beyond.
    """
    norm = Norm("layer", sizes.hidden_size, sizes.norm_eps, bias=True)
    feed_forward = FeedForward(
        sizes.hidden_size, sizes.intermediate_size, sizes.activation, gated=False, bias=True
    )  # fmt: skip

    def attention(layer: int) -> Attention:
        D = sizes.head_dim
        spec = AttentionSpec(sizes.num_heads, num_kv_heads, head_dim=D, v_head_dim=D, scale=scales[layer])
        return Attention(spec, slot=layer, q_bias=True, k_bias=True, v_bias=True, o_bias=True)

    def layer(i: int) -> Layer:
        return Layer((Branch((Part("attn", attention(i), norm),)), Branch((Part("mlp", feed_forward, norm),))))

    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size, learned_positions=sizes.max_positions),
        layers=tuple(layer(i) for i in range(sizes.num_layers)),
        final_norm=norm,
        head=Head(tied=sizes.tied),
        slots=tuple(KVSlot(num_kv_heads, sizes.head_dim, sizes.head_dim) for _ in scales),
        max_seq_len=sizes.max_positions,
    )
