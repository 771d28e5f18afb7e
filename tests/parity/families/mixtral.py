"""Checkpoints of `pluglm-arch-mixtral`, in both layouts of experts."""

from __future__ import annotations

from dataclasses import replace

from checkpoints import LINEAR, LLAMA3, YARN, Variant, longrope, rotary

#: The layout in which Transformers 5 holds a model: all experts of a layer in one tensor.
FUSED = {"save_original_format": False}

VARIANTS: dict[str, Variant] = {
    "mixtral-window": rotary(
        "mixtral", LINEAR,
        {"head_dim": 10, "sliding_window": 13, "num_local_experts": 5, "num_experts_per_tok": 2}, v4=True,
    ),
    "mixtral-fused": replace(
        rotary(
            "mixtral", longrope(4),
            {
                "head_dim": 8, "num_key_value_heads": 3, "num_local_experts": 7, "num_experts_per_tok": 3,
                "hidden_act": "gelu",
            },
            tied=True,
        ),
        save=FUSED,
    ),
    "qwen3-moe-window": rotary(
        "qwen3_moe", YARN,
        {
            "head_dim": 10, "attention_bias": True, "num_hidden_layers": 4, "use_sliding_window": True,
            "sliding_window": 11, "decoder_sparse_step": 2, "moe_intermediate_size": 28, "num_experts": 7,
            "num_experts_per_tok": 3, "norm_topk_prob": True,
        },
    ),
    "qwen3-moe-fused": replace(
        rotary(
            "qwen3_moe", LLAMA3,
            {
                "num_key_value_heads": 3, "mlp_only_layers": [1], "moe_intermediate_size": 36, "num_experts": 6,
                "num_experts_per_tok": 2, "norm_topk_prob": False,
            },
            tied=True, v4=True,
        ),
        save=FUSED,
    ),
}  # fmt: skip
