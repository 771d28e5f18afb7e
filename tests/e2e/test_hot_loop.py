"""Nothing of the control plane runs for a generated token: no hook, look-up, policy check, inspection or import."""

from __future__ import annotations

import builtins
import importlib.metadata
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pluggy
import pytest
import torch

import pluglm
from pluglm.manager import Manager
from pluglm.registry import Registry

TOKENS, WARM_UP = 100, 5
CORE = Path(pluglm.__file__).parent
#: The modules of the core that may run for a token; every other one is control plane.
DATA_PLANE = {
    "forward", "outputs", "passed", "seq2seq", "streaming", "text_stream", "lm", "row_texts", "constrained", "healing",
    "errors",
}  # fmt: skip
FOREIGN = {
    "a pluggy call": str(Path(pluggy.__file__).parent),
    "inspect": inspect.__file__,
    "an entry-point look-up": str(Path(importlib.metadata.__file__).parent),
}


def offence_of(filename: str) -> str | None:
    """What a call into this file is, if it must not happen in the hot loop."""
    for name, place in FOREIGN.items():
        if filename.startswith(place):
            return name
    path = Path(filename)
    if path.parent == CORE and path.stem not in DATA_PLANE:
        return f"pluglm.{path.stem}"
    return None


class Watch:
    """Counts offences between two steps of a generation, in every thread that takes part.

    `step` is passed as a stopping criterion: it never stops, begins the count after `WARM_UP` tokens and ends it at
    the last one.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.offences: Counter[str] = Counter()
        self._known: dict[str, str | None] = {}
        self._armed = False
        self._import = builtins.__import__

    def step(self, ids: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        self.steps += 1
        if self.steps == WARM_UP:
            self._armed = True
            builtins.__import__ = self._imported  # `import x` of a loaded module runs no Python code to see
            sys.setprofile(self.profile)
        if self.steps == WARM_UP + TOKENS:
            self.disarm()
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    def disarm(self) -> None:
        self._armed = False
        builtins.__import__ = self._import
        sys.setprofile(None)

    def profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not self._armed:
            return
        filename = frame.f_code.co_filename
        if filename not in self._known:
            self._known[filename] = offence_of(filename)
        if name := self._known[filename]:
            self.offences[name] += 1

    def _imported(self, name: str, *rest: Any, **more: Any) -> Any:
        self.offences["import"] += 1
        return self._import(name, *rest, **more)


@contextmanager
def watching() -> Iterator[Watch]:
    """A watch that leaves nothing behind."""
    before = sys.getprofile()
    watch = Watch()
    try:
        yield watch
    finally:
        watch.disarm()
        sys.setprofile(before)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "seed": 7},
    "penalty and stop": {"repetition_penalty": 1.1, "stop_strings": ("\x00never",)},
    "without a cache": {"use_cache": False},
    "a grammar": {"constraint": {"regex": "[a-z ]*"}},
}
END = {"max_new_tokens": WARM_UP + TOKENS + 3, "min_new_tokens": WARM_UP + TOKENS + 3}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_generated_token_costs_no_hook_no_look_up_and_no_import(
    lm: pluglm.LanguageModel, settings: dict[str, Any]
) -> None:
    with watching() as watch:
        lm.generate([7, 8, 9], **END, **settings, stopping_criteria=[watch.step])
    assert watch.steps >= WARM_UP + TOKENS
    assert watch.offences == Counter()


def test_a_streamed_token_costs_none_either(lm: pluglm.LanguageModel) -> None:
    with watching() as watch:
        pieces = 0
        for _ in lm.stream("the cat", **END, stopping_criteria=[watch.step]):
            pieces += 1
            # The strategy has a thread of its own, which `step` watches; this one turns tokens into text.
            sys.setprofile(watch.profile)
        sys.setprofile(None)
    assert watch.steps >= WARM_UP + TOKENS and pieces > 30
    assert watch.offences == Counter()


def _call_a_hook(manager: Manager) -> None:
    manager._pluggy.hook.pluglm_audit(event="token", data={})


def _find(manager: Manager) -> None:
    manager.registry.find("attention", "sdpa")


def _ask_for_permission(manager: Manager) -> None:
    manager.refusal(manager.registry.of("attention")[0])


def _look_up_entry_points(manager: Manager) -> None:
    importlib.metadata.entry_points(group="pluglm.none")


def _inspect(manager: Manager) -> None:
    inspect.signature(_find)


def _import(manager: Manager) -> None:
    import json  # noqa: F401


OFFENCES = {
    "a pluggy call": _call_a_hook,
    "pluglm.registry": _find,
    "pluglm.manager": _ask_for_permission,
    "an entry-point look-up": _look_up_entry_points,
    "inspect": _inspect,
    "import": _import,
}


@pytest.mark.parametrize(("name", "offend"), OFFENCES.items(), ids=OFFENCES)
def test_the_watch_sees_one_such_call_for_each_token(
    lm: pluglm.LanguageModel, name: str, offend: Callable[[Manager], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    manager, run = Manager(Registry.installed()), lm.model._run

    def run_and_offend(inputs: Any) -> Any:
        offend(manager)
        return run(inputs)

    monkeypatch.setattr(lm.model, "_run", run_and_offend)
    with watching() as watch:
        lm.generate([7, 8, 9], **END, stopping_criteria=[watch.step])
    assert watch.offences[name] >= TOKENS
