"""Every cell of attention × cache × type of layer × strategy: it generates the right tokens, or is refused as the page says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import cells
import page
from programs import PROGRAMS


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def lossless(layout: str) -> bool:
    """Whether `auto` could choose this layout: it gives back what it was given."""
    from pluglm.planner import loses

    (provider,) = (p for p in cells.manager().registry.of("cache") if p.name == layout)
    return not loses(provider)


@cache
def expected(layout: str, layers: str, strategy: str) -> list[list[list[int]]]:
    """The tokens of eager attention: of the batch, and of each row alone."""
    lm = cells.load("eager" if cells.has_attention(layers) else "none", layout, layers)
    rows = cells.prompts()
    return [cells.tokens(lm, rows, strategy), *(cells.tokens(lm, [row], strategy) for row in rows)]


@pytest.mark.parametrize("layers", PROGRAMS)
@pytest.mark.parametrize("layout", cells.names("cache"))
@pytest.mark.parametrize("attention", cells.names("attention"))
def test_a_cell_works_or_is_refused_as_the_page_says(attention: str, layout: str, layers: str) -> None:
    if not cells.has_attention(layers):
        if attention != cells.names("attention")[0]:
            return  # one cell for all of them: the part is not used
        attention = "none"
    found = cells.cell(attention, layout, layers)
    assert _marked(found) == (found.refused == ""), "docs/reference/matrix.md is out of date: run tests/matrix/page.py"
    if found.refused:
        return
    lm = cells.load(attention, layout, layers)
    rows = cells.prompts()
    for strategy in cells.STRATEGIES:
        # What a lossy layout generates is its own; which attention reads it must not matter.
        same = "dynamic" if lossless(layout) else layout
        batch, *alone = expected(same, layers, strategy)
        assert cells.tokens(lm, rows, strategy) == batch
        for row, wanted in zip(rows, alone, strict=True):
            assert cells.tokens(lm, [row], strategy) == wanted
    if lossless(layout):
        batch, *alone = expected("dynamic", layers, "greedy")
        assert [row for (row,) in alone] == batch, "a row of a batch differs from the row alone"


def test_at_least_95_percent_of_the_meaningful_cells_work() -> None:
    found = [c for c in cells.cells() if not page.meaningless(c)]
    assert sum(not c.refused for c in found) / len(found) >= 0.95


def test_the_page_is_the_generated_one() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(list(cells.cells()))


@cache
def _rows() -> dict[tuple[str, str], list[str]]:
    """(layers, attention) -> the marks of that row of the page."""
    rows, layers = {}, ""
    for line in page.PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| layers"):
            name, attention, *marks = (part.strip() for part in line.strip("|").split("|"))
            layers = name or layers
            rows[layers, attention.strip("`") or "none"] = marks
    return rows


def _marked(found: cells.Cell) -> bool:
    """Whether the page says that a cell works."""
    marks = _rows().get((found.layers, found.attention))
    return marks is not None and marks[cells.names("cache").index(found.layout)] == "✓"
