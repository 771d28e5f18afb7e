"""The weight map fills exactly the module's parameters, in either layout of the experts, and leads back."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_arch_mixtral import pluglm_build_model, pluglm_describe_model
from pluglm_attention_eager import pluglm_build_attention
from torch import Tensor

from pluglm.contracts import AttentionRequest, ModelDescription, ModelParts
from pluglm.errors import CheckpointError
from pluglm.weights import export_weights, load_weights

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
#: Pairwise different, three layers.
SIZES = {
    "vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64,
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "mixtral": {**PUBLISHED["mixtral-8x7b"], **SIZES, "num_local_experts": 5},
    "qwen3_moe": {
        **PUBLISHED["qwen3-30b-a3b"], **SIZES, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14,
        "mlp_only_layers": [1], "attention_bias": True,
    },
}  # fmt: skip


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


def described(kind: str) -> ModelDescription:
    return pluglm_describe_model(SMALL[kind])


def build(kind: str) -> Any:
    made = described(kind)
    backend = pluglm_build_attention(request=AttentionRequest(made.attention, "cpu", "float32"))
    with torch.device("meta"):
        return pluglm_build_model(parts=ModelParts(made, backend, {}, "cpu", "float32"))


def filled(kind: str, tensors: dict[str, Tensor]) -> Any:
    module = build(kind)
    load_weights(module, described(kind).weights, Held(tensors), device="cpu", dtype=torch.float32)  # type: ignore[arg-type]
    return module


def written(kind: str, layout: str) -> dict[str, Tensor]:
    """A checkpoint of random weights in one layout."""
    module, weights = build(kind).to_empty(device="cpu"), described(kind).weights
    draw = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    only = replace(weights, rules=tuple(rule for rule in weights.rules if rule.layout in (None, layout)))
    return dict(export_weights(module, only))


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("layout", ["each", "fused"])
def test_each_layout_fills_every_parameter_and_no_other(kind: str, layout: str) -> None:
    rules = [rule for rule in described(kind).weights.rules if rule.layout in (None, layout)]
    targets = [target for rule in rules for target in rule.targets]
    sources = [source for rule in rules for source in rule.sources]
    assert sorted(targets) == sorted(name for name, _ in build(kind).named_parameters())
    assert len(set(sources)) == len(sources)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("layout", ["each", "fused"])
def test_what_is_loaded_is_saved_with_the_same_names_and_values(kind: str, layout: str) -> None:
    tensors = written(kind, layout)
    weights = described(kind).weights
    only = replace(weights, rules=tuple(rule for rule in weights.rules if rule.layout in (None, layout)))
    saved = dict(export_weights(filled(kind, tensors), only))
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", SMALL)
def test_both_layouts_hold_the_same_model_and_it_is_saved_as_published(kind: str) -> None:
    each, fused = (filled(kind, written(kind, layout)) for layout in ("each", "fused"))
    assert each.state_dict().keys() == fused.state_dict().keys()
    assert all(torch.equal(tensor, fused.state_dict()[name]) for name, tensor in each.state_dict().items())
    saved = dict(export_weights(fused, described(kind).weights))
    assert saved.keys() == written(kind, "each").keys()


def test_the_experts_are_found_under_their_published_names() -> None:
    tensors = written("mixtral", "each")
    place = "model.layers.2.block_sparse_moe"
    assert tensors[f"{place}.gate.weight"].shape == (5, 12)
    module = filled("mixtral", tensors).layers[2].mlp
    for ours, theirs in ((module.gate, "w1"), (module.down, "w2"), (module.up, "w3")):
        assert torch.equal(ours.weight[4], tensors[f"{place}.experts.4.{theirs}.weight"])
    tensors = written("qwen3_moe", "each")
    module = filled("qwen3_moe", tensors).layers[2].mlp
    for ours, theirs in ((module.gate, "gate_proj"), (module.down, "down_proj"), (module.up, "up_proj")):
        assert torch.equal(ours.weight[3], tensors[f"model.layers.2.mlp.experts.3.{theirs}.weight"])


def test_a_fused_tensor_holds_gate_above_up() -> None:
    tensors = written("qwen3_moe", "fused")
    module = filled("qwen3_moe", tensors).layers[0].mlp
    fused = tensors["model.layers.0.mlp.experts.gate_up_proj"]  # [E, 2F, C]
    assert torch.equal(fused[:, :14], module.gate.weight)
    assert torch.equal(fused[:, 14:], module.up.weight)


@pytest.mark.parametrize("kind", SMALL)
def test_a_missing_expert_is_named(kind: str) -> None:
    tensors = written(kind, "each")
    gone = next(name for name in tensors if ".experts.3." in name)
    del tensors[gone]
    with pytest.raises(CheckpointError, match="lacks 1 of the tensors") as caught:
        filled(kind, tensors)
    assert caught.value.tensor == gone


def test_more_experts_than_the_config_says_are_refused() -> None:
    tensors = written("mixtral", "each")
    extra = "model.layers.0.block_sparse_moe.experts.5.w1.weight"
    with pytest.raises(CheckpointError, match="no place for") as caught:
        filled("mixtral", {**tensors, extra: torch.zeros(20, 12)})
    assert caught.value.tensor == extra
    fused = written("mixtral", "fused")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(CheckpointError, match="does not fit the model"):
        filled("mixtral", {**fused, name: torch.zeros(6, 40, 12)})
