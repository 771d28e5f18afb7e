"""What both model types read alike: latent attention and the mixture of experts, without how experts are chosen."""

from __future__ import annotations

import math
from typing import Any

from pluglm_blocks.reading import Config, Sizes, positive, read_rope, read_sizes, refuse

from pluglm.contracts import AttentionSpec, Experts, FeedForward, LatentAttention, Rope

#: Of the norms on the latents. The reference builds these with its default; `rms_norm_eps` is of the others.
LATENT_NORM_EPS = 1e-6

_TRAINING = {
    "aux_loss_alpha": "weighs a loss of the training",
    "seq_aux": "says over what a loss of the training was taken",
    "ep_size": "says over how many devices the experts were spread in training",
    "output_router_logits": "asks for the router's scores beside the logits; the logits are the same",
}


def read_latent_attention(reader: Config, *, interleaved: bool) -> tuple[Sizes, LatentAttention]:
    """The sizes, and the attention of every layer, with slot 0. interleaved: how rotary dimensions are paired."""
    rope_dim = positive(reader, "qk_rope_head_dim")
    sizes = read_sizes(reader, head_dim=rope_dim)
    if sizes.head_dim != rope_dim:
        what = f"The config has a head_dim of {sizes.head_dim} and a qk_rope_head_dim of {rope_dim}."
        refuse("head_dim", what, "In these files head_dim repeats the rotated part of a head.")
    if sizes.num_kv_heads != sizes.num_heads:
        what = f"The config has {sizes.num_kv_heads} key-value heads for {sizes.num_heads} heads."
        refuse("num_key_value_heads", what, "Each head has keys and values of its own, expanded from the latents.")
    nope_dim = positive(reader, "qk_nope_head_dim")
    head_dim = nope_dim + rope_dim
    reader.expect("qk_head_dim", head_dim, "it is the sum of qk_nope_head_dim and qk_rope_head_dim.")
    rope = read_rope(reader, head_dim=rope_dim, max_positions=sizes.max_positions, interleaved=interleaved)
    spec = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_heads,
        head_dim=head_dim,
        v_head_dim=positive(reader, "v_head_dim"),
        scale=head_dim**-0.5 * _temperature(rope) ** 2,
    )
    q_rank = reader.nullable("q_lora_rank", int, 1536)
    return sizes, LatentAttention(
        spec,
        slot=0,
        nope_dim=nope_dim,
        rope=rope,
        q_rank=None if q_rank is None else positive(reader, "q_lora_rank", q_rank),
        kv_rank=positive(reader, "kv_lora_rank"),
        norm_eps=LATENT_NORM_EPS,
        bias=bool(reader.take("attention_bias", bool, False)),
    )


def read_experts(reader: Config, dense: FeedForward, *, num_shared: int, scale: float) -> Experts:
    """The mixture of a layer: softmax over all experts, no groups.

    Args:
        dense: the feed-forward of a layer without experts; the shared experts, one of their common size, are like it.
        num_shared, scale: `n_shared_experts` and `routed_scaling_factor` where the file has none.
    """
    for key, reason in _TRAINING.items():
        reader.ignore(key, reason)
    reader.expect("moe_layer_freq", 1, "all layers after the dense ones are mixtures.")
    size, num_shared = positive(reader, "moe_intermediate_size"), positive(reader, "n_shared_experts", num_shared)
    return Experts(
        FeedForward(dense.hidden_size, size, dense.activation),
        num_experts=positive(reader, "n_routed_experts"),
        top_k=positive(reader, "num_experts_per_tok"),
        scale=float(reader.take("routed_scaling_factor", float, scale)),
        shared=FeedForward(dense.hidden_size, size * num_shared, dense.activation, bias=dense.bias),
    )


def read_dense_layers(reader: Config, *, default: int) -> int:
    """`first_k_dense_replace`: how many layers from the first one on have no experts."""
    count = int(reader.take("first_k_dense_replace", int, default))
    if count < 0:
        refuse("first_k_dense_replace", f"The config has {count} layers without experts.", "Expected 0 or more.")
    return count


def _temperature(rope: Rope) -> float:
    """What stretched positions put on q and on k beside the factor on cos and sin: YaRN's, where mscale_all_dim is set.

    0.1 · mscale_all_dim · ln(factor) + 1 (Peng et al. 2023, "YaRN", section 3.4, with DeepSeek-V2's mscale_all_dim).
    """
    numbers: dict[str, Any] = dict(rope.parameters)
    factor, mscale = numbers.get("factor", 1.0), numbers.get("mscale_all_dim", 0.0)
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
