"""One function a model type: config -> `DecoderProgram`. What differs between the two is what stands here.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from dataclasses import replace

from pluglm_blocks.reading import Config, Family, positive

from pluglm.contracts import DecoderProgram, FeedForward
from pluglm_arch_deepseek.program import decoder
from pluglm_arch_deepseek.reading import read_dense_layers, read_experts, read_latent_attention
from pluglm_arch_deepseek.weights import weight_map


def deepseek_v2(reader: Config) -> DecoderProgram:
    """DeepSeek V2 (DeepSeek-AI 2024): experts are chosen by their softmax, from the best groups or from all."""
    sizes, attention = read_latent_attention(reader, interleaved=True)
    bias = reader.take("mlp_bias", bool, False)
    dense = FeedForward(sizes.hidden_size, sizes.intermediate_size, sizes.activation, bias=bias)
    reader.expect("scoring_func", "softmax", "this model type weighs experts by the softmax of their scores.")
    reader.expect("norm_topk_prob", False, "the reference leaves the chosen weights as they are.")
    experts = replace(read_experts(reader, dense, num_shared=2, scale=1.0), normalise=False)
    if reader.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") == "greedy":
        reader.ignore("n_group", "topk_method is greedy: experts are chosen from all groups")
        reader.ignore("topk_group", "topk_method is greedy: experts are chosen from all groups")
    else:
        groups, best = positive(reader, "n_group"), positive(reader, "topk_group")
        experts = replace(experts, num_groups=groups, top_k_groups=best)
    return decoder(sizes, attention, dense, experts, dense_layers=read_dense_layers(reader, default=0))


def deepseek_v3(reader: Config) -> DecoderProgram:
    """DeepSeek V3 (DeepSeek-AI 2024): experts are chosen by corrected sigmoids, from the best groups."""
    interleaved = bool(reader.take("rope_interleave", bool, True))
    sizes, attention = read_latent_attention(reader, interleaved=interleaved)
    dense = FeedForward(sizes.hidden_size, sizes.intermediate_size, sizes.activation)
    reader.expect("scoring_func", "sigmoid", "this model type weighs experts by the sigmoid of their scores.")
    reader.expect("topk_method", "noaux_tc", "this model type chooses by corrected scores, from the best groups.")
    # The weights of one such layer are ignored, see `weights.FURTHER_LAYER`.
    reader.choice("num_nextn_predict_layers", (0, 1), 1)
    experts = replace(
        read_experts(reader, dense, num_shared=1, scale=2.5),
        scoring="sigmoid",
        correction_bias=True,
        normalise=bool(reader.take("norm_topk_prob", bool, True)),
        num_groups=positive(reader, "n_group", 8),
        top_k_groups=positive(reader, "topk_group", 4),
    )
    return decoder(sizes, attention, dense, experts, dense_layers=read_dense_layers(reader, default=3))


FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(deepseek_v2, weight_map, bos=1, eos=2),
    "deepseek_v3": Family(deepseek_v3, weight_map, bos=0, eos=1),
}
