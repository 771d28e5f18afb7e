"""Errors that several rooms here raise: an argument nobody reads, and one that nothing here can honour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from pluglm.errors import InputError, UnsupportedRequestError


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for an argument that `what` does not have."""
    names = sorted(known)
    near = get_close_matches(name, names, 1)
    return InputError(
        f"{what} has no argument {name!r}.", why="an argument that is ignored changes results in silence.",
        fix=f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(names)}.", argument=name,
    )  # fmt: skip


def unsupported(argument: str, value: object, why: str, fix: str) -> UnsupportedRequestError:
    """The error for an argument that is known and cannot be honoured."""
    return UnsupportedRequestError(
        f"{argument}={value!r} cannot be honoured.", why=why, fix=fix, reasons=(why,), argument=argument
    )


def refuse_said(table: Mapping[str, tuple[str, str]], said: Mapping[str, object]) -> None:
    """Raise for the first argument of `table` that was said. table: name -> why, and what to do instead."""
    for name, (why, fix) in table.items():
        if said.get(name) not in (None, False):
            raise unsupported(name, said[name], why, fix)
