"""The weight map fills every parameter, takes the fused matrix apart where it belongs, and reads backwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_arch_falcon import pluglm_build_model, pluglm_describe_model

from pluglm.contracts import AttentionRequest, ModelDescription, ModelParts

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
#: Six heads of two dimensions.
TINY = {"hidden_size": 12, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 11}
VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {**PUBLISHED["falcon-7b"], **TINY},
    "grouped": {**PUBLISHED["falcon-40b"], **TINY, "num_kv_heads": 3, "bias": True},
    "grouped-one-norm": {**PUBLISHED["falcon2-11b"], **TINY, "num_kv_heads": 2, "ffn_hidden_size": 48},
    "sequential": {**PUBLISHED["falcon-rw-1b"], **TINY},
}
every = pytest.mark.parametrize("name", VARIANTS)


def describe(name: str) -> ModelDescription:
    return pluglm_describe_model(VARIANTS[name])


def build(described: ModelDescription) -> Any:
    from pluglm_attention_eager import pluglm_build_attention

    backend = pluglm_build_attention(request=AttentionRequest(described.attention, "cpu", "float32"))
    with torch.device("meta"):
        return pluglm_build_model(parts=ModelParts(described, backend, {}, "cpu", "float32"))


@every
def test_the_weight_map_fills_every_parameter_and_no_other(name: str) -> None:
    described = describe(name)
    parameters = {key for key, _ in build(described).named_parameters()}
    targets = [target for rule in described.weights.rules for target in rule.targets if not rule.optional]
    assert sorted(targets) == sorted(parameters)


@every
def test_the_map_reads_both_ways_and_knows_the_shapes(name: str) -> None:
    described = describe(name)
    shapes = {key: tuple(parameter.shape) for key, parameter in build(described).named_parameters()}
    fused = [rule for rule in described.weights.rules if rule.transform is not None]
    assert len(fused) == (4 if VARIANTS[name]["bias"] else 2)
    for rule in fused:
        assert rule.transform is not None
        targets = [torch.randn(shapes[target]) for target in rule.targets]
        sources = rule.transform.invert(targets)
        assert [tuple(shape) for shape in rule.transform.shapes([tuple(s.shape) for s in sources])] == [
            tuple(t.shape) for t in targets
        ]
        for again, target in zip(rule.transform.apply(sources), targets, strict=True):
            assert torch.equal(again, target)


@pytest.mark.parametrize(
    ("name", "q", "k", "v"),
    [
        ("shared", [*range(12)], [12, 13], [14, 15]),
        ("grouped", [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19], [4, 5, 12, 13, 20, 21], [6, 7, 14, 15, 22, 23]),
        ("sequential", [i for h in range(6) for i in (6 * h, 6 * h + 1)],
         [i for h in range(6) for i in (6 * h + 2, 6 * h + 3)], [i for h in range(6) for i in (6 * h + 4, 6 * h + 5)]),
    ],
)  # fmt: skip
def test_queries_come_with_the_key_and_value_they_read(name: str, q: list[int], k: list[int], v: list[int]) -> None:
    rule = next(rule for rule in describe(name).weights.rules if "layers.1.attn.k.weight" in rule.targets)
    assert rule.transform is not None
    rows = torch.arange(len(q) + len(k) + len(v))[:, None].expand(-1, 12)
    assert [part[:, 0].tolist() for part in rule.transform.apply([rows])] == [q, k, v]


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("shared", {"input_layernorm": "attn_norm_in"}),
        ("grouped", {"ln_attn": "attn_norm_in", "ln_mlp": "mlp_norm_in"}),
        ("grouped-one-norm", {"input_layernorm": "attn_norm_in"}),
        ("sequential", {"input_layernorm": "attn_norm_in", "post_attention_layernorm": "mlp_norm_in"}),
    ],
)
def test_the_norms_have_the_names_of_their_form(name: str, norms: dict[str, str]) -> None:
    found = {
        rule.sources[0].split(".")[3]: rule.targets[0].split(".")[2]
        for rule in describe(name).weights.rules
        if rule.targets[0].startswith("layers.0.") and "_norm_in." in rule.targets[0]
    }
    assert found == norms


def test_a_tied_head_may_be_repeated_in_the_file_but_must_equal_the_embedding() -> None:
    head = describe("shared").weights.rules[-1]
    assert (head.sources, head.optional, head.tied_to) == (("lm_head.weight",), True, "embed.weight")
    untied = describe("grouped-one-norm").weights.rules[-1]
    assert (untied.targets, untied.optional, untied.tied_to) == (("head.weight",), False, None)
