"""Plays scenes in a process of its own: `python scenes.py < scenes.json > results.json`.

A scene says which folders of installed plugins are on the import path, and what to do there. Between scenes the path is
put back and plugins are forgotten, so that one process (and one import of torch) serves many.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
import traceback
from typing import Any

#: Top-level names of every plugin of these tests.
OURS = "acme"


def ours() -> list[str]:
    return sorted(name for name in sys.modules if name.startswith(OURS))


def error(e: BaseException) -> dict[str, Any]:
    """All that a test may want to read of an exception."""
    keys = ("plugin", "stage", "reasons", "candidates", "needs", "have", "kind", "name")
    return {
        "error": type(e).__name__,
        "message": str(e),
        "cause": type(e.__cause__).__name__ if e.__cause__ else None,
        "data": {key: e.__dict__[key] for key in keys if key in e.__dict__},
        "traceback": "".join(traceback.format_exception(e)),
    }


def calls() -> dict[str, dict[str, int]]:
    """What the plugins have counted."""
    return {n: dict(vars(sys.modules[n])["CALLS"]) for n in ours() if "CALLS" in vars(sys.modules[n])}


def load(model: str, ids: list[int] | str, save: str | None = None, **arguments: Any) -> dict[str, Any]:
    """Load, complete, and tell everything; `save` also writes a copy."""
    import pluglm

    settings = arguments.pop("settings", {"max_new_tokens": 12})
    lm = pluglm.load(model, device="cpu", **arguments)
    done = lm.complete(ids, **settings)
    done = done[0] if isinstance(done, list) else done
    if save is not None:
        lm.save(save)
    with_ids = lm.model(__import__("torch").tensor([done.token_ids])).logits[0, -1].tolist()
    parts = {c.kind: c.provider for c in lm.plan.choices}
    rejected = {r.provider: list(r.reasons) for c in lm.plan.choices for r in c.rejected}
    return {
        "tokens": list(done.token_ids), "text": done.text, "logits": with_ids, "parts": parts, "rejected": rejected,
        "notes": list(lm.plan.notes), "plan": str(lm.plan), "calls": calls(),
    }  # fmt: skip


def explain(model: str, **arguments: Any) -> dict[str, Any]:
    """The plan alone."""
    import pluglm

    plan = pluglm.explain(model, device="cpu", **arguments)
    return {"plan": str(plan), "parts": {c.kind: c.provider for c in plan.choices}}


def cli(arguments: list[str]) -> dict[str, Any]:
    """The command line, and what it imported."""
    from pluglm.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as e:
            code = e.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "torch": "torch" in sys.modules}


def play(scene: dict[str, Any]) -> dict[str, Any]:
    before = list(sys.path)
    sys.path[1:1] = scene["sites"]
    importlib.invalidate_caches()
    try:
        result = {"load": load, "explain": explain, "cli": cli}[scene["do"]](**scene["with"])
    except Exception as e:  # noqa: BLE001 - the test reads it
        result = error(e)
    result["imported"] = ours()
    sys.path[:] = before
    for name in ours():
        del sys.modules[name]
    return result


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    results = {name: play(scene) for name, scene in wanted.items()}
    json.dump(results, sys.stdout)
