"""Reads one field of a call: of the right type and within its range, or a typed error."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pluglm.contracts import GenerationConfig
from pluglm.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def senseless(name: str, value: object, rule: str) -> InputError:
    """The error for a value that breaks the rule of its field."""
    what = f"{name}={value!r} makes no sense: it must be {rule}."
    return InputError(what, fix=f"Pass such a value, or leave {name} out.", argument=name)


def described(value: object) -> str:
    """What a caller's function returned, in a few words: a tensor's shape, another thing's type."""
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" if shape is None else f"a tensor of shape {tuple(shape)}"


def said(config: GenerationConfig, name: str) -> Any:
    """The field of `config`, own or extra; None: not said."""
    return config.extra.get(name) if name in config.extra else getattr(config, name, None)


def number(
    config: GenerationConfig, name: str, *, least: float | None = None, above: float | None = None,
    most: float | None = None, below: float | None = None,
) -> float | None:  # fmt: skip
    """A finite number within these bounds, or None."""
    value = said(config, name)
    if value is None:
        return None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    bounds = ((">=", least), (">", above), ("<=", most), ("<", below))
    if fits:
        fits = all((
            least is None or value >= least, above is None or value > above,
            most is None or value <= most, below is None or value < below,
        ))  # fmt: skip
    if not fits:
        limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        raise senseless(name, value, f"a number {limits}" if limits else "a finite number")
    return float(value)


def whole(config: GenerationConfig, name: str, least: int = 0) -> int | None:
    """An integer >= least, or None."""
    value = said(config, name)
    if value is not None and (type(value) is not int or value < least):
        raise senseless(name, value, f"an integer >= {least}")
    return value


def flag(config: GenerationConfig, name: str) -> bool:
    """True or False; not said: False."""
    value = said(config, name)
    if value is not None and not isinstance(value, bool):
        raise senseless(name, value, "True or False")
    return bool(value)


def token_ids(config: GenerationConfig, name: str) -> tuple[int, ...]:
    """An id or a sequence of them; not said: none."""
    value = said(config, name)
    if value is None:
        return ()
    found = (value,) if type(value) is int else value
    if not _are_ids(found):
        raise senseless(name, value, "the id of a token, or a list of ids")
    return tuple(found)


def words(config: GenerationConfig, name: str) -> tuple[tuple[int, ...], ...]:
    """A list of lists of token ids, none of them empty; not said: none."""
    value = said(config, name)
    if value is None:
        return ()
    if not (isinstance(value, list | tuple) and value and all(_are_ids(word) and len(word) for word in value)):
        raise senseless(name, value, "a list of lists of token ids, none of them empty")
    return tuple(tuple(word) for word in value)


def biases(config: GenerationConfig, name: str) -> dict[tuple[int, ...], float]:
    """Sequences of ids and a number for each: {(5, 7): -2.0}, or [[[5, 7], -2.0]] as JSON has it; not said: none.

    Keys may be texts such as "(5, 7)" too: so JSON files spell them that were written from the first form.
    """
    value = said(config, name)
    if value is None:
        return {}
    pairs: Sequence[Any] = list(value.items()) if isinstance(value, Mapping) else value
    found = {}
    rule = "{(ids of a sequence): number}, or [[[ids], number], …], and not empty"
    if not isinstance(pairs, list | tuple) or not pairs:
        raise senseless(name, value, rule)
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise senseless(name, value, rule)
        ids = _spelled(pair[0]) if isinstance(pair[0], str) else pair[0]
        bias = pair[1]
        added = isinstance(bias, int | float) and not isinstance(bias, bool) and bias < math.inf
        if not (_are_ids(ids) and len(ids) and added):
            raise senseless(name, value, rule)
        found[tuple(ids)] = float(bias)
    return found


def _are_ids(value: Any) -> TypeIs[list[int] | tuple[int, ...]]:
    return isinstance(value, list | tuple) and all(type(i) is int and i >= 0 for i in value)


def _spelled(key: str) -> tuple[int, ...] | None:
    """The ids of "(5, 7)", "5,7" or "(5,)"; None if the text is no such thing."""
    if not re.fullmatch(r"\(?\s*\d+(\s*,\s*\d+)*\s*,?\s*\)?", key):
        return None
    return tuple(int(part) for part in re.findall(r"\d+", key))
