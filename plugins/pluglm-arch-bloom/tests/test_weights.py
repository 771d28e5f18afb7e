"""The weight map fills every parameter, takes fused matrices apart where they belong, and reads backwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_arch_bloom import pluglm_build_model, pluglm_describe_model

from pluglm.contracts import AttentionRequest, ModelDescription, ModelParts

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
#: Three heads of five dimensions.
VARIANTS: dict[str, dict[str, Any]] = {
    "bloom": {**PUBLISHED["bloom"], "hidden_size": 15, "n_head": 3, "n_layer": 2, "vocab_size": 11},
    "mpt": {**PUBLISHED["mpt-7b"], "d_model": 15, "n_heads": 3, "n_layers": 2, "vocab_size": 11},
}
both = pytest.mark.parametrize("name", VARIANTS)
tied = pytest.mark.parametrize("tied", [True, False])


def describe(name: str, *, tied: bool = True) -> ModelDescription:
    return pluglm_describe_model({**VARIANTS[name], "tie_word_embeddings": tied})


def build(described: ModelDescription) -> Any:
    from pluglm_attention_eager import pluglm_build_attention

    backend = pluglm_build_attention(request=AttentionRequest(described.attention, "cpu", "float32"))
    with torch.device("meta"):
        return pluglm_build_model(parts=ModelParts(described, backend, {}, "cpu", "float32"))


@both
@tied
def test_the_weight_map_fills_every_parameter_and_no_other(name: str, tied: bool) -> None:
    described = describe(name, tied=tied)
    parameters = {key for key, _ in build(described).named_parameters()}
    targets = [target for rule in described.weights.rules for target in rule.targets if not rule.optional]
    assert sorted(targets) == sorted(parameters)


@both
def test_the_map_reads_both_ways_and_knows_the_shapes(name: str) -> None:
    described = describe(name)
    shapes = {key: tuple(parameter.shape) for key, parameter in build(described).named_parameters()}
    fused = [rule for rule in described.weights.rules if rule.transform is not None]
    assert len(fused) == {"bloom": 4, "mpt": 2}[name]  # two layers, with and without biases
    for rule in fused:
        assert rule.transform is not None
        targets = [torch.randn(shapes[target]) for target in rule.targets]
        sources = rule.transform.invert(targets)
        assert [tuple(shape) for shape in rule.transform.shapes([tuple(s.shape) for s in sources])] == [
            tuple(t.shape) for t in targets
        ]
        for again, target in zip(rule.transform.apply(sources), targets, strict=True):
            assert torch.equal(again, target)


def dealt(name: str) -> list[list[int]]:
    """Which rows of the fused matrix go to q, k and v."""
    rule = next(rule for rule in describe(name).weights.rules if "layers.1.attn.k.weight" in rule.targets)
    assert rule.transform is not None
    return [part[:, 0].tolist() for part in rule.transform.apply([torch.arange(45)[:, None].expand(45, 15)])]


def test_bloom_deals_out_head_by_head() -> None:
    q, k, v = dealt("bloom")
    assert q == [*range(5), *range(15, 20), *range(30, 35)]
    assert k == [row + 5 for row in q]
    assert v == [row + 10 for row in q]


def test_mpt_has_all_queries_then_all_keys_then_all_values() -> None:
    assert dealt("mpt") == [[*range(15)], [*range(15, 30)], [*range(30, 45)]]


@both
def test_a_tied_head_may_be_repeated_in_the_file_but_must_equal_the_embedding(name: str) -> None:
    head = describe(name).weights.rules[-1]
    assert (head.sources, head.optional, head.tied_to) == (("lm_head.weight",), True, "embed.weight")
    untied = describe(name, tied=False).weights.rules[-1]
    assert (untied.targets, untied.optional, untied.tied_to) == (("head.weight",), False, None)
