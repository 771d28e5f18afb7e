"""The module that a description builds has exactly the parameters that its weight map fills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_llama import pluglm_build_model, pluglm_describe_model

from pluglm.contracts import AttentionRequest, ModelParts

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weight_map_fills_every_parameter_and_no_other(name: str) -> None:
    import torch
    from pluglm_attention_eager import pluglm_build_attention

    config = {**PUBLISHED[name], "num_hidden_layers": 2, "layer_types": None}
    if name not in ("qwen2.5", "qwen3", "smollm3"):
        del config["layer_types"]
    described = pluglm_describe_model(config)
    backend = pluglm_build_attention(request=AttentionRequest(described.attention, "cpu", "float32"))
    with torch.device("meta"):
        module = pluglm_build_model(parts=ModelParts(described, backend, {}, "cpu", "float32"))
    parameters = {key for key, _ in module.named_parameters()}  # type: ignore[attr-defined]
    targets = {target for rule in described.weights.rules for target in rule.targets if not rule.optional}
    assert parameters == targets
