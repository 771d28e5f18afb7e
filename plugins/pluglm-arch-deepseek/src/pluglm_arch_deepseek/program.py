"""The decoder that both model types share: latent attention, then a feed-forward or a mixture, each with one norm."""

from __future__ import annotations

from dataclasses import replace

from pluglm_blocks.reading import Sizes, stretched

from pluglm.contracts import (
    Branch,
    DecoderProgram,
    Embedding,
    Experts,
    FeedForward,
    Head,
    LatentAttention,
    LatentSlot,
    Layer,
    Norm,
    Part,
)


def decoder(
    sizes: Sizes, attention: LatentAttention, dense: FeedForward, experts: Experts, *, dense_layers: int
) -> DecoderProgram:
    """x + op(norm(x)) twice a layer. dense_layers: how many, from the first one on, have no experts."""
    norm = Norm("rms", sizes.hidden_size, sizes.norm_eps)

    def layer(i: int) -> Layer:
        mlp = dense if i < dense_layers else experts
        parts = Part("attn", replace(attention, slot=i), norm_in=norm), Part("mlp", mlp, norm_in=norm)
        return Layer(tuple(Branch((part,)) for part in parts))

    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size),
        layers=tuple(layer(i) for i in range(sizes.num_layers)),
        final_norm=norm,
        head=Head(tied=sizes.tied),
        slots=(LatentSlot(attention.kv_rank, attention.rope.dim),) * sizes.num_layers,
        max_seq_len=stretched(attention.rope),
    )
