"""Reads a quantization_config: each key is used, ignored on purpose, or refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pluglm.errors import ConfigError

T = TypeVar("T")
ROOT = "quantization_config"


class Settings:
    """One mapping of the config. Every key must have been taken or ignored when `done` is called."""

    def __init__(self, held: Any, where: str = ROOT) -> None:
        self._where = where
        if not isinstance(held, Mapping) or not all(isinstance(key, str) for key in held):
            raise refused(where, f"it is {held!r}", "it must be a mapping of settings.")
        self._held, self._left = held, set(held)

    def take(self, key: str, kind: type[T] | tuple[type[T], ...], default: T | None = None) -> T | None:
        """The value of a key, or `default` where it is absent or null. Raises ConfigError for another type."""
        self._left.discard(key)
        value = self._held.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.refused(key, f"it is {value!r}", f"expected {_names(kind)}.")
        return value

    def one_of(self, key: str, allowed: Collection[Any], default: Any, why: str = "") -> Any:
        """A value out of a list. Raises ConfigError, with `why`, for any other."""
        self._left.discard(key)
        value = self._held.get(key)
        value = default if value is None else value
        if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
            raise self.refused(key, f"it is {value!r}", why or f"known are {', '.join(repr(a) for a in allowed)}.")
        return value

    def part(self, key: str) -> Settings | None:
        """A mapping inside, or None."""
        self._left.discard(key)
        value = self._held.get(key)
        return None if value is None else Settings(value, f"{self._where}.{key}")

    def parts(self, key: str) -> dict[str, Settings]:
        """A mapping of mappings; empty where it is absent."""
        self._left.discard(key)
        inside = Settings(self._held.get(key) or {}, f"{self._where}.{key}")
        return {name: Settings(value, f"{self._where}.{key}.{name}") for name, value in inside._held.items()}

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where it is absent."""
        self._left.discard(key)
        value = self._held.get(key)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.refused(key, f"it is {value!r}", "expected a list of names.")
        return tuple(value)

    def empty(self, key: str, why: str) -> None:
        """A key that must be absent, null, false or empty. Raises ConfigError with the reason."""
        self._left.discard(key)
        if self._held.get(key):
            raise self.refused(key, f"it is {self._held[key]!r}", why)

    def done(self, ignored: Collection[str]) -> None:
        """Raise ConfigError for the first key that nothing has read. ignored: keys that change no number."""
        for key in sorted(self._left - set(ignored)):
            raise self.refused(
                key, f"it is {self._held[key]!r}", "nothing here reads this key, and it may change numbers."
            )

    def refused(self, key: str, what: str, why: str) -> ConfigError:
        """The error of one key."""
        return refused(f"{self._where}.{key}", what, why)


def refused(key: str, what: str, why: str) -> ConfigError:
    """The error of a key: what it holds, and why that cannot be read."""
    return ConfigError(
        f"{key} cannot be honoured: {what}.", why=why,
        fix="Correct config.json if it is wrong, or use a copy of the model that is packed otherwise or not at all.",
        key=key,
    )  # fmt: skip


def _names(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(k.__name__ for k in kinds)
