"""A tiny Llama by way of the front door: packed while loading and afterwards, saved, loaded, near to what it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pluglm

# Pairwise different and multiples of 32: hidden, queries, keys, feed-forward; vocabulary.
C, Q, K, F, V = 64, 128, 32, 96, 41
LINEAR = {
    "self_attn.q_proj": (Q, C), "self_attn.k_proj": (K, C), "self_attn.v_proj": (K, C), "self_attn.o_proj": (C, Q),
    "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
}  # fmt: skip
PARTS = {"device": "cpu", "attention": "eager", "cache": "dynamic", "decoding": "greedy", "executor": "eager"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with biases in its attention, bfloat16."""
    draw = torch.Generator().manual_seed(1)
    tensors = {"model.embed_tokens.weight": torch.randn(V, C, generator=draw), "model.norm.weight": torch.ones(C)}
    tensors["lm_head.weight"] = torch.randn(V, C, generator=draw) * 0.3
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{norm}.weight"] = torch.rand(C, generator=draw) + 0.5
    for name, (rows, columns) in LINEAR.items():
        tensors[f"model.layers.0.{name}.weight"] = torch.randn(rows, columns, generator=draw) / columns**0.5
        if "self_attn" in name:
            tensors[f"model.layers.0.{name}.bias"] = torch.randn(rows, generator=draw) * 0.1
    made = tmp_path_factory.mktemp("llama")
    save_file({k: t.bfloat16() for k, t in tensors.items()}, made / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": C, "intermediate_size": F,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": K, "vocab_size": V,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "attention_bias": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    (made / "config.json").write_text(json.dumps(config))
    return made


def load(folder: Path, **parts: Any) -> Any:
    return pluglm.load(folder, **{**PARTS, **parts})


@torch.no_grad()
def logits(lm: Any, tokens: int = 9) -> Tensor:
    """[T, V] of one pass."""
    ids = torch.arange(tokens)[None] * 7 % V
    out: Tensor = lm.model(ids).logits[0].float()
    return out


@pytest.mark.parametrize(
    ("variant", "dtype", "layers", "near"),
    [("int8", "bfloat16", 7, 0.05), ("int8", "float32", 7, 0.05), ("bf16", "bfloat16", 8, 0.03)],
)
@pytest.mark.parametrize("tokens", [3, 60])  # few rows and many
def test_packing_while_loading_afterwards_and_from_a_file_is_one_thing(
    folder: Path, tmp_path: Path, variant: str, dtype: str, layers: int, near: float, tokens: int
) -> None:
    plain = logits(load(folder, dtype=dtype), tokens)
    reading = load(folder, dtype=dtype, quantizer=f"onednn:{variant}")
    loaded = load(folder, dtype=dtype)
    assert loaded.quantize(f"onednn:{variant}") == layers
    got = logits(reading, tokens)
    assert torch.equal(got, logits(loaded, tokens))
    assert float((got - plain).abs().max()) < near * float(plain.abs().max())
    reading.save(tmp_path)
    assert torch.equal(logits(load(tmp_path, dtype=dtype), tokens), got)
    assert reading.plan["quantizer"].provider == "pluglm-kernels-onednn:quantizer/onednn"


def test_options_reach_the_layers_and_the_plan(folder: Path) -> None:
    kept = load(folder, quantizer="onednn:int8", options={"quantizer": {"keep_packed": True, "few_rows": 0}})
    made = load(folder, quantizer="onednn:int8")
    assert not torch.equal(logits(kept), logits(made))
    assert kept.plan.hash != made.plan.hash
    assert torch.equal(logits(kept, 60), logits(made, 60))
