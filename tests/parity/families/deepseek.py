"""Checkpoints of `pluglm-arch-deepseek`, and the knobs of latent attention and of groups of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from checkpoints import LINEAR, LLAMA3, SIZES, YARN, Variant
from rewriting import Knob, field, on
from torch import Tensor

from pluglm.contracts import Experts, LatentAttention

#: Neither size equals another. A short piece after a long one is computed over latents, a prompt over keys and values.
LATENTS = {
    "num_key_value_heads": 6, "kv_lora_rank": 20, "q_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 14, "moe_intermediate_size": 28, "n_routed_experts": 12, "num_experts_per_tok": 3,
    "max_position_embeddings": 120,
}  # fmt: skip
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
MSCALE = {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}


def _corrected(key: str, noise: Tensor) -> Tensor | None:
    """The bias of the choice: as large as the scores, which are sigmoids."""
    return 0.3 * noise if key.endswith("e_score_correction_bias") else None


def _variant(model_type: str, rope: dict[str, Any], *, v4: bool = False, seed: int = 0, **settings: Any) -> Variant:
    wanted = {**SIZES, **LATENTS, "rope_parameters": dict(rope), **settings}
    return Variant(model_type, wanted, v4, seed, scale=_corrected)


VARIANTS: dict[str, Variant] = {
    "deepseek-v3-yarn": _variant(
        "deepseek_v3", MSCALE, seed=1, attention_bias=True, first_k_dense_replace=1, n_shared_experts=2,
        routed_scaling_factor=1.7, **GROUPS,
    ),
    "deepseek-v3-full-queries": _variant(
        "deepseek_v3", LINEAR, v4=True, q_lora_rank=None, attention_bias=True, rope_interleave=False,
        first_k_dense_replace=0, norm_topk_prob=False, n_group=1, topk_group=1, qk_nope_head_dim=14,
        routed_scaling_factor=0.6, hidden_act="gelu", tie_word_embeddings=True,
    ),
    "deepseek-v2-groups": _variant(
        "deepseek_v2", MSCALE, v4=True, first_k_dense_replace=2, n_shared_experts=1, mlp_bias=True,
        routed_scaling_factor=2.3, topk_method="group_limited_greedy", **GROUPS,
    ),
    "deepseek-v2-greedy": replace(
        _variant(
            "deepseek_v2", LLAMA3, q_lora_rank=None, topk_method="greedy", first_k_dense_replace=1, kv_lora_rank=10,
            routed_scaling_factor=1.4,
        ),
        save={"save_original_format": False},  # all experts of a layer in one tensor
    ),
}  # fmt: skip


def _where(condition: Any, **changes: Any) -> Knob:
    """Change what a mixture has, where it has it."""
    return on(Experts, lambda op: replace(op, **changes) if condition(op) else op)


OTHER_SCORING = {"sigmoid": "softmax", "softmax": "sigmoid"}
KNOBS: dict[str, Knob] = {
    "latent.norm_eps": field(LatentAttention, "norm_eps", lambda _: 0.05),
    "latent.bias": field(LatentAttention, "bias", lambda _: False),
    "latent.rope.interleaved": on(
        LatentAttention, lambda op: replace(op, rope=replace(op.rope, interleaved=not op.rope.interleaved))
    ),
    "experts.scoring": on(Experts, lambda op: replace(op, scoring=OTHER_SCORING.get(op.scoring, op.scoring))),
    "experts.normalise": on(
        Experts, lambda op: op if op.scoring == "softmax_topk" else replace(op, normalise=not op.normalise)
    ),
    "experts.scale": field(Experts, "scale", lambda scale: scale * 1.1),
    "experts.top_k": on(Experts, lambda op: replace(op, top_k=op.top_k - 1) if op.top_k > 1 else op),
    "experts.correction_bias": _where(lambda op: op.correction_bias, correction_bias=False),
    "experts.num_groups": _where(lambda op: op.num_groups > 1, num_groups=1, top_k_groups=1),
    "experts.top_k_groups": on(
        Experts, lambda op: replace(op, top_k_groups=op.top_k_groups + 1) if op.top_k_groups < op.num_groups else op
    ),
    "experts.shared": field(Experts, "shared", lambda _: None),
}
NOT_BROKEN = {
    "LatentAttention.slot": "names a place", "LatentAttention.op": "names a class", "Experts.op": "names a class",
    "LatentAttention.nope_dim": "another size does not load", "LatentAttention.q_rank": "another size does not load",
    "LatentAttention.kv_rank": "another size does not load", "Rope.dim": "of latent attention does not load otherwise",
    "LatentSlot.latent_dim": "sizes of the cache", "LatentSlot.rope_dim": "sizes of the cache",
    "LatentSlot.kind": "names a class", "Experts.num_experts": "another size does not load",
}  # fmt: skip
