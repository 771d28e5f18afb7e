"""Native code that panics raises something that is no Exception; here it becomes a typed error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pluglm.errors import PluglmError


@contextmanager
def fenced(error: Callable[[str], PluglmError]) -> Iterator[None]:
    """Turn whatever the `tokenizers` library raises, Rust panics included, into `error(reason)`."""
    try:
        yield
    except (PluglmError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as e:  # PanicException derives from BaseException
        raise error(f"{type(e).__name__}: {e}") from e
