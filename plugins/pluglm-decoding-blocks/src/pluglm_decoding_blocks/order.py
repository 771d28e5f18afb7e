"""One list of processors out of stages by name and the caller's own, each at its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pluglm.contracts import STAGES, LogitsProcessor, Placed


def in_order(stages: Mapping[str, LogitsProcessor], own: Sequence[LogitsProcessor]) -> list[LogitsProcessor]:
    """Everything in the order of `STAGES`.

    A caller's `Placed` one stands directly before or after its stage, whether or not the stage has anything to do;
    several at one place stand in the caller's order. The others stand at "user".

    Args:
        stages: name in `STAGES` -> what the call does there.
    """
    before: dict[str | None, list[LogitsProcessor]] = {}
    after: dict[str | None, list[LogitsProcessor]] = {}
    users: list[LogitsProcessor] = []
    for process in own:
        if not isinstance(process, Placed):
            users.append(process)
        elif process.before is not None:
            before.setdefault(process.before, []).append(process.process)
        else:
            after.setdefault(process.after, []).append(process.process)
    chain: list[LogitsProcessor] = []
    for name in STAGES:
        chain += before.get(name, [])
        if name in stages:
            chain.append(stages[name])
        if name == "user":
            chain += users
        chain += after.get(name, [])
    return chain
