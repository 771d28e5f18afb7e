"""The shapes that are measured, and what a model of a shape takes in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: m0: for the tests of the benchmark itself. m1: as Llama-3.2-1B. m2: as SmolLM2-135M.
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "m0": {
        **LLAMA, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 96, "vocab_size": 320, "max_position_embeddings": 256,
        "rope_theta": 10000.0,
    },
    "m1": {
        **LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "m2": {
        **LLAMA, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
}  # fmt: skip
#: Bytes a weight takes in each GGUF type: blocks of 32 with one 16-bit scale.
GGUF_BYTES: Mapping[str, float] = {"bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a checkpoint, as Transformers names them; the head is tied."""
    C, F, D = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (C,), "self_attn.q_proj": (H * D, C), "self_attn.k_proj": (K * D, C),
        "self_attn.v_proj": (K * D, C), "self_attn.o_proj": (C, H * D), "post_attention_layernorm": (C,),
        "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
    }  # fmt: skip
    names = {"model.embed_tokens.weight": (config["vocab_size"], C), "model.norm.weight": (C,)}
    for i in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return names


def matrix_elements(config: Mapping[str, Any]) -> int:
    """Elements of all matrices; what is beside them, norms, is a thousandth of a model."""
    return sum(shape[0] * shape[1] for shape in weight_shapes(config).values() if len(shape) == 2)


def cache_bytes(config: Mapping[str, Any], cells: int, item_bytes: int = 2) -> int:
    """Keys and values of so many cells of one row."""
    per_layer = 2 * config["num_key_value_heads"] * config["head_dim"] * item_bytes
    return int(config["num_hidden_layers"] * per_layer * cells)
