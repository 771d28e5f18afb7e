"""Checkpoints of `pluglm-arch-llama`."""

from __future__ import annotations

from checkpoints import BEFORE, DYNAMIC, LINEAR, LLAMA3, PROPORTIONAL, YARN, Variant, longrope, rotary


def _hybrid(first: str, second: str) -> list[str]:
    return [f"{kind}_attention" for kind in (first, second, first, second)]


VARIANTS: dict[str, Variant] = {
    "llama-linear": rotary("llama", LINEAR, {"head_dim": 10, "attention_bias": True, "mlp_bias": True}, tied=True),
    "llama-llama3": rotary("llama", LLAMA3, {"num_key_value_heads": 3, "hidden_act": "gelu_pytorch_tanh"}, v4=True),
    "llama-dynamic": rotary("llama", DYNAMIC, {"head_dim": 10}, max_positions=BEFORE),
    "llama-proportional": rotary("llama", PROPORTIONAL, {"head_dim": 10, "hidden_act": "relu"}),
    "mistral-window": rotary("mistral", YARN, {"head_dim": 10, "sliding_window": 13}, v4=True),
    "mistral-full": rotary("mistral", longrope(4), {"sliding_window": None}, tied=True),
    "qwen2-window": rotary(
        "qwen2", LINEAR,
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2}, v4=True,
    ),
    "qwen2-full": rotary("qwen2", {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}, tied=True),
    "qwen3-window": rotary(
        "qwen3", longrope(5),
        {
            "head_dim": 10, "attention_bias": True, "num_hidden_layers": 4, "use_sliding_window": True,
            "sliding_window": 9, "layer_types": _hybrid("full", "sliding"),
        },
    ),
    "qwen3-full": rotary("qwen3", YARN, {"head_dim": 10, "num_key_value_heads": 3}, tied=True, v4=True),
    "smollm3-window": rotary(
        "smollm3", LLAMA3,
        {
            "num_hidden_layers": 4, "no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": 12,
            "layer_types": _hybrid("sliding", "full"),
        },
    ),
    "smollm3-full": rotary(
        "smollm3", LINEAR, {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}, tied=True, v4=True,
    ),
    "olmo2-biases": rotary("olmo2", YARN, {"attention_bias": True, "num_key_value_heads": 3}),
    "olmo2-tied": rotary("olmo2", DYNAMIC, tied=True, v4=True, max_positions=BEFORE),
    "granite-biases": rotary(
        "granite", LLAMA3,
        {
            "attention_bias": True, "mlp_bias": True, "embedding_multiplier": 1.7, "residual_multiplier": 0.6,
            "attention_multiplier": 0.21, "logits_scaling": 1.9,
        },
    ),
    "granite-tied": rotary(
        "granite", longrope(4),
        {
            "embedding_multiplier": 0.8, "residual_multiplier": 0.9, "attention_multiplier": 0.5, "logits_scaling": 0.7,
            "num_key_value_heads": 3, "hidden_act": "gelu",
        },
        tied=True,
    ),
}  # fmt: skip
