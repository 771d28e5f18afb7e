"""The weight map fills exactly the module's parameters, from either layout of experts, and gives the files back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_arch_deepseek import pluglm_build_model, pluglm_describe_model
from pluglm_arch_deepseek.weights import Heads
from torch import Tensor, nn

from pluglm.contracts import AttentionRequest, ModelDescription, ModelParts
from pluglm.errors import CheckpointError
from pluglm.weights import export_weights, load_weights

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
SMALL = {
    "vocab_size": 31, "hidden_size": 12, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
    "moe_intermediate_size": 7, "n_routed_experts": 16, "first_k_dense_replace": 1, "attention_bias": True,
}  # fmt: skip


@dataclass
class File:
    """Tensors in memory, as a checkpoint."""

    held: Mapping[str, Tensor]
    path: Path = Path("model-folder")

    @property
    def tensors(self) -> dict[str, Any]:
        @dataclass
        class Info:
            shape: tuple[int, ...]
            dtype: str = "F32"

        return {name: Info(tuple(tensor.shape)) for name, tensor in self.held.items()}

    def tensor(self, name: str) -> Tensor:
        return self.held[name]


def small(name: str) -> ModelDescription:
    rank = None if PUBLISHED[name]["q_lora_rank"] is None else 8
    return pluglm_describe_model({**PUBLISHED[name], **SMALL, "q_lora_rank": rank})


def empty(described: ModelDescription, dtype: str = "float32") -> nn.Module:
    from pluglm_attention_eager import pluglm_build_attention

    backend = pluglm_build_attention(request=AttentionRequest(described.attention, "cpu", dtype))
    with torch.device("meta"):
        module: Any = pluglm_build_model(parts=ModelParts(described, backend, {}, "cpu", dtype))
    return module  # type: ignore[no-any-return]


def load(described: ModelDescription, tensors: Mapping[str, Tensor], dtype: str = "float32") -> nn.Module:
    module = empty(described, dtype)
    load_weights(module, described.weights, File(tensors), device="cpu", dtype=getattr(torch, dtype))  # type: ignore[arg-type]
    return module


@pytest.fixture(params=list(PUBLISHED))
def described(request: pytest.FixtureRequest) -> ModelDescription:
    return small(request.param)


def random_file(described: ModelDescription) -> dict[str, Tensor]:
    """What a published file of this model holds, with random numbers."""
    module = empty(described).to_empty(device="cpu")
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return {name: tensor.clone() for name, tensor in export_weights(module, described.weights)}


def fused(tensors: Mapping[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """The same with all experts of a layer in one tensor."""
    place = "model.layers.1.mlp.experts"

    def stacked(name: str) -> Tensor:
        return torch.stack([tensors[f"{place}.{e}.{name}_proj.weight"] for e in range(num_experts)])

    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(place)}
    gate_up = torch.cat((stacked("gate"), stacked("up")), dim=1)
    return {**rest, f"{place}.gate_up_proj": gate_up, f"{place}.down_proj": stacked("down")}


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_every_parameter_is_filled_and_what_was_loaded_is_saved_again(described: ModelDescription) -> None:
    file = random_file(described)
    module = load(described, file)
    assert not any(parameter.is_meta for parameter in module.parameters())
    assert equal(dict(export_weights(module, described.weights)), file)


def test_both_layouts_of_experts_load_to_the_same_model(described: ModelDescription) -> None:
    file = random_file(described)
    other = fused(file, 16)
    assert len(other) < len(file)
    assert equal(load(described, file).state_dict(), load(described, other).state_dict())


def test_published_names_are_the_files_own() -> None:
    names = {name for name in random_file(small("deepseek-v3")) if name.startswith("model.layers.1.")}
    experts = {name for name in names if ".experts." in name}
    assert len(experts) == 16 * 3
    assert "model.layers.1.mlp.experts.15.down_proj.weight" in experts
    assert {name.removeprefix("model.layers.1.") for name in names - experts} == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_a_proj.weight",
        "self_attn.q_a_proj.bias", "self_attn.q_a_layernorm.weight", "self_attn.q_b_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_proj_with_mqa.bias", "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight", "self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias", "mlp.shared_experts.gate_proj.weight",
        "mlp.shared_experts.up_proj.weight", "mlp.shared_experts.down_proj.weight",
    }  # fmt: skip


def test_rows_of_k_and_v_are_taken_apart_by_head() -> None:
    described = small("moonlight")
    file = random_file(described)
    attn: Any = load(described, file).get_submodule("layers.0.attn")
    rows = file["model.layers.0.self_attn.kv_b_proj.weight"]
    for h in range(3):
        of_head = rows[h * 11 : (h + 1) * 11]
        assert torch.equal(attn.k_up[h], of_head[:6])
        assert torch.equal(attn.v_up[h], of_head[6:])


def test_the_correction_stays_in_float32() -> None:
    described = small("deepseek-v3")
    file = random_file(described)
    router: Any = load(described, file, "bfloat16").get_submodule("layers.1.mlp.router")
    assert router.weight.dtype is torch.bfloat16
    assert torch.equal(router.correction_bias, file["model.layers.1.mlp.gate.e_score_correction_bias"])


def test_the_layer_that_predicts_a_further_token_is_ignored_with_a_reason() -> None:
    described = small("deepseek-v3")
    file = random_file(described)
    further = {"model.layers.2.eh_proj.weight": torch.ones(12, 24), "model.layers.2.enorm.weight": torch.ones(12)}
    assert equal(load(described, {**file, **further}).state_dict(), load(described, file).state_dict())
    assert "num_nextn_predict_layers" in described.weights.ignored["model.layers.2.*"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.enorm\.weight"):
        load(described, {**file, "model.layers.3.enorm.weight": torch.ones(12)})


def test_rows_that_heads_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 heads cannot share the rows of a tensor of shape \[32, 10\]"):
        Heads(3).shapes([(32, 10)])
    described = small("deepseek-v3")
    file = random_file(described)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    with pytest.raises(CheckpointError, match=r"dimension 0 is 32, the parts \(18, 15\) need 33"):
        load(described, {**file, name: file[name][1:]})
