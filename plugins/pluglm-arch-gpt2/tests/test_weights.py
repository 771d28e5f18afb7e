"""The weight map fills every parameter, takes fused matrices apart where they belong, and reads backwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_arch_gpt2 import pluglm_build_model, pluglm_describe_model
from torch import Tensor

from pluglm.contracts import AttentionRequest, ModelDescription, ModelParts, WeightRule
from pluglm.contracts.weights import Transform

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
#: H * D = C = 15, K is 1 or H, and no two sizes are equal.
TINY = {"n_embd": 15, "n_head": 3, "n_layer": 2, "n_inner": 8, "vocab_size": 11, "n_positions": 7}
VARIANTS = {
    "gpt2": PUBLISHED["gpt2"],
    "untied": {**PUBLISHED["gpt2"], "tie_word_embeddings": False},
    "shared": PUBLISHED["starcoder"],
    "each": {**PUBLISHED["starcoder"], "multi_query": False},
}


def describe(name: str, **changes: Any) -> ModelDescription:
    return pluglm_describe_model({**VARIANTS[name], **TINY, **changes})


def build(described: ModelDescription) -> Any:
    from pluglm_attention_eager import pluglm_build_attention

    backend = pluglm_build_attention(request=AttentionRequest(described.attention, "cpu", "float32"))
    with torch.device("meta"):
        return pluglm_build_model(parts=ModelParts(described, backend, {}, "cpu", "float32"))


def rule(described: ModelDescription, target: str) -> WeightRule:
    return next(rule for rule in described.weights.rules if target in rule.targets)


def transform(described: ModelDescription, target: str) -> Transform:
    found = rule(described, target).transform
    assert found is not None
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_the_weight_map_fills_every_parameter_and_no_other(name: str) -> None:
    described = describe(name)
    parameters = {key for key, _ in build(described).named_parameters()}
    targets = [target for rule in described.weights.rules for target in rule.targets if not rule.optional]
    assert sorted(targets) == sorted(parameters)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_map_reads_both_ways_and_knows_the_shapes(name: str) -> None:
    described = describe(name)
    shapes = {key: tuple(parameter.shape) for key, parameter in build(described).named_parameters()}
    for each in described.weights.rules:
        targets = [torch.randn(shapes[target]) for target in each.targets if target in shapes]
        if each.transform is None or each.optional:
            continue
        sources = each.transform.invert(targets)
        assert [tuple(shape) for shape in each.transform.shapes([tuple(s.shape) for s in sources])] == [
            tuple(t.shape) for t in targets
        ]
        for again, target in zip(each.transform.apply(sources), targets, strict=True):
            assert torch.equal(again, target)


def test_every_matrix_of_gpt2_is_transposed_and_no_bias_is() -> None:
    described = describe("gpt2")
    stored = torch.randn(8, 15)  # [in, out]
    (down,) = transform(described, "layers.0.mlp.down.weight").apply([stored])
    assert torch.equal(down, stored.T)
    fused = torch.randn(15, 45)
    q, k, v = transform(described, "layers.1.attn.q.weight").apply([fused])
    x = torch.randn(15)
    assert torch.allclose(torch.cat((q @ x, k @ x, v @ x)), x @ fused, atol=1e-6)
    assert rule(described, "layers.0.mlp.down.bias").transform is None
    assert rule(described, "embed.weight").transform is rule(described, "embed_positions.weight").transform is None


def dealt(name: str) -> list[list[int]]:
    """Which rows of the fused bias go to q, k and v, as they are dealt out."""
    described = describe(name)
    rows = torch.arange(25 if name == "shared" else 45)
    return [part.tolist() for part in transform(described, "layers.0.attn.k.bias").apply([rows])]


def test_a_shared_head_follows_all_queries() -> None:
    assert dealt("shared") == [[*range(15)], [*range(15, 20)], [*range(20, 25)]]


def test_heads_of_their_own_stand_beside_their_queries() -> None:
    q, k, v = dealt("each")
    assert q == [*range(5), *range(15, 20), *range(30, 35)]
    assert k == [row + 5 for row in q]
    assert v == [row + 10 for row in q]


def test_stored_causal_masks_are_ignored_and_biases_are_not() -> None:
    from fnmatch import fnmatchcase

    patterns = describe("gpt2").weights.ignored
    ignored = ["h.0.attn.bias", "transformer.h.11.attn.bias", "h.3.attn.masked_bias"]
    kept = ["h.0.attn.c_attn.bias", "h.0.attn.c_proj.bias", "h.0.mlp.c_fc.bias", "ln_f.bias"]
    assert [name for name in ignored + kept if any(fnmatchcase(name, p) for p in patterns)] == ignored


def test_a_position_beyond_the_table_has_no_vector() -> None:
    """Why `max_seq_len` is the length of the table: the module itself would fail there."""
    from pluglm.contracts import ForwardInput

    described = describe("gpt2")
    module = build(described).to_empty(device="cpu")
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)

    def run(length: int) -> Tensor:
        token_ids = torch.zeros(1, length, dtype=torch.long)
        logits: Tensor = module(ForwardInput(token_ids, torch.arange(length)[None], None, dense=True)).logits
        return logits

    limit = described.max_seq_len
    assert limit == 7
    assert run(limit).shape == (1, 7, 11)
    with pytest.raises(IndexError):
        run(limit + 1)
