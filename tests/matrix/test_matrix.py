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
import searches
from programs import PROGRAMS

from pluglm.lm import LanguageModel


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
def expected(layout: str, layers: str) -> dict[str, list[list[int]]]:
    """The tokens of eager attention, by strategy."""
    _, lm = cells.attempt("eager" if cells.has_attention(layers) else "none", layout, layers)
    assert lm is not None, "eager attention computes everything"
    found = {strategy: cells.tokens(lm, cells.prompts(), strategy) for strategy in cells.STRATEGIES}
    if lossless(layout):
        alone = [row for prompt in cells.prompts() for row in cells.tokens(lm, [prompt], "greedy")]
        assert alone == found["greedy"], "a row of a batch differs from the row alone"
        assert cells.tokens(lm, cells.prompts(), "greedy", use_cache=False) == found["greedy"]
    return found


@pytest.mark.parametrize("layers", PROGRAMS)
@pytest.mark.parametrize("layout", cells.names("cache"))
@pytest.mark.parametrize("attention", cells.names("attention"))
def test_a_cell_works_or_is_refused_as_the_page_says(attention: str, layout: str, layers: str) -> None:
    if not cells.has_attention(layers):
        if attention != cells.names("attention")[0]:
            return  # one cell for all of them: the part is not used
        attention = "none"
    found, lm = cells.attempt(attention, layout, layers)
    assert _marked(found) == (lm is not None), "docs/reference/matrix.md is out of date: run tests/matrix/page.py"
    if lm is None:
        return
    # What a lossy layout generates is its own; which attention reads it must not matter.
    wanted = expected("dynamic" if lossless(layout) else layout, layers)
    for strategy, rows in wanted.items():
        assert cells.tokens(lm, cells.prompts(), strategy) == rows
    short = cells.prompts()[1]
    alone = cells.tokens(lm, [short], "greedy")
    assert alone == (
        [wanted["greedy"][1]] if lossless(layout) else cells.tokens(_eager(layout, layers), [short], "greedy")
    )


@pytest.mark.parametrize("layout", cells.names("cache"))
@pytest.mark.parametrize("strategy", searches.SAID)
def test_a_strategy_works_with_a_layout_as_the_page_says(strategy: str, layout: str) -> None:
    for layers in PROGRAMS:
        found = searches.outcome(strategy, layout, layers)
        if found is None or found.tokens is None:
            continue  # the page says so, which is compared as a whole
        assert {len(row) for row in found.tokens} <= {searches.NEW}
        if lossless(layout):
            assert found == searches.outcome(strategy, "dynamic", layers), layers
        else:  # what it generates is its own; it must be so again
            lm = searches.model(layout, layers)
            assert lm is not None
            assert searches.run(lm, strategy, cells.prompts()) == found, layers
        if strategy in ("prompt-lookup", "assisted", "early-exit") and lossless(layout):
            lm = searches.model(layout, layers)
            assert lm is not None
            plain = lm.complete(cells.prompts(), decoding="greedy", max_new_tokens=searches.NEW, eos_token_id=())
            assert isinstance(plain, list)
            assert found.tokens == tuple(completion.token_ids for completion in plain), layers


def _eager(layout: str, layers: str) -> LanguageModel:
    _, lm = cells.attempt("eager", layout, layers)
    assert lm is not None
    return lm


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
