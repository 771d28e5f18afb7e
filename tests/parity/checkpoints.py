"""Tiny random checkpoints, written by Transformers, in which every knob of a model type is turned to an odd value.

Sizes differ from each other, biases and norms are random, rotary positions are stretched and windows are shorter than
the sequences, so that a part which is left out, swapped or computed otherwise cannot hide.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

#: Lengths before stretching are far below the 90 or so positions that the tests run.
BEFORE = 24
LINEAR = {"rope_type": "linear", "rope_theta": 200.0, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 150.0, "factor": 5.0}
#: With these, the ramp between kept and interpolated pairs starts and ends inside a head of 8 or 10 dimensions.
YARN = {
    "rope_type": "yarn", "rope_theta": 20.0, "factor": 5.0, "original_max_position_embeddings": BEFORE,
    "beta_fast": 1.2, "beta_slow": 0.4,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 400.0, "factor": 5.0, "original_max_position_embeddings": BEFORE,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 250.0, "factor": 2.0, "partial_rotary_factor": 0.6}


def longrope(pairs: int) -> dict[str, Any]:
    """Short and long factors for heads of 2 × pairs dimensions."""
    return {
        "rope_type": "longrope", "rope_theta": 350.0, "original_max_position_embeddings": BEFORE, "factor": 5.0,
        "short_factor": [1.0 + 0.2 * i for i in range(pairs)], "long_factor": [1.5 + 0.7 * i for i in range(pairs)],
    }  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One checkpoint. v4: its config is rewritten as Transformers 4 spelled rotary positions."""

    model_type: str
    rope: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    v4: bool = False
    max_positions: int = 120


def _hybrid(first: str, second: str) -> list[str]:
    return [f"{kind}_attention" for kind in (first, second, first, second)]


VARIANTS: dict[str, Variant] = {
    "llama-linear": Variant("llama", LINEAR, {"head_dim": 10, "attention_bias": True, "mlp_bias": True}, tied=True),
    "llama-llama3": Variant("llama", LLAMA3, {"num_key_value_heads": 3, "hidden_act": "gelu_pytorch_tanh"}, v4=True),
    "llama-dynamic": Variant("llama", DYNAMIC, {"head_dim": 10}, max_positions=BEFORE),
    "llama-proportional": Variant("llama", PROPORTIONAL, {"head_dim": 10, "hidden_act": "relu"}),
    "mistral-window": Variant("mistral", YARN, {"head_dim": 10, "sliding_window": 13}, v4=True),
    "mistral-full": Variant("mistral", longrope(4), {"sliding_window": None}, tied=True),
    "qwen2-window": Variant(
        "qwen2", LINEAR,
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2}, v4=True,
    ),
    "qwen2-full": Variant("qwen2", {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}, tied=True),
    "qwen3-window": Variant(
        "qwen3", longrope(5),
        {
            "head_dim": 10, "attention_bias": True, "num_hidden_layers": 4, "use_sliding_window": True,
            "sliding_window": 9, "layer_types": _hybrid("full", "sliding"),
        },
    ),
    "qwen3-full": Variant("qwen3", YARN, {"head_dim": 10, "num_key_value_heads": 3}, tied=True, v4=True),
    "smollm3-window": Variant(
        "smollm3", LLAMA3,
        {
            "num_hidden_layers": 4, "no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": 12,
            "layer_types": _hybrid("sliding", "full"),
        },
    ),
    "smollm3-full": Variant(
        "smollm3", LINEAR, {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True}, tied=True, v4=True,
    ),
    "olmo2-biases": Variant("olmo2", YARN, {"attention_bias": True, "num_key_value_heads": 3}),
    "olmo2-tied": Variant("olmo2", DYNAMIC, tied=True, v4=True, max_positions=BEFORE),
    "granite-biases": Variant(
        "granite", LLAMA3,
        {
            "attention_bias": True, "mlp_bias": True, "embedding_multiplier": 1.7, "residual_multiplier": 0.6,
            "attention_multiplier": 0.21, "logits_scaling": 1.9,
        },
    ),
    "granite-tied": Variant(
        "granite", longrope(4),
        {
            "embedding_multiplier": 0.8, "residual_multiplier": 0.9, "attention_multiplier": 0.5, "logits_scaling": 0.7,
            "num_key_value_heads": 3, "hidden_act": "gelu",
        },
        tied=True,
    ),
}  # fmt: skip

SIZES = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 84, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write variant `name` to `folder`; the same weights each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    variant = VARIANTS[name]
    config = AutoConfig.for_model(
        variant.model_type,
        **{**SIZES, **variant.settings},
        rope_parameters=dict(variant.rope),
        max_position_embeddings=variant.max_positions,
        tie_word_embeddings=variant.tied,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "norm" in key:
                parameter.copy_(1 + 0.3 * noise)
            elif key.endswith(".bias"):
                parameter.copy_(0.4 * noise)
            elif "embed_tokens" in key:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.3 * noise / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    if variant.v4:
        _spell_as_v4(folder / "config.json")
    return folder


def _spell_as_v4(path: Path) -> None:
    """`rope_parameters` -> `rope_theta` and `rope_scaling` with its older key `type`."""
    config = json.loads(path.read_text())
    inner = config.pop("rope_parameters")
    config["rope_theta"] = inner.pop("rope_theta")
    config["rope_scaling"] = {"type": inner.pop("rope_type"), **inner}
    path.write_text(json.dumps(config, indent=2))
