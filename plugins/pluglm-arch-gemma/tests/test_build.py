"""The module that a description builds has exactly the parameters that its weight map fills, there and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_gemma import pluglm_build_model, pluglm_describe_model

from pluglm.contracts import AttentionRequest, ModelDescription, ModelParts

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())


def shapes(described: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, of the module without memory."""
    import torch
    from pluglm_attention_eager import pluglm_build_attention

    backend = pluglm_build_attention(request=AttentionRequest(described.attention, "cpu", "float32"))
    with torch.device("meta"):
        module = pluglm_build_model(parts=ModelParts(described, backend, {}, "cpu", "float32"))
    return {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weight_map_fills_every_parameter_and_no_other(name: str, biased: bool) -> None:
    shorter = {"num_hidden_layers": 2, "attention_bias": biased}
    if "layer_types" in PUBLISHED[name]:
        shorter["layer_types"] = ["sliding_attention", "full_attention"]
    described = pluglm_describe_model({**PUBLISHED[name], **shorter})
    targets = [target for rule in described.weights.rules for target in rule.targets if not rule.optional]
    assert sorted(shapes(described)) == sorted(targets)
    assert ("layers.1.attn.o.bias" in targets) is biased


def test_every_projection_has_the_shape_that_the_checkpoints_hold() -> None:
    found = shapes(pluglm_describe_model({**PUBLISHED["gemma-2-27b"], "num_hidden_layers": 1}))
    assert found["layers.0.attn.q.weight"] == (4096, 4608)  # heads × head_dim is not hidden_size
    assert found["layers.0.attn.k.weight"] == (2048, 4608)
    assert found["layers.0.attn.o.weight"] == (4608, 4096)
    assert found["layers.0.mlp.gate.weight"] == (36864, 4608)
    assert "head.weight" not in found
