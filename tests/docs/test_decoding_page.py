"""The table of decoding strategies names every one there is, with fields and needs that are its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "choose-a-decoding-strategy.md"
FACTS = {
    facts["name"]: facts
    for path in ROOT.glob("plugins/*/src/*/pluglm.json")
    for facts in json.loads(path.read_text("utf-8"))["providers"]
    if facts["kind"] == "decoding"
}
ROWS = {
    cells[1].strip("` "): cells[2:]
    for cells in (line.split("|")[1:-1] for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| "))
    if cells[1].startswith(" `")
}


def named(cell: str) -> set[str]:
    return set(re.findall(r"`([a-z_]+)`", cell))


def test_every_strategy_has_a_row() -> None:
    assert sorted(ROWS) == sorted(FACTS)


def test_fields_are_honoured_and_needs_are_what_the_cache_is_asked_for() -> None:
    for name, (fields, needs) in ROWS.items():
        of = {word for word in named(fields) if word in FACTS}  # "those of `beam`"
        assert named(fields) - of <= set(FACTS[name]["features"]), name
        assert named(needs) == set(FACTS[name].get("needs", [])), name


def test_no_field_of_its_own_is_left_out() -> None:
    """What a strategy honours beyond greedy decoding and sampling stands in its row, or in the row that it refers to."""
    common = set(FACTS["greedy"]["features"]) | set(FACTS["sampling"]["features"])
    for name, (fields, _) in ROWS.items():
        said = named(fields)
        for other in said & set(ROWS):
            said |= named(ROWS[other][0])
        assert set(FACTS[name]["features"]) - common - {"*"} <= said, name
