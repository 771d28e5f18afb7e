"""One comparison: contenders with weights of equal size do one task in turn, each after it has been verified."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from peers.checkpoints import Model
from peers.contender import LLAMA, REFERENCE, Line
from peers.process import FailedError, Process
from peers.tasks import Task, draw
from peers.verify import chosen_by, compare

FIRST = 16  # tokens of the prompt before the first token that is waited for
PAUSE_S = 0.02  # before a contender is asked: what the one before left to be done is done


@dataclass
class Outcome:
    """What became of one contender.

    Attributes:
        python, path: what runs it, and what it loads. why: it has no times: left out, refused, wrong or dead.
        facts: of imports, loading, verification and memory. seconds: of each round, all passes of the task together.
    """

    line: Line
    python: Path = Path()
    path: Path = Path()
    why: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """One task on one model.

    Attributes:
        threads: of each contender. rounds: that count; one more warms up. scratch: for logs and logits.
        read_bytes: of the buffer that tells how fast memory is read: many times the cache of the CPU.
    """

    model: Model
    task: Task
    threads: int
    rounds: int
    scratch: Path
    read_bytes: int = 512 << 20

    def reference(self, python: Path) -> np.ndarray:
        """Logits of the same weights in float32, [1 + CHECKED, B, V]. Raises: FailedError."""
        outcome = Outcome(REFERENCE, python, self.model.folder)
        bench = replace(self, task=replace(self.task, cache_type=None))
        with bench.start(outcome) as process:
            bench.load(process, outcome)
            return bench.trace(process)

    def compare(
        self, outcomes: Sequence[Outcome], reference: np.ndarray, python: Path
    ) -> tuple[list[float], str]:  # fmt: skip
        """Fill in what became of the contenders.

        Returns: the bytes a second that memory gave in each round, and what read it.
        """
        with ExitStack() as stack:
            reader = stack.enter_context(Process("peers.bandwidth:Bandwidth", python, self.threads, self.log("read")))
            how = reader.ask("load", job={"threads": self.threads, "read_bytes": self.read_bytes})["reader"]
            running = {}
            for outcome in outcomes:
                if outcome.why is None:
                    process = stack.enter_context(self.start(outcome))
                    if self.settled(self.verify, process, outcome, reference):
                        running[outcome.line.name] = outcome, process
            speeds = self.take_rounds(running, reader)
            for outcome, process in running.values():
                self.settled(self.weigh, process, outcome)
        return speeds, how

    def log(self, name: str) -> Path:
        """Where a process says what it says."""
        return self.scratch / f"{name.replace(' ', '-')}.log"

    def start(self, outcome: Outcome) -> Process:
        """A contender's process; nothing is imported yet."""
        return Process(outcome.line.target, outcome.python, self.threads, self.log(outcome.line.name))

    @staticmethod
    def settled(call: Callable[..., None], process: Process, outcome: Outcome, *more: Any) -> bool:
        """Do something with a contender; False: it failed, its process is gone and `why` says so."""
        try:
            call(process, outcome, *more)
        except FailedError as error:
            outcome.why = outcome.why or str(error)
        if outcome.why is not None:
            process.__exit__(None, None, None)
        return outcome.why is None

    def load(self, process: Process, outcome: Outcome) -> None:
        """Import, load, and wait for a first token."""
        rows, _ = draw(self.task, self.model.config["vocab_size"])
        imported = process.ask("imports")
        loaded = process.ask("load", job={
            "path": str(outcome.path), "threads": self.threads, "batch": self.task.rows, "capacity": self.task.cells,
            "cache_type": cache_type(outcome.line, self.task), **outcome.line.options,
        })  # fmt: skip
        process.ask("prefill", rows=[row[:FIRST] for row in rows])
        outcome.facts |= {
            "first_token_s": time.perf_counter() - process.started, "imports_s": imported["seconds"],
            "imports_bytes": imported["now_bytes"], "load_s": loaded.pop("seconds"), **loaded,
            "versions": imported["versions"],
        }  # fmt: skip

    def trace(self, process: Process) -> np.ndarray:
        """Logits [1 + CHECKED, B, V] of the task's own prompts and what is fed after them."""
        rows, forced = draw(self.task, self.model.config["vocab_size"])
        out = self.scratch / "logits.f32"
        shape = process.ask("trace", rows=rows, forced=forced, out=str(out))["shape"]
        logits = np.fromfile(out, dtype=np.float32).reshape(shape)
        out.unlink()
        return logits

    def verify(self, process: Process, outcome: Outcome, reference: np.ndarray) -> None:
        """Load, and compare what is computed; `why` is set if it is wrong."""
        self.load(process, outcome)
        logits = self.trace(process)
        verdict = compare(reference, logits, outcome.line.bits, trained=self.model.trained)
        outcome.facts |= {"error": verdict.error, "worst": verdict.worst, "agreement": verdict.agreement}
        outcome.why = verdict.wrong and f"wrong: {verdict.wrong}"
        if outcome.why is None and self.task.tokens:
            first = draw(self.task, self.model.config["vocab_size"])[1][0]
            made = process.ask("decode", length=self.task.prompt, first=first, count=1)["tokens"]
            if not chosen_by(logits[1], made[0]):
                outcome.why = "wrong: decode chooses another token than the logits of the same pass"

    def take_rounds(self, running: dict[str, tuple[Outcome, Process]], reader: Process) -> list[float]:
        """Alternate; each round begins with another contender, the first round is left out."""
        speeds = []
        for number in range(self.rounds + 1):
            speeds.append(reader.ask("bandwidth")["bytes_s"])
            names = list(running)
            turn = number % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                outcome, process = running[name]
                time.sleep(PAUSE_S)
                if not self.settled(self.once, process, outcome):
                    del running[name]
        for outcome, _ in running.values():
            del outcome.seconds[0]
        return speeds[1:]

    def once(self, process: Process, outcome: Outcome) -> None:
        """Take the seconds of the task."""
        rows, forced = draw(self.task, self.model.config["vocab_size"])
        if self.task.tokens:
            answer = process.ask("decode", length=self.task.prompt, first=forced[0], count=self.task.tokens)
            if len(answer["tokens"]) != self.task.tokens:
                raise FailedError(f"made {len(answer['tokens'])} tokens a row instead of {self.task.tokens}")
        else:
            answer = process.ask("prefill", rows=rows)
        outcome.seconds.append(answer["seconds"])

    def weigh(self, process: Process, outcome: Outcome) -> None:
        """Ask for the highest memory, at the end."""
        outcome.facts |= process.ask("memory")


def cache_type(line: Line, task: Task) -> str:
    """Of keys and values: the task's; or the dtype computed in, and llama.cpp's own default."""
    if task.cache_type is not None:
        return task.cache_type
    return "f16" if line.target == LLAMA else {"float32": "float32", "bfloat16": "bf16"}[line.options["dtype"]]
