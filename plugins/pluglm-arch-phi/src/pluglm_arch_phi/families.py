"""One function a model type: config -> `DecoderProgram`. The two share a name, not an architecture.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from pluglm_blocks.reading import Config, Family, Sizes, read_rope, read_sizes, stretched, window_or_none

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
from pluglm_arch_phi.weights import phi3_weight_map, phi_weight_map

#: Methods of stretching that go with the rotation of a part of each head; "proportional" is another way to say that.
PHI_METHODS = {name: name for name in ("default", "linear", "dynamic", "yarn", "longrope", "llama3")}
#: "su" is what the first files of Phi-3 call longrope. Their "yarn" has no one meaning, see the README.
PHI3_METHODS = {"default": "default", "longrope": "longrope", "su": "longrope"}


def phi(reader: Config) -> DecoderProgram:
    """Phi-1, 1.5 and 2 (Gunasekar et al. 2023; Li et al. 2023): x + attention(norm(x)) + feed_forward(norm(x))."""
    sizes = read_sizes(reader, norm_eps="layer_norm_eps")
    rope = read_rope(
        reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions, partial=0.5, methods=PHI_METHODS
    )
    norm = Norm("layer", sizes.hidden_size, sizes.norm_eps, bias=True)
    qk_norm = None
    if reader.take("qk_layernorm", bool, False):
        qk_norm = Norm("layer", sizes.head_dim, sizes.norm_eps, bias=True)
    feed_forward = FeedForward(
        sizes.hidden_size, sizes.intermediate_size, sizes.activation, gated=False, bias=True
    )  # fmt: skip

    def layer(i: int) -> Layer:
        attn = Part("attn", _attention(sizes, i, rope, bias=True, qk_norm=qk_norm), norm_in=norm)
        return Layer((Branch((attn, Part("mlp", feed_forward, share_norm_in=True))),))

    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size),
        layers=tuple(layer(i) for i in range(sizes.num_layers)),
        final_norm=norm,
        head=Head(tied=sizes.tied, bias=True),
        slots=_slots(sizes, window=None),
        max_seq_len=stretched(rope),
    )


def phi3(reader: Config) -> DecoderProgram:
    """Phi-3 to Phi-4-mini (Abdin et al. 2024): Llama's layer, one window for all layers, longrope for long texts."""
    sizes = read_sizes(reader)
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        reader.expect(key, False, "no projection of this architecture has a bias.")
    for key in ("full_attn_mod", "interpolate_factor"):
        reader.expect(key, 1, "the reference does not read it; published files have this value.")
    rope = read_rope(
        reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions, partial=1.0, length=4096,
        methods=PHI3_METHODS,
    )  # fmt: skip
    window = window_or_none(reader, default=None)
    norm = Norm("rms", sizes.hidden_size, sizes.norm_eps)
    feed_forward = FeedForward(sizes.hidden_size, sizes.intermediate_size, sizes.activation)

    def layer(i: int) -> Layer:
        attn = Part("attn", _attention(sizes, i, rope, window=window), norm_in=norm)
        return Layer((Branch((attn,)), Branch((Part("mlp", feed_forward, norm_in=norm),))))

    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size),
        layers=tuple(layer(i) for i in range(sizes.num_layers)),
        final_norm=norm,
        head=Head(tied=sizes.tied),
        slots=_slots(sizes, window),
        max_seq_len=stretched(rope),
    )


FAMILIES: dict[str, Family] = {
    "phi": Family(phi, phi_weight_map, bos=1, eos=2),
    "phi3": Family(phi3, phi3_weight_map, bos=1, eos=32_000, pad=32_000),
}


def _attention(
    sizes: Sizes, layer: int, rope: Rope, *, window: int | None = None, bias: bool = False, qk_norm: Norm | None = None
) -> Attention:
    """Grouped-query attention of one layer, in the slot of that number. bias: of all four projections."""
    spec = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        v_head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        mask=MaskSpec(window=window),
    )
    return Attention(
        spec, slot=layer, rope=rope, q_bias=bias, k_bias=bias, v_bias=bias, o_bias=bias, qk_norm=qk_norm
    )  # fmt: skip


def _slots(sizes: Sizes, window: int | None) -> tuple[KVSlot, ...]:
    return (KVSlot(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim, window=window),) * sizes.num_layers
