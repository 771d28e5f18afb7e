"""The page of generation settings names every field, and who honours it; the page of the order names every stage."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from pluglm_decoding_blocks import settings

from pluglm.contracts import STAGES, GenerationConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "generation.md").read_text("utf-8")
ORDER = (ROOT / "docs" / "how-to" / "order-of-processors.md").read_text("utf-8")
#: name -> (default, honoured by, meaning).
ROWS = {
    found[1]: tuple(cell.strip() for cell in found[2].split("|"))
    for found in re.finditer(r"^\| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE)
}
#: strategy -> the fields that it says it honours, of the packages that the page speaks of.
STRATEGIES = {
    facts["name"]: frozenset(facts["features"])
    for package in re.findall(r"(?:pluglm-decoding)?-(standard|beam|speculative|contrastive)\b", PAGE.split("##")[0])
    for path in (ROOT / "plugins" / f"pluglm-decoding-{package}").glob("src/*/pluglm.json")
    for facts in json.loads(path.read_text("utf-8"))["providers"]
}
CONSTANTS = {name: value for name, value in vars(settings).items() if name.endswith("_FIELDS")}


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([\w-]+)`", cell))


#: What a word in the column of those who honour a field stands for.
GROUPS = {
    "all": set(STRATEGIES),
    **{
        found[1]: names(found[2])
        for found in re.finditer(r"^\| (draws|searches|records|marks) \| (.+) \|$", PAGE, re.MULTILINE)
    },
}


def honouring(cell: str) -> set[str]:
    """The strategies that a cell names."""
    return names(cell).union(*(GROUPS[word] for word in re.findall(r"[a-z]+", re.sub(r"`[^`]*`", "", cell))))


@pytest.mark.parametrize("constant", CONSTANTS)
def test_every_field_of_the_shared_machinery_is_on_the_page(constant: str) -> None:
    assert CONSTANTS[constant]
    assert CONSTANTS[constant] <= ROWS.keys()


def test_every_field_of_a_config_and_of_a_strategy_is_on_the_page_and_nothing_else() -> None:
    own = {f.name for f in dataclasses.fields(GenerationConfig)} - {"extra"}
    assert own | frozenset().union(*STRATEGIES.values()) == ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_those_who_honour_a_field_are_those_who_say_so(name: str) -> None:
    _, said, meaning = ROWS[name]
    assert honouring(said) == {strategy for strategy, fields in STRATEGIES.items() if name in fields}
    assert len(meaning) > 10


def test_no_strategy_is_left_out() -> None:
    assert {"greedy", "sampling", "beam", "prompt-lookup", "dola"} <= STRATEGIES.keys()


def test_the_stages_are_listed_in_their_order() -> None:
    table = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", ORDER, re.MULTILINE)
    assert tuple(stage for stage, _ in table) == STAGES
    assert {field for _, field in table} - {"logits_processor", "constraint"} <= ROWS.keys()


def test_the_index_leads_to_both_pages() -> None:
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    assert "(reference/generation.md)" in index
    assert "(how-to/order-of-processors.md)" in index
