"""The speed of pluglm beside Transformers and llama.cpp, on the same weights, as ratios of alternating rounds.

    python tests/benchmarks/speed.py --models m1 m2 pystdlib --what decode prefill long batch

Every contender has a process and as many threads as the others; all but the one that is asked are stopped. Before its
time is believed, its logits after the same tokens are compared with those of the same weights in float32; one that
computes something else is shown as wrong, without a ratio. The first run builds llama.cpp and writes the models into
`--cache`. What every column means: docs/how-to/run-the-benchmarks.md. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers.bandwidth import compiler
from peers.build_llama import cxx_compiler, find_llama
from peers.checkpoints import CannotMakeError, Model, find_gguf, find_model
from peers.contender import LINES, LLAMA, PEERS, Line
from peers.machine import commit, cpu_flags, cpu_model, first_line, free_memory
from peers.measure import Bench, Outcome
from peers.process import FailedError
from peers.shapes import matrix_elements
from peers.table import figures, show, title
from peers.tasks import TASKS, Task, fitted

PYTHON = Path(sys.executable)


def default_cache() -> Path:
    """A folder of the user's, outside the repository."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pluglm-benchmarks"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pluglm-benchmarks"


class Peers:
    """What is there to be measured, found when it is first asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        from pluglm.registry import Registry

        self.args = args
        self.quantizers = {provider.name for provider in Registry.installed().of("quantizer")}
        self.llama_facts: dict[str, Any] = {}
        self._llama: Path | str | None = None

    def llama(self) -> Path:
        """A Python with llama.cpp. Raises: CannotMakeError, the same each time."""
        if self._llama is None:
            try:
                self._llama, self.llama_facts = find_llama(
                    self.args.cache, jobs=self.args.jobs, build=not self.args.no_build
                )
            except CannotMakeError as error:
                self._llama = str(error)
        if isinstance(self._llama, str):
            raise CannotMakeError(self._llama)
        return self._llama

    def outcome(self, line: Line, model: Model) -> Outcome:
        """A contender with what it needs, or why it is left out."""
        if line.needs is not None and line.needs not in self.quantizers:
            return Outcome(line, why=f"left out: no quantizer {line.needs!r} is installed")
        if line.target != LLAMA:
            return Outcome(line, PYTHON, model.folder)
        try:
            python = self.llama()
            return Outcome(line, python, find_gguf(model, line.file, python))
        except CannotMakeError as error:
            return Outcome(line, why=f"left out: {error}")


def compare(bench: Bench, bits: int, peers: Peers, reference: np.ndarray) -> dict[str, Any]:
    """One table."""
    outcomes = [
        peers.outcome(line, bench.model) for line in LINES if line.bits == bits and line.peer in peers.args.peers
    ]
    speeds, reader = bench.compare(outcomes, reference, PYTHON)
    print(title(bench, bits, speeds, reader))
    entries = [figures(outcome, outcomes, speeds, bench) for outcome in outcomes]
    show(entries)
    sys.stdout.flush()
    return {
        "model": bench.model.name, "task": bench.task.name, "bits": bits, "prompt": bench.task.prompt,
        "tokens": bench.task.tokens, "rows": bench.task.rows, "read_bytes_s": [round(speed) for speed in speeds],
        "reader": reader, "contenders": entries,
    }  # fmt: skip


def too_large(model: Model, args: argparse.Namespace) -> str | None:
    """Why the memory that is free will not do for the reference, or for all contenders of one table; or None.

    On average a contender is taken to hold half as much again as its weights: one packs a second copy, others map a file.
    """
    elements, free = matrix_elements(model.config), free_memory()
    tables = (sum(line.bits / 8 for line in LINES if line.bits == b and line.peer in args.peers) for b in args.bits)
    wanted = elements * max(6.0, *(1.5 * table for table in tables)) + 1e9
    if free is None or wanted <= free:
        return None
    return f"its contenders want up to {wanted / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def run(args: argparse.Namespace, peers: Peers, scratch: Path) -> list[dict[str, Any]]:
    """Every model, task and size of weights."""
    results = []
    for name in args.models:
        try:
            model = find_model(name, args.cache)
            if (why := too_large(model, args)) is not None:
                raise CannotMakeError(why)
        except CannotMakeError as error:
            print(f"\n{name} left out: {error}")
            results.append({"model": name, "why": str(error)})
            continue
        for what in args.what:
            task = fitted(TASKS[what], args.tokens, model.config)
            if not isinstance(task, Task):
                print(f"\n{name}, {what} left out: {task}")
                results.append({"model": name, "task": what, "why": task})
                continue
            bench = Bench(model, task, args.threads, args.rounds, scratch, args.read_mb << 20)
            try:
                reference = bench.reference(PYTHON)
            except FailedError as error:
                raise SystemExit(f"there is nothing to compare {name} with: the reference {error}") from error
            for bits in args.bits:
                results.append(compare(bench, bits, peers, reference))
    return results


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("m0", "m1", "m2", "pystdlib"), default=["m2", "pystdlib"])
    parser.add_argument("--what", nargs="+", choices=tuple(TASKS), default=["decode"])
    parser.add_argument("--bits", nargs="+", type=int, choices=(32, 16, 8, 4), default=[16, 8, 4], help="of a weight")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=7, help="that count; one more warms up")
    parser.add_argument("--tokens", type=int, help="that follow a prompt; none: as each task has it")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every contender")
    parser.add_argument("--read-mb", type=int, default=512, help="of the buffer that tells how fast memory is read")
    parser.add_argument(
        "--quick", action="store_true", help="m2 and pystdlib, decode, few tokens: to see that it works"
    )
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where peers and models are kept")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once while building")
    parser.add_argument("--no-build", action="store_true", help="leave llama.cpp out where it is not built yet")
    parser.add_argument("--clear", choices=("models", "all"), help="delete the kept models, or peers too, and end")
    args = parser.parse_args()
    if args.quick:
        args.models, args.what, args.rounds, args.tokens = ["m2", "pystdlib"], ["decode"], 5, 12
    return args


def clear(cache: Path, what: str) -> None:
    """Delete what earlier runs made; nothing else that may lie in the folder."""
    for folder in cache.glob("*"):
        if folder.name.startswith(("m0-", "m1-", "m2-", "pystdlib-", *(("llama.cpp-",) if what == "all" else ()))):
            print(f"deleting {folder}")
            shutil.rmtree(folder)


def summary(args: argparse.Namespace, peers: Peers, results: Sequence[dict[str, Any]], seconds: float) -> str:
    """The last line."""
    cc, cxx = compiler(), cxx_compiler()
    return json.dumps({
        "benchmark": "speed", "quick": args.quick, "rounds": args.rounds, "threads": args.threads,
        "seconds": round(seconds), "commit": commit(), "python": platform.python_version(), "cpu": cpu_model(),
        "cpu_flags": cpu_flags(), "system": platform.platform(), "cores": os.cpu_count(),
        "compiler": {name: first_line([path, "--version"]) for name, path in (("cc", cc), ("cxx", cxx)) if path},
        "llama.cpp": peers.llama_facts, "results": results,
    })  # fmt: skip


def main() -> None:
    """Measure, and print."""
    args, started = arguments(), time.perf_counter()
    args.cache = args.cache.resolve()
    if args.clear:
        clear(args.cache, args.clear)
        return
    args.cache.mkdir(parents=True, exist_ok=True)
    peers = Peers(args)
    with tempfile.TemporaryDirectory() as scratch:
        results = run(args, peers, Path(scratch))
    print(summary(args, peers, results, time.perf_counter() - started))


if __name__ == "__main__":
    main()
