"""Programs as trees: a copy with one thing changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from pluglm.contracts import DecoderProgram, Rope

#: From a program to the program with one thing changed, or None if the program does not have it.
Knob = Callable[[DecoderProgram], DecoderProgram | None]
Weights = dict[str, Tensor]


def rewrite(node: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a tree of dataclasses and tuples with `change` applied to each dataclass, leaves first."""
    if isinstance(node, tuple):
        return tuple(rewrite(item, change) for item in node)
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return node
    fields = {f.name: rewrite(getattr(node, f.name), change) for f in dataclasses.fields(node)}
    return change(replace(node, **fields))


def nodes(node: Any) -> Iterator[Any]:
    """Every dataclass of a tree."""
    if isinstance(node, tuple):
        for item in node:
            yield from nodes(item)
    elif dataclasses.is_dataclass(node):
        yield node
        for field in dataclasses.fields(node):
            yield from nodes(getattr(node, field.name))


def on(kind: type, change: Callable[[Any], Any]) -> Knob:
    """Change every node of one kind; None if nothing changes."""

    def broken(program: DecoderProgram) -> DecoderProgram | None:
        result: DecoderProgram = rewrite(program, lambda node: change(node) if isinstance(node, kind) else node)
        return None if result == program else result

    return broken


def field(kind: type, name: str, value: Callable[[Any], Any]) -> Knob:
    """Change one field of every node of one kind."""
    return on(kind, lambda node: replace(node, **{name: value(getattr(node, name))}))


def parameter(name: str, value: Callable[[Any], Any]) -> Knob:
    """Change one of the numbers of the rotary positions."""

    def change(rope: Rope) -> Rope:
        return replace(rope, parameters=tuple((k, value(v) if k == name else v) for k, v in rope.parameters))

    return on(Rope, change)


def without(name: str) -> Knob:
    """Leave one of the numbers of the rotary positions out, so that the method's default stands in."""
    return on(Rope, lambda rope: replace(rope, parameters=tuple(p for p in rope.parameters if p[0] != name)))
