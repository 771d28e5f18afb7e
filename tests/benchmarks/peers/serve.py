"""A program: one contender in a process of its own, asked and answering by lines of JSON over its pipes.

    python -m peers.serve peers.run_pluglm:Pluglm

Each request is {"do": name, …}; the answer holds what was asked for or {"error": …}. Libraries that print do so on
stderr: the answers have a descriptor of their own.
"""

from __future__ import annotations

import ctypes
import json
import os
import pkgutil
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np


def die_with_parent() -> None:
    """Linux ends this process with the one that started it, even if it is stopped at that moment."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def memory() -> dict[str, int]:
    """Bytes resident now, and at their highest."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("ascii").splitlines())
        return {"now_bytes": 1024 * int(lines["VmRSS"].split()[0]), "peak_bytes": 1024 * int(lines["VmHWM"].split()[0])}
    except OSError:  # not Linux: what getrusage knows, in bytes on macOS
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"now_bytes": 0, "peak_bytes": peak}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the call returned."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


class Service:
    """The requests. See `peers.contender.Contender` for what they are made of."""

    def __init__(self, contender: Any) -> None:
        self.contender = contender

    def imports(self) -> dict[str, Any]:
        """Import the libraries, so that loading can be timed by itself."""
        seconds, versions = timed(self.contender.imports)
        return {"seconds": seconds, "versions": versions, **memory()}

    def load(self, job: dict[str, Any]) -> dict[str, Any]:
        """Load the model."""
        seconds, facts = timed(lambda: self.contender.load(job))
        return {"seconds": seconds, **facts, **memory()}

    def prefill(self, rows: list[list[int]]) -> dict[str, Any]:
        """Read prompts into an empty cache; the first token of each row is chosen outside the clock."""
        seconds, _ = timed(lambda: self.contender.prefill(rows))
        return {"seconds": seconds, "tokens": self.contender.logits().argmax(-1).tolist()}

    def decode(self, length: int, first: list[int], count: int) -> dict[str, Any]:
        """Go back to `length` cells, feed `first`, and choose `count` tokens a row greedily."""
        self.contender.rewind(length)
        seconds, tokens = timed(lambda: self.contender.decode(first, count))
        return {"seconds": seconds, "tokens": tokens}

    def trace(self, rows: list[list[int]], forced: list[list[int]], out: str) -> dict[str, Any]:
        """Logits after the prompts and after each forced token of each row, as float32 [1 + steps, B, V] in a file."""
        self.contender.prefill(rows)
        with Path(out).open("wb") as file:  # one pass at a time: what is kept would count as the contender's memory
            shape = self._append(file)
            for tokens in forced:
                self.contender.step(tokens)
                self._append(file)
        return {"shape": [1 + len(forced), *shape]}

    def _append(self, file: IO[bytes]) -> tuple[int, ...]:
        logits = self.contender.logits().astype(np.float32, copy=False)
        file.write(logits.tobytes())
        return tuple(logits.shape)

    def bandwidth(self) -> dict[str, Any]:
        """Bytes a second; asked of `peers.bandwidth` alone."""
        return {"bytes_s": self.contender.read_memory()}

    def memory(self) -> dict[str, Any]:
        """Bytes resident."""
        return memory()


def main(target: str) -> None:
    """Answer until the pipe closes."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    service = Service(pkgutil.resolve_name(target)())
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(service, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - whatever a library raises is the contender's result
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
