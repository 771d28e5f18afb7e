"""What the package says of itself is what its strategies do, and its pages run."""

from __future__ import annotations

import importlib.resources
import itertools
import json
from pathlib import Path

import pluglm_decoding_standard
import pytest

from pluglm.contracts import DecodingRequest, TokenSelector
from pluglm.manifest import parse_manifest
from pluglm.testing.scripted_model import ScriptedModel

FACTS = json.loads((importlib.resources.files(pluglm_decoding_standard) / "pluglm.json").read_text("utf-8"))
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "write-a-decoding-strategy.md"


@pytest.mark.parametrize("facts", FACTS["providers"], ids=lambda facts: facts["name"])
def test_the_facts_name_the_fields_that_are_honoured(facts: dict[str, object]) -> None:
    parse_manifest(FACTS, "pluglm.json")
    provider = getattr(pluglm_decoding_standard, str(facts["name"]))
    strategy = provider.pluglm_build_decoding(request=DecodingRequest(23, "cpu", None))
    assert strategy.name == facts["name"]
    assert sorted(strategy.fields) == facts["features"]
    assert sorted(strategy.needs) == facts.get("needs", [])
    assert isinstance(strategy, TokenSelector)


@pytest.mark.skipif(not PAGE.exists(), reason="the pages are not part of the wheel")
def test_the_how_to_pages_strategy_runs() -> None:
    import torch

    from pluglm.contracts import GenerationConfig

    code = PAGE.read_text("utf-8").split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(code, str(PAGE), "exec"), names)
    strategy = names["NoStutter"]()  # type: ignore[operator]
    output = strategy(ScriptedModel(23), torch.tensor([[3, 4]]), generation_config=GenerationConfig(max_new_tokens=6))
    tokens = output.sequences[0].tolist()
    assert len(tokens) == 8
    assert all(a != b for a, b in itertools.pairwise(tokens))
