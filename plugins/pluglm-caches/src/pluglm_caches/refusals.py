"""Errors of a cache that is in use: what happened, why, and what to do."""

from __future__ import annotations

from pluglm.errors import CacheError, ContextLengthError, InputError


def full(capacity: int, needed: int, *, held: int) -> ContextLengthError:
    """A pass or a file has more cells than there is room."""
    return ContextLengthError(
        f"The cache has room for {capacity} cells, and {needed} are needed.",
        why=f"{held} are taken and {needed - held} are to be added; nothing was written.",
        fix=f'Make the cache with capacity={needed} or more, send fewer tokens, or choose cache="dynamic".',
        tokens=needed,
        limit=capacity,
    )


def stale(layout: str, operation: str) -> CacheError:
    """A step that is no longer, or never was, the pass under way."""
    return CacheError(
        f"{operation} was called with a step that is not under way.",
        why="it was committed, or a later `begin` or an operation on the cache discarded it.",
        fix="Call `begin`, every `append` and `commit` of a pass before anything else.",
        layout=layout,
        operation=operation,
    )


def moved_on(layout: str, operation: str, length: int, slots: list[int]) -> CacheError:
    """Cells that a query would read after going back are no longer held."""
    return CacheError(
        f"The {layout} cache cannot go back to {length} cells ({operation}).",
        why=f"slots {slots} keep what a window or chunk reaches, and their cells from before that are gone.",
        fix='Go back by fewer cells, raise the option "slack", fork the cache beforehand, or choose "dynamic".',
        layout=layout,
        operation=operation,
    )


def recurrent(layout: str, operation: str) -> CacheError:
    """An operation that a recurrent state cannot follow."""
    return CacheError(
        f"A {layout} cache of this model cannot {operation}.",
        why="the model has recurrent states, and what a state has taken in cannot be taken out of it.",
        fix="Fork the cache before such tokens, or choose a strategy that takes none back.",
        layout=layout,
        operation=operation,
    )


def wrong_slot(slot: int, kind: str, wanted: str) -> InputError:
    """A slot of another kind than the method is for."""
    return InputError(f"Slot {slot} is a {kind} slot, not a {wanted} slot.", argument="slot")
