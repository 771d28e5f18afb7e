"""What the user switched off: a small file of disabled plugins and distributions.

This is the user's own convenience. What an organisation forbids is policy, which this file cannot loosen.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pluglm.errors import InputError, PluginConflictError, PluginError, PluginNotFoundError, SaveError
from pluglm.metadata import normalise
from pluglm.provider import Provider, parse_reference

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class State:
    """The ids (`distribution:kind/name`) and distributions that are disabled."""

    disabled: frozenset[str] = frozenset()

    def is_disabled(self, provider: Provider) -> bool:
        """True if the provider, or its distribution as a whole, is switched off."""
        return provider.id in self.disabled or provider.distribution in self.disabled


def state_path() -> str:
    """plugins.json in $PLUGLM_CONFIG_DIR, else in pluglm in $XDG_CONFIG_HOME or in ~/.config."""
    # Text and os.path: importing pathlib costs a management command as much as finding a thousand plugins.
    own = os.environ.get("PLUGLM_CONFIG_DIR")
    folder = own or os.path.join(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"), "pluglm")
    return os.path.join(folder, "plugins.json")


def load_state(path: str | Path | None = None) -> State:
    """Read the state; an absent file means that nothing is disabled.

    Raises: PluginError if the file cannot be understood. Guessing could load what the user switched off.
    """
    path = path or state_path()
    try:
        with open(path, encoding="utf-8") as file:
            decoded = json.load(file)
        disabled = decoded["disabled"]
        if decoded["schema"] != 1 or not all(isinstance(entry, str) for entry in disabled):
            raise ValueError("it should hold schema 1 and a list 'disabled' of text")
    except FileNotFoundError:
        return State()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise PluginError(
            f"the list of disabled plugins, {path}, cannot be read.",
            why=f"{type(error).__name__}: {error}",
            fix='correct it, or delete it to enable everything: {"schema": 1, "disabled": ["acme-fa3:attention/fa3"]}',
            path=path,
        ) from error
    return State(frozenset(disabled))


def disable(reference: str, providers: Sequence[Provider], *, path: str | Path | None = None) -> str:
    """Switch a plugin or a distribution off and return what was switched off.

    Args:
        reference: a provider or a distribution, as a user names it.
        providers: what is installed.
        path: the state file, the user's if None.
    Raises: PluginNotFoundError, PluginConflictError, InputError, PluginError, SaveError.
    """
    entry = resolve(reference, providers)
    _save(load_state(path).disabled | {entry}, path or state_path())
    return entry


def enable(reference: str, providers: Sequence[Provider], *, path: str | Path | None = None) -> str:
    """Undo `disable`; also for something that is no longer installed. Arguments, result and errors as there."""
    disabled = load_state(path).disabled
    entry = reference if reference in disabled else resolve(reference, providers)
    distribution = entry.partition(":")[0]
    if distribution != entry and distribution in disabled:
        raise PluginError(
            f"{entry} stays disabled.",
            why=f"its distribution {distribution} is disabled as a whole.",
            fix=f"`pluglm plugins enable {distribution}`, then disable what you do not want of it.",
            plugin=entry,
        )
    _save(disabled - {entry}, path or state_path())
    return entry


def resolve(reference: str, providers: Sequence[Provider]) -> str:
    """The id or the distribution that a user means.

    Raises: PluginNotFoundError if nothing installed is called so; PluginConflictError if several are; InputError.
    """
    candidates = {provider.id for provider in find(reference, providers)}
    if normalise(reference) in {provider.distribution for provider in providers}:
        candidates.add(normalise(reference))
    if len(candidates) == 1:
        return candidates.pop()
    if candidates:
        listed = ", ".join(sorted(candidates))
        raise PluginConflictError(
            f"{reference!r} can mean several plugins.",
            why=f"it names {listed}.",
            fix="write one of these in full.",
            candidates=sorted(candidates),
        )
    raise not_found(reference, providers)


def find(reference: str, providers: Iterable[Provider]) -> list[Provider]:
    """The providers that a name or an id means, possibly none. Raises: InputError."""
    parsed = parse_reference(reference)
    if parsed.variant is not None:
        raise InputError(
            f"{reference!r} names a variant of a plugin.",
            why="plugins are managed as a whole; a variant is chosen when a model is loaded.",
            fix=f"leave out ':{parsed.variant}'.",
            argument=reference,
        )
    return [provider for provider in providers if parsed.matches(provider)]


def not_found(reference: str, providers: Sequence[Provider]) -> PluginNotFoundError:
    """The error for a name that nothing installed has, with the names that are near."""
    from difflib import get_close_matches

    known = sorted({name for p in providers for name in (p.name, p.id, p.distribution)})
    near = get_close_matches(reference, known, 3)
    return PluginNotFoundError(
        f"no installed plugin or distribution is called {reference!r}.",
        why=f"near names: {', '.join(near)}." if near else "no name is near it.",
        fix="`pluglm plugins list` shows what is installed.",
        kind=None,
        name=reference,
    )


def _save(disabled: Iterable[str], place: str | Path) -> None:
    from pathlib import Path

    path = Path(place)
    text = json.dumps({"schema": 1, "disabled": sorted(disabled)}, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SaveError(
            f"{path} was not written; what is disabled has not changed.",
            why=str(error),
            fix="make its folder writable, or set PLUGLM_CONFIG_DIR to one that is.",
            path=path,
        ) from error
