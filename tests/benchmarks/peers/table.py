"""From seconds to figures, and from figures to the lines that people read."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from peers.contender import BASELINES
from peers.measure import Bench, Outcome, cache_type
from peers.shapes import cache_bytes


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, lowest, highest."""
    return {
        "median": round(statistics.median(values), digits), "min": round(min(values), digits),
        "max": round(max(values), digits),
    }  # fmt: skip


def figures(outcome: Outcome, others: Sequence[Outcome], speeds: Sequence[float], bench: Bench) -> dict[str, Any]:
    """One contender's entry of the last line.

    Args:
        others: all of the comparison; those that are baselines divide. speeds: bytes a second of each round.
    """
    line, facts, task = outcome.line, outcome.facts, bench.task
    entry: dict[str, Any] = {"contender": line.name, **{k: v for k, v in facts.items() if not k.endswith("now_bytes")}}
    if outcome.why is not None:
        return entry | {"why": outcome.why}
    item = 4 if cache_type(line, task) == "float32" else 2
    passes = task.tokens or task.prompt
    seconds, weights = outcome.seconds, facts["weight_bytes"]
    needed = weights + task.rows * cache_bytes(bench.model.config, task.cells, item)
    entry |= {
        "tokens_s": spread([task.rows * passes / s for s in seconds]), "seconds": [round(s, 5) for s in seconds],
        "peak_over_needed": round(facts["peak_bytes"] / needed, 2), "ratio": {}, "ratio_equal_bytes": {},
    }  # fmt: skip
    if task.tokens:
        held = task.rows * cache_bytes(bench.model.config, task.prompt + task.tokens // 2, item)
        shares = [(weights + held) * passes / s / speed for s, speed in zip(seconds, speeds, strict=True)]
        entry["share_of_read"] = spread(shares)
    for base in others:
        if base.line.peer in BASELINES and base is not outcome and base.why is None:
            ratios = [b / s for b, s in zip(base.seconds, seconds, strict=True)]
            entry["ratio"][base.line.peer] = spread(ratios)
            entry["ratio_equal_bytes"][base.line.peer] = spread(
                [ratio * weights / base.facts["weight_bytes"] for ratio in ratios]
            )
    return entry


def title(bench: Bench, bits: int, speeds: Sequence[float], reader: str) -> str:
    """What was done."""
    task = bench.task
    what = f"{task.tokens} tokens after {task.prompt}" if task.tokens else f"{task.prompt} tokens"
    read = f", memory reads {statistics.median(speeds) / 1e9:.1f} GB/s ({reader})" if speeds else ""
    rows = "1 row" if task.rows == 1 else f"{task.rows} rows"
    threads = "1 thread" if bench.threads == 1 else f"{bench.threads} threads"
    return f"\n{bench.model.name}, {task.name}: {what}, {rows}, {bits} bits{read}, {threads}"


def show(entries: Sequence[dict[str, Any]]) -> None:
    """Speeds, then memory and starting."""
    heads = "".join(f"{'÷ ' + base:>26}{'equal bytes':>12}" for base in BASELINES)
    print(f"{'':22}{'tokens/s':>10}{'MB':>9}{'of read':>9}{heads}{'error':>9}{'top-1':>7}")
    for entry in entries:
        if "why" in entry:
            print(f"{entry['contender']:22}{entry['why']}")
            continue
        share = f"{entry['share_of_read']['median']:.0%}" if "share_of_read" in entry else "-"
        print(f"{entry['contender']:22}{entry['tokens_s']['median']:10.1f}{entry['weight_bytes'] / 1e6:9.1f}{share:>9}"
              f"{''.join(ratio(entry, base) for base in BASELINES)}{entry['error']:9.2g}{entry['agreement']:7.0%}")  # fmt: skip
    print(
        f"{'':22}{'peak MB':>10}{'÷ needed':>10}{'imports MB':>12}{'imports s':>11}{'load s':>9}{'first token s':>15}"
    )
    for entry in entries:
        if "why" not in entry:
            print(f"{entry['contender']:22}{entry['peak_bytes'] / 1e6:10.0f}{entry['peak_over_needed']:10.2f}"
                  f"{entry['imports_bytes'] / 1e6:12.0f}{entry['imports_s']:11.2f}{entry['load_s']:9.2f}"
                  f"{entry['first_token_s']:15.2f}")  # fmt: skip


def ratio(entry: dict[str, Any], base: str) -> str:
    """Both columns of one baseline."""
    if base not in entry["ratio"]:
        return f"{'-':>26}{'-':>12}"
    found = entry["ratio"][base]
    text = f"{found['median']:.2f} [{found['min']:.2f} … {found['max']:.2f}]"
    return f"{text:>26}{entry['ratio_equal_bytes'][base]['median']:12.2f}"
