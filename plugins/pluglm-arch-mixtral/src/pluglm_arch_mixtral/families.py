"""One function a model type: config -> `DecoderProgram`. What differs between the families is what stands here.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from pluglm_blocks.reading import (
    Config,
    Family,
    Sizes,
    positive,
    read_rope,
    read_sizes,
    refuse,
    sliding_window,
    window_or_none,
)

from pluglm.contracts import DecoderProgram, Experts, FeedForward, Norm
from pluglm_arch_mixtral.program import attention, decoder
from pluglm_arch_mixtral.weights import mixtral_weights, qwen3_moe_weights


def mixtral(reader: Config) -> DecoderProgram:
    """Mixtral (Jiang et al. 2024): experts in every layer, one window for all layers or none."""
    sizes = read_sizes(reader, num_kv_heads=8)
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions, theta=1_000_000.0)
    experts = _experts(reader, sizes, sizes.intermediate_size, normalise=True)
    return decoder(sizes, attention(sizes, rope, window_or_none(reader, default=None)), [experts] * sizes.num_layers)


def qwen3_moe(reader: Config) -> DecoderProgram:
    """Qwen 3 MoE (Yang et al. 2025): experts on chosen layers, a norm on each head of q and k."""
    sizes = read_sizes(reader, num_kv_heads=4)
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    reader.ignore("max_window_layers", "the reference gives the window to all layers")
    attn = attention(
        sizes, rope, sliding_window(reader, default=4096),
        bias=reader.take("attention_bias", bool, False), qk_norm=Norm("rms", sizes.head_dim, sizes.norm_eps),
    )  # fmt: skip
    experts = _experts(
        reader, sizes, positive(reader, "moe_intermediate_size"),
        normalise=reader.take("norm_topk_prob", bool, False),
    )  # fmt: skip
    dense = FeedForward(sizes.hidden_size, sizes.intermediate_size, sizes.activation)
    return decoder(sizes, attn, [experts if sparse else dense for sparse in _sparse_layers(reader, sizes.num_layers)])


FAMILIES: dict[str, Family] = {
    "mixtral": Family(mixtral, mixtral_weights, bos=1, eos=2),
    "qwen3_moe": Family(qwen3_moe, qwen3_moe_weights),
}


def _experts(reader: Config, sizes: Sizes, intermediate_size: int, *, normalise: bool) -> Experts:
    """Softmax over all experts, the best of them for each token."""
    num_experts, top_k = _num_experts(reader), positive(reader, "num_experts_per_tok")
    if top_k > num_experts:
        what = f"The config gives each token {top_k} of {num_experts} experts."
        refuse("num_experts_per_tok", what, "Expected at most as many as there are.")
    expert = FeedForward(sizes.hidden_size, intermediate_size, sizes.activation)
    return Experts(expert, num_experts, top_k, normalise=normalise)


def _num_experts(reader: Config) -> int:
    """`num_local_experts`, or `num_experts`: one thing, which Transformers 4 and 5 spell differently for Qwen."""
    keys = [key for key in ("num_local_experts", "num_experts") if key in reader] or ["num_local_experts"]
    said = [positive(reader, key) for key in keys]
    if said[0] != said[-1]:
        what = f"The config has num_local_experts = {said[0]} and num_experts = {said[-1]}."
        refuse("num_experts", what, "They mean one thing.")
    return said[0]


def _sparse_layers(reader: Config, num_layers: int) -> list[bool]:
    """Qwen's rule: every n-th layer has experts, without those of `mlp_only_layers`."""
    step = positive(reader, "decoder_sparse_step", 1)
    dense = reader.take("mlp_only_layers", list, [])
    if any(type(i) is not int or not 0 <= i < num_layers for i in dense):
        what = f"The config's mlp_only_layers is {dense}."
        refuse("mlp_only_layers", what, f"Expected numbers of layers, from 0 to {num_layers - 1}.")
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers)]
