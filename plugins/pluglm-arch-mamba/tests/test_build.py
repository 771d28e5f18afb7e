"""The module that a description builds: its parameters, its weights in and out, and a text with a real cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pluglm_caches
import pytest
import torch
from pluglm_arch_mamba import pluglm_build_model, pluglm_describe_model

from pluglm.contracts import CacheRequest, ForwardInput, ModelDescription, ModelParts

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
TINY = {
    "model_type": "mamba2", "vocab_size": 37, "hidden_size": 20, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 5,
    "state_size": 7, "n_groups": 2, "chunk_size": 4, "use_bias": True,
}  # fmt: skip


def build(described: ModelDescription, dtype: str = "float32") -> Any:
    return pluglm_build_model(parts=ModelParts(described, None, {}, "cpu", dtype))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weight_map_fills_every_parameter_and_no_other(name: str, biases: bool) -> None:
    config = {**PUBLISHED[name], "num_hidden_layers": 2, "use_bias": biases, "use_conv_bias": not biases}
    described = pluglm_describe_model(config)
    with torch.device("meta"):
        module = build(described)
    targets = {target for rule in described.weights.rules for target in rule.targets if not rule.optional}
    assert {key for key, _ in module.named_parameters()} == targets


@pytest.mark.parametrize("layout", ["dynamic", "static"])
def test_a_ragged_text_with_a_cache_is_each_row_without_one(layout: str) -> None:
    described = pluglm_describe_model(TINY)
    module = build(described)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    provider = getattr(pluglm_caches, layout)
    request = CacheRequest(described.slots, ("dense",), "cpu", "float32")
    cache = provider.pluglm_build_cache(request=request).new(batch_size=2, capacity=12)
    token_ids = torch.randint(37, (2, 12), generator=draw)
    positions = torch.arange(12).expand(2, 12).clone()
    positions[1] -= 3  # the second row begins three cells later
    found = []
    with torch.no_grad():
        for cells in (slice(0, 6), slice(6, 7), slice(7, 12)):
            where = positions[:, cells].clamp(min=-1)
            found.append(module(ForwardInput(token_ids[:, cells], where, cache)).logits)
        for row, start in ((0, 0), (1, 3)):
            inputs = ForwardInput(token_ids[row : row + 1, start:], positions[:1, : 12 - start], None, dense=True)
            same = torch.cat(found, 1)[row, start:], module(inputs).logits[0]
            torch.testing.assert_close(*same, rtol=2e-5, atol=2e-5)
    assert cache.length == 12
