"""`python tests/matrix/page.py` writes docs/reference/matrix.md: every cell, works (tested) or refused (with the reason)."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cells import STRATEGIES, Cell, cells, has_attention, names
from programs import PROGRAMS
from searches import SAID, refused

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "matrix.md"
#: Reasons that no work could remove: what the two are contradicts each other, or the machine lacks what one needs.
MEANINGLESS = (
    r"lacks the layer kind",  # a layout for windows, a layer without one
    r"needs device cuda",
)

HEAD = """# What works with what

Every attention backend with every cache layout on every type of layer, for each strategy ({strategies}).
`python tests/matrix/page.py` writes this page, and a test runs every cell: one that works must generate the tokens that
`eager` attention generates with a cache of the same numbers, alone and in a ragged batch; one that is refused must be
refused while the model is loaded, with the reason given here. On a CPU, in float32.

✓ works with these strategies. A number refers to the reasons below the table. {share}

"""

MORE = """
## Further strategies

Each with every layout on every type of layer that the layout makes, with `eager` attention. ✓ works on all of them; else
the types on which it is refused, with the reason below. One that works must give the same tokens with every layout that
keeps all numbers, and, where it is greedy speculation, those of `greedy`.

"""


def page(found: Sequence[Cell]) -> str:
    """The whole page."""
    reasons: dict[str, int] = {}
    marks = {(c.layers, c.attention, c.layout): _mark(c, reasons) for c in found}
    layouts = names("cache")
    lines = [f"| layers | attention | {' | '.join(layouts)} |", f"|---|---|{'---|' * len(layouts)}"]
    for layers in PROGRAMS:
        for n, attention in enumerate(names("attention") if has_attention(layers) else ["none"]):
            row = " | ".join(marks[layers, attention, layout] for layout in layouts)
            lines.append(f"| {layers if n == 0 else ''} | {'' if attention == 'none' else f'`{attention}`'} | {row} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    meaningful = [c for c in found if not meaningless(c)]
    works = [c for c in meaningful if not c.refused]
    share = (
        f"Of {len(found)} cells {len(found) - len(meaningful)}\ncannot work by what their parts are (a layout that "
        f"only makes windows and a layer without one, a GPU kernel on a\nCPU); of the other {len(meaningful)}, "
        f"{len(works)} work ({len(works) / len(meaningful):.1%})."
    )
    strategies = ", ".join(f"`{name}`" for name in STRATEGIES)
    head = HEAD.format(strategies=strategies, share=share)
    return head + "\n".join(lines) + "\n\n## Why not\n\n" + "\n".join(notes) + "\n" + strategies_table()


def strategies_table() -> str:
    """The second table and its reasons."""
    layouts, reasons = names("cache"), {}
    lines = [f"| strategy | {' | '.join(layouts)} |", f"|---|{'---|' * len(layouts)}"]
    for strategy in SAID:
        cells_ = [searches_mark(strategy, layout, reasons) for layout in layouts]
        lines.append(f"| `{strategy}` | {' | '.join(cells_)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return MORE + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


def searches_mark(strategy: str, layout: str, reasons: dict[str, int]) -> str:
    """One cell; new reasons are numbered in `reasons`."""
    found = refused(strategy, layout)
    by_reason: dict[str, list[str]] = {}
    for layers, reason in found.items():
        by_reason.setdefault(reason.replace(f"({layout})", "(…)"), []).append(layers)
    marks = [
        f"not {', '.join(layers)} ({reasons.setdefault(reason, len(reasons) + 1)})"
        for reason, layers in by_reason.items()
    ]
    return "; ".join(marks) or "✓"


def meaningless(found: Cell) -> bool:
    """Whether a refused cell could not have worked on this machine by what its parts are."""
    return any(re.search(pattern, found.refused) for pattern in MEANINGLESS)


def _mark(found: Cell, reasons: dict[str, int]) -> str:
    if not found.refused:
        return "✓"
    reason = re.sub(r"slots? \d+", "a slot", found.refused)
    return str(reasons.setdefault(reason, len(reasons) + 1))


if __name__ == "__main__":
    PAGE.write_text(page(list(cells())), encoding="utf-8")
    print(f"Wrote {PAGE}.")
