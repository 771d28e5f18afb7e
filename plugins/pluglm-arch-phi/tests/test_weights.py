"""Weight maps fill exactly the module's parameters, and lead back to the tensors they came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_arch_phi import pluglm_build_model, pluglm_describe_model
from pluglm_attention_eager import pluglm_build_attention

from pluglm.contracts import AttentionRequest, ModelDescription, ModelParts, WeightRule

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
#: Two layers of small and different sizes; heads of 8 dimensions.
SMALL = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 84, "vocab_size": 31,
         "num_attention_heads": 6, "num_key_value_heads": 2}  # fmt: skip


def small(name: str, **changes: Any) -> ModelDescription:
    config = {**PUBLISHED[name], **SMALL, **changes}
    if config["rope_scaling"] is not None:
        config["rope_scaling"] = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
        config["partial_rotary_factor"] = 0.75
    elif config["model_type"] == "phi":
        config["partial_rotary_factor"] = 0.5  # Phi-2's 0.4 of 8 dimensions would be 3
    return pluglm_describe_model(config)


def shapes(described: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, of the module without memory."""
    backend = pluglm_build_attention(request=AttentionRequest(described.attention, "cpu", "float32"))
    with torch.device("meta"):
        module = pluglm_build_model(parts=ModelParts(described, backend, {}, "cpu", "float32"))
    return {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}  # type: ignore[attr-defined]


def rule(described: ModelDescription, source: str) -> WeightRule:
    return next(rule for rule in described.weights.rules if rule.sources == (source,))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weight_map_fills_every_parameter_and_no_other(name: str, tied: bool) -> None:
    changes = {"qk_layernorm": tied} if PUBLISHED[name]["model_type"] == "phi" else {}
    described = small(name, tie_word_embeddings=tied, **changes)
    targets = [target for rule in described.weights.rules for target in rule.targets if not rule.optional]
    assert sorted(shapes(described)) == sorted(targets)
    assert ("head.weight" in targets) is not tied


def test_a_fused_projection_is_cut_into_queries_keys_and_values_and_joined_again() -> None:
    described = small("phi-3-mini-4k")
    fused = torch.randn(48 + 2 * 16, 48)
    found = rule(described, "model.layers.1.self_attn.qkv_proj.weight")
    assert found.targets == ("layers.1.attn.q.weight", "layers.1.attn.k.weight", "layers.1.attn.v.weight")
    assert found.transform is not None
    parts = found.transform.apply([fused])
    for part, rows in zip(parts, (slice(0, 48), slice(48, 64), slice(64, 80)), strict=True):
        assert torch.equal(part, fused[rows])
    assert [tuple(part.shape) for part in parts] == [shapes(described)[target] for target in found.targets]
    assert torch.equal(found.transform.invert(parts)[0], fused)


def test_a_fused_gate_and_up_is_cut_in_this_order_and_joined_again() -> None:
    fused = torch.randn(2 * 84, 48)
    found = rule(small("phi-4-mini"), "model.layers.0.mlp.gate_up_proj.weight")
    assert found.targets == ("layers.0.mlp.gate.weight", "layers.0.mlp.up.weight")
    assert found.transform is not None
    gate, up = found.transform.apply([fused])
    assert torch.equal(gate, fused[:84]) and torch.equal(up, fused[84:])
    assert torch.equal(found.transform.invert([gate, up])[0], fused)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_name_of_the_weight_map_occurs_once(name: str) -> None:
    weights = small(name).weights
    targets = [target for rule in weights.rules for target in rule.targets]
    sources = [source for rule in weights.rules for source in rule.sources]
    assert len(set(targets)) == len(targets)
    assert len(set(sources)) == len(sources)


def test_a_tied_head_may_be_repeated_in_the_file_but_must_equal_the_embedding() -> None:
    head = rule(small("phi-4-mini"), "lm_head.weight")
    assert (head.optional, head.tied_to) == (True, "embed.weight")
    head = rule(small("phi-4"), "lm_head.weight")
    assert (head.optional, head.tied_to) == (False, None)
