"""The weight map fills exactly the module's parameters and leads back; packed experts are not taken for plain ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_arch_gpt_oss import pluglm_build_model, pluglm_describe_model
from pluglm_attention_eager import pluglm_build_attention
from torch import Tensor

from pluglm.contracts import AttentionRequest, ModelParts
from pluglm.errors import CheckpointError
from pluglm.weights import export_weights, load_weights

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
E, C, F = 5, 12, 10
SMALL = {
    **PUBLISHED["gpt-oss-20b"], "vocab_size": 31, "hidden_size": C, "intermediate_size": F, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "num_local_experts": E, "layer_types": None,
}  # fmt: skip
DESCRIBED = pluglm_describe_model(SMALL)


@dataclass
class Info:
    shape: tuple[int, ...]
    dtype: str = "F32"


class Held:
    """A checkpoint in memory."""

    path, config = Path("held"), dict[str, Any]()

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.held = tensors
        self.tensors = {name: Info(tuple(t.shape)) for name, t in tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self.held[name]


def build() -> Any:
    backend = pluglm_build_attention(request=AttentionRequest(DESCRIBED.attention, "cpu", "float32"))
    with torch.device("meta"):
        return pluglm_build_model(parts=ModelParts(DESCRIBED, backend, {}, "cpu", "float32"))


def filled(tensors: dict[str, Tensor]) -> Any:
    module = build()
    load_weights(module, DESCRIBED.weights, Held(tensors), device="cpu", dtype=torch.float32)  # type: ignore[arg-type]
    return module


def written() -> dict[str, Tensor]:
    """A checkpoint of random weights."""
    module, draw = build().to_empty(device="cpu"), torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    return dict(export_weights(module, DESCRIBED.weights))


def test_the_weight_map_fills_every_parameter_and_no_other() -> None:
    targets = [target for rule in DESCRIBED.weights.rules for target in rule.targets]
    assert sorted(targets) == sorted(name for name, _ in build().named_parameters())


def test_what_is_loaded_is_saved_with_the_same_names_and_values() -> None:
    tensors = written()
    saved = dict(export_weights(filled(tensors), DESCRIBED.weights))
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


def test_gate_and_up_alternate_in_the_file_and_products_are_written_the_other_way_round() -> None:
    tensors = written()
    place, mlp = "model.layers.1.mlp.experts", filled(tensors).layers[1].mlp
    assert tensors[f"{place}.gate_up_proj"].shape == (E, C, 2 * F)
    assert torch.equal(mlp.gate.weight, tensors[f"{place}.gate_up_proj"][:, :, ::2].mT)
    assert torch.equal(mlp.up.weight, tensors[f"{place}.gate_up_proj"][:, :, 1::2].mT)
    assert torch.equal(mlp.gate.bias, tensors[f"{place}.gate_up_proj_bias"][:, ::2])
    assert torch.equal(mlp.up.bias, tensors[f"{place}.gate_up_proj_bias"][:, 1::2])
    assert torch.equal(mlp.down.weight, tensors[f"{place}.down_proj"].mT)
    assert torch.equal(mlp.down.bias, tensors[f"{place}.down_proj_bias"])


def test_an_experts_matrices_lie_whole_in_memory() -> None:
    mlp = filled(written()).layers[0].mlp
    assert all(weights.weight[e].is_contiguous() for weights in (mlp.gate, mlp.up, mlp.down) for e in range(E))


@pytest.mark.parametrize("name", ["self_attn.sinks", "mlp.router.bias", "mlp.experts.gate_up_proj_bias"])
def test_a_missing_tensor_is_named(name: str) -> None:
    tensors = written()
    del tensors[f"model.layers.1.{name}"]
    with pytest.raises(CheckpointError, match="lacks 1 of the tensors") as caught:
        filled(tensors)
    assert caught.value.tensor == f"model.layers.1.{name}"


def test_packed_experts_are_not_taken_for_plain_ones() -> None:
    tensors = written()
    for i in range(2):
        for name in ("gate_up_proj", "down_proj"):
            place = f"model.layers.{i}.mlp.experts.{name}"
            del tensors[place]
            tensors |= {f"{place}_blocks": torch.zeros(E, 4), f"{place}_scales": torch.zeros(E, 4)}
    with pytest.raises(CheckpointError, match="lacks 4 of the tensors"):
        filled(tensors)
