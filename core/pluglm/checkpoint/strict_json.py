"""JSON as the checkpoint files may use it: no duplicate keys, no NaN, a size limit, and one object at the top.

Python's own reader lets the last of two equal keys win and accepts `NaN`; two readers of one file could then disagree
about what it says.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pluglm.errors import ConfigError

_MAX_BYTES = 100_000_000


class JsonError(ValueError):
    """The text is not JSON as it is accepted here; the message is one clause that says why."""


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection inside: what a large file becomes is all live, and looking through it doubles the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonError(f"the key {key!r} stands twice in one object")
            seen.add(key)
    return found


def _constant(text: str) -> Any:
    raise JsonError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if value - value != 0.0:  # infinite: the literal, such as 1e400, does not fit a double
        raise JsonError(f"the number {text[:40]} does not fit a double")
    return value


def _constant_or_infinity(text: str) -> Any:
    return {"__float__": "Infinity"} if text == "Infinity" else _constant(text)


def parse_object(raw: bytes, *, infinity: bool = False) -> dict[str, Any]:
    """Parse UTF-8 bytes that must hold one JSON object.

    Args:
        infinity: accept `Infinity`, as Transformers 4 wrote a limit that is none, and read it as 5 spells it:
            {"__float__": "Infinity"}. So it never passes for a number where none was expected.
    Raises: JsonError with the reason, whatever is wrong with the bytes.
    """
    constant = _constant_or_infinity if infinity else _constant
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=constant, parse_float=_finite)
    except JsonError:
        raise
    except UnicodeDecodeError as e:
        raise JsonError(f"byte {e.start} is not UTF-8") from e
    except RecursionError as e:
        raise JsonError("its brackets are nested too deeply") from e
    except ValueError as e:  # JSONDecodeError, and integers with more digits than Python reads
        raise JsonError(str(e)) from e
    if not isinstance(value, dict):
        raise JsonError(f"the top level is a {type(value).__name__}, not an object")
    return value


def read_object(path: Path, *, max_bytes: int = _MAX_BYTES, infinity: bool = False) -> dict[str, Any]:
    """Read a JSON file that must hold one object.

    Args:
        infinity: as in `parse_object`.
    Raises: ConfigError with `.path` if it cannot be read, is larger than `max_bytes` or is not strict JSON.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except OSError as e:
        raise ConfigError(
            f'"{path}" cannot be read.',
            why=e.strerror or str(e),
            fix="Check the file and its permissions, or download the model again.",
            path=str(path),
            key=None,
        ) from e
    if len(raw) > max_bytes:
        raise ConfigError(
            f'"{path}" is too large.',
            why=f"Expected at most {max_bytes:,} bytes, found more.",
            fix="Such a file does not belong to a language model; download the model again.",
            path=str(path),
            key=None,
        )
    try:
        return parse_object(raw, infinity=infinity)
    except JsonError as e:
        raise ConfigError(
            f'"{path}" is not a JSON object as expected.',
            why=f"Expected one object with unique keys and finite numbers; found: {e}.",
            fix="Repair the file, or download the model again.",
            path=str(path),
            key=None,
        ) from e
