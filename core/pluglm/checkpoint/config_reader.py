"""Reads a model's config and accounts for every key: used, ignored with a reason, or refused.

A key that nobody reads may be one that changes the numbers (a scaled RoPE, a soft cap, a window); dropping it gives
fluent, wrong text. So an architecture states what it assumes in the file's own terms, and `finish` refuses the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pluglm.checkpoint.neutral import NEUTRAL
from pluglm.errors import ConfigError


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


#: Default of `take` and `choice`: the key must be there.
REQUIRED: Final = _Required()

Type = type | tuple[type, ...]


@dataclass(frozen=True)
class ConfigReport:
    """What became of every key. Keys of nested objects are dotted ("rope_parameters.factor").

    Attributes:
        used: read by the architecture.
        ignored: key → why it does not matter.
        dropped: keys that start with an underscore, which Transformers writes for itself.
    """

    used: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


class ConfigReader:
    """Reads one JSON object key by key. `null` counts as absent: that is how these files write "not set".

    Args:
        config: the parsed object; it is not changed.
        path: the file, for messages.
        model_type: for messages; None: the config's own.
    """

    def __init__(self, config: Mapping[str, Any], *, path: Any = None, model_type: str | None = None) -> None:
        self._config = config
        self._path = str(path) if path is not None else None
        self.model_type: str | None = model_type if model_type is not None else config.get("model_type")
        self._prefix = ""
        self._used: dict[str, None] = {"model_type": None} if "model_type" in config else {}
        self._ignored: dict[str, str] = {}
        self._subs: dict[str, ConfigReader] = {}

    def __contains__(self, key: str) -> bool:
        return self._config.get(key) is not None

    def take(self, key: str, type: Type, default: Any = REQUIRED) -> Any:  # noqa: A002 - reads as English at the call
        """The value of a key, of the type that is expected.

        Args:
            type: a type or a tuple of types; an int is accepted for float, and a bool is never an int.
            default: given back if the key is absent or null.
        Raises: ConfigError if it is absent and required, or of another type.
        """
        self._used[key] = None
        value = self._config.get(key)
        if value is None:
            if default is REQUIRED:
                raise self._error(
                    key,
                    f'lacks "{self._prefix}{key}"',
                    f"Expected {_names(type)}, found {'null' if key in self._config else 'no such key'}.",
                    "Download the model again; if the key is missing there too, the file is for another architecture.",
                )
            return default
        types = type if isinstance(type, tuple) else (type,)
        if isinstance(value, bool):
            fits = bool in types or object in types
        else:
            fits = isinstance(value, types) or (isinstance(value, int) and float in types)
        if not fits:
            raise self._error(
                key,
                f'has a "{self._prefix}{key}" of the wrong type',
                f"Expected {_names(type)}, found {_show(value)}.",
                "Correct the file, or download the model again.",
            )
        if isinstance(value, int) and not isinstance(value, types):
            return float(value)
        return value

    def choice(self, key: str, allowed: Collection[Any], default: Any = REQUIRED) -> Any:
        """The value of a key, one of `allowed`. Raises ConfigError naming all of them."""
        value = self.take(key, object, default)
        if key in self and not any(_same(value, choice) for choice in allowed):
            raise self._error(
                key,
                f"asks for {self._prefix}{key} = {_show(value)}",
                f"Expected one of {', '.join(map(_show, allowed))}.",
                "Use a plugin that supports it (`pluglm plugins`), or another model.",
            )
        return value

    def expect(self, key: str, value: Any, reason: str) -> None:
        """State that the architecture does only one thing: the key is absent or has this value.

        Raises: ConfigError with what was found, what is supported, and `reason`.
        """
        self._used[key] = None
        found = self._config.get(key)
        if found is not None and not _same(found, value):
            raise self._error(
                key,
                f"asks for {self._prefix}{key} = {_show(found)}",
                f"Supported is {_show(value)}: {reason}",
                "Use a plugin that supports it (`pluglm plugins`), or another model.",
            )

    def ignore(self, key: str, reason: str) -> None:
        """Say that a key, whatever its value, does not change what this architecture computes, and why."""
        if key in self._config:
            self._ignored[key] = reason

    def sub(self, key: str) -> ConfigReader | None:
        """A reader of a nested object, whose keys `finish` accounts for too; None if it is absent or null."""
        if key not in self._subs:
            value = self.take(key, dict, None)
            if value is None:
                return None
            reader = ConfigReader(value, path=self._path, model_type=self.model_type)
            reader._prefix = f"{self._prefix}{key}."
            self._subs[key] = reader
        return self._subs[key]

    def finish(self) -> ConfigReport:
        """Account for every key.

        Raises: ConfigError listing all keys that nobody used, and the neutral ones whose value is not the neutral one.
        """
        used: list[str] = []
        ignored: dict[str, str] = {}
        dropped: list[str] = []
        refused: dict[str, str] = {}
        self._account(used, ignored, dropped, refused)
        if refused:
            raise self._error(
                next(iter(refused)).removeprefix(self._prefix),
                "says what nothing here can honour: " + ", ".join(f'"{key}"' for key in refused),
                "\n".join(f"{key}: {reason}" for key, reason in refused.items())
                + "\nA key that changes the numbers would be lost in silence, so the model is refused.",
                "Use a plugin whose architecture reads these keys. If you know that a key does not matter, "
                "remove it from the file; if it never matters, ask the plugin's author to ignore it by name.",
                keys=tuple(refused),
            )
        return ConfigReport(tuple(used), ignored, tuple(dropped))

    def _account(self, used: list[str], ignored: dict[str, str], dropped: list[str], refused: dict[str, str]) -> None:
        for key, value in self._config.items():
            full = self._prefix + key
            neutral = NEUTRAL.get(key) if not self._prefix else None
            if key in self._used:
                used.append(full)
            elif key in self._ignored:
                ignored[full] = self._ignored[key]
            elif neutral is not None and neutral.allows(value):
                ignored[full] = neutral.reason
            elif neutral is not None:
                values = ", ".join(map(_show, neutral.values or (None,)))
                refused[full] = f"{_show(value)} is not supported, only {values}: {neutral.reason}"
            elif key.startswith("_"):
                dropped.append(full)
            else:
                refused[full] = f"{_show(value)} is read by nobody"
        for reader in self._subs.values():
            reader._account(used, ignored, dropped, refused)

    def _error(self, key: str, what: str, why: str, fix: str, **data: Any) -> ConfigError:
        subject = f'"{self._path}"' if self._path else "The config"
        kind = f" (model_type {self.model_type!r})" if self.model_type else ""
        full = self._prefix + key
        return ConfigError(f"{subject}{kind} {what}.", why=why, fix=fix, key=full, path=self._path, **data)


def _same(found: Any, value: Any) -> bool:
    """Equal, and not a bool on one side only: in Python True == 1."""
    return bool(found == value) and isinstance(found, bool) == isinstance(value, bool)


def _names(expected: Type) -> str:
    return " or ".join(one.__name__ for one in (expected if isinstance(expected, tuple) else (expected,)))


def _show(value: Any) -> str:
    try:
        text = ascii(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a very long number"
    return text if len(text) <= 80 else text[:77] + "..."
