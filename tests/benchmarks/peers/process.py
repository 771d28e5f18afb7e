"""A contender's process as the benchmark sees it: started, asked, stopped while another one is measured."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ANSWER_S = 900  # a prompt of 4,096 tokens in float32 on an old machine takes minutes, not more


class FailedError(Exception):
    """A contender refused, failed or died; the text says how."""


class Process:
    """One contender. It is stopped (SIGSTOP) whenever it is not asked, so that none of its threads takes time.

    Attributes:
        started: `time.perf_counter()` when it was. threads: it may use.
    """

    def __init__(self, target: str, python: Path, threads: int, log: Path) -> None:
        self.log = log
        found = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(found), "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self.started = time.perf_counter()
        with log.open("wb") as errors:
            self.child = subprocess.Popen(
                [str(python), "-m", "peers.serve", target],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
            )  # fmt: skip

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.child.kill()
        for pipe in (self.child.stdin, self.child.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # it died with a request unread
                pipe.close()
        self.child.wait()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request and its answer. Raises: FailedError."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        with self._awake():
            try:
                self.child.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
                self.child.stdin.flush()
            except BrokenPipeError:
                raise self._died(do) from None
            ready, _, _ = select.select([self.child.stdout], [], [], ANSWER_S)
            if not ready:
                raise FailedError(f"no answer to {do!r} within {ANSWER_S} s")
            line = self.child.stdout.readline()
        if not line:
            raise self._died(do)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FailedError(" ".join(answer["error"].split()))
        return answer

    @contextmanager
    def _awake(self) -> Iterator[None]:
        if not hasattr(signal, "SIGSTOP"):  # Windows: the others idle
            yield
            return
        self.child.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.child.send_signal(signal.SIGSTOP)

    def _died(self, do: str) -> FailedError:
        code = self.child.wait()
        said = self.log.read_text("utf-8", "replace").strip().splitlines()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return FailedError(f"died in {do!r} ({how})" + (f": {said[-1]}" if said else ""))
