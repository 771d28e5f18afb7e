"""A tiny Llama in two folders: packed as a test wants it, and plain with the weights that this means."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import pluglm

# Pairwise different, and whole groups of 32: hidden, queries, keys, feed-forward; vocabulary.
C, Q, K, F, V, LAYERS = 64, 128, 32, 96, 40, 1
LINEAR = {
    f"model.layers.{i}.{name}": size
    for i in range(LAYERS)
    for name, size in {
        "self_attn.q_proj": (Q, C), "self_attn.k_proj": (K, C), "self_attn.v_proj": (K, C), "self_attn.o_proj": (C, Q),
        "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
    }.items()
}  # fmt: skip
IDS = [[1, 7, 3, 22, 39, 5, 5, 0, 14]]

#: (out, in, seed) -> the packed tensors of a layer and the weight that they mean.
Packer = Callable[[int, int, int], tuple[dict[str, Tensor], Tensor]]


def write(
    folder: Path, quantization_config: Mapping[str, Any], pack: Packer, *, bias: bool = False,
    stray_bias: float | None = None, plain: tuple[str, ...] = (), dtype: str = "float32",
) -> tuple[Path, Path]:  # fmt: skip
    """The packed folder and the plain one. plain: layers that are packed in neither. stray_bias: one that Llama lacks."""
    torch.manual_seed(1)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": C, "intermediate_size": F,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": K, "vocab_size": V,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "attention_bias": bias, "tie_word_embeddings": False, "torch_dtype": dtype, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    common = {"model.embed_tokens.weight": torch.randn(V, C), "lm_head.weight": torch.randn(V, C) * 0.2}
    common["model.norm.weight"] = torch.rand(C) + 0.5
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            common[f"model.layers.{i}.{norm}.weight"] = torch.rand(C) + 0.5
    packed, dense = dict(common), dict(common)
    for seed, (place, (rows, columns)) in enumerate(LINEAR.items()):
        tensors, weight = pack(rows, columns, seed)
        if place.rpartition(".")[2] in plain:
            tensors = {"weight": weight.float()}
        if bias and "self_attn" in place:
            tensors = {**tensors, "bias": (torch.randn(rows) * 0.1).half().contiguous()}
        if stray_bias is not None:
            tensors = {**tensors, "bias": torch.full((rows,), stray_bias).half()}
        packed |= {f"{place}.{short}": tensor.contiguous() for short, tensor in tensors.items()}
        dense[f"{place}.weight"] = weight.float()
        if bias and "self_attn" in place:
            dense[f"{place}.bias"] = tensors["bias"].float()
    for name, tensors, more in (
        ("packed", packed, {"quantization_config": quantization_config}), ("plain", dense, {}),
    ):  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**config, **more}))
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / "packed", folder / "plain"


def load(folder: Path, **parts: Any) -> Any:
    """A model in float32 on the CPU."""
    given = {
        "dtype": "float32", "device": "cpu", "attention": "eager", "cache": "dynamic", "decoding": "greedy",
        "executor": "executor/eager", "tokenizer": "auto",
    }  # fmt: skip
    return pluglm.load(folder, **{**given, **parts})


@torch.no_grad()
def logits(lm: Any) -> Tensor:
    """[T, V]: of IDS, one forward pass."""
    out: Tensor = lm.model(torch.tensor(IDS)).logits[0]
    return out
