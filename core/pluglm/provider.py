"""What is known of a provider before anything of it is imported, and the ways users name one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pluglm.errors import InputError
from pluglm.kinds import KINDS
from pluglm.metadata import MalformedError, normalise, read_file

_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]*")


def is_name(text: str) -> bool:
    """True if `text` may name a provider: letters and digits, with `._-` between them."""
    return _PART.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Provider:
    """One entry point of one installed distribution.

    Attributes:
        kind, name: "attention" and "sdpa"; together with the distribution they are the identity.
        distribution: its name, normalised as in PEP 503.
        version: its version, as the metadata gives it.
        target: the entry point's value, "package.module" or "package.module:object".
        location: the metadata directory (`….dist-info` or `….egg-info`).
        facts: what `pluglm.json` says about this provider, as read, not validated. None: it says nothing, so the
            provider works when named and `auto` never chooses it.
        manifest_path: the `pluglm.json` that was found, whether or not it was of use.
    """

    kind: str
    name: str
    distribution: str
    version: str
    target: str
    location: str
    facts: Mapping[str, Any] | None = field(default=None, hash=False)
    manifest_path: str | None = None

    @property
    def id(self) -> str:
        """The identity, `distribution:kind/name`."""
        return f"{self.distribution}:{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that discovery stepped over.

    Attributes:
        stage: "path", "metadata", "entry points", "manifest" or "duplicate".
        subject: the file, directory or distribution it is about.
        message: what is wrong and what to do, one or two sentences.
    """

    stage: str
    subject: str
    message: str


class Facts(Mapping[str, Any]):
    """What a manifest says about one provider, read when first looked at.

    If the manifest has meanwhile gone or no longer speaks of the provider, the mapping is empty: an empty mapping has
    no `api`, and a provider without it is refused.

    Args:
        path: the manifest.
        kind, name, distribution: the provider.
        known: the facts, if they have been read already.
    """

    __slots__ = ("_key", "_path", "_value")

    def __init__(
        self, path: str, kind: str, name: str, distribution: str, known: Mapping[str, Any] | None = None
    ) -> None:
        self._path = path
        self._key = (kind, name, distribution)
        self._value = known

    def _decoded(self) -> Mapping[str, Any]:
        if self._value is None:
            kind, name, distribution = self._key
            try:
                self._value = facts_in(read_file(self._path)[0], distribution).get((kind, name), {})
            except (OSError, MalformedError):
                self._value = {}
        return self._value

    def __getitem__(self, key: str) -> Any:
        return self._decoded()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())

    def __len__(self) -> int:
        return len(self._decoded())

    def __repr__(self) -> str:
        return repr(self._decoded())


def facts_in(manifest: bytes, distribution: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The providers in a manifest by (kind, name), checked no further than that.

    Raises: MalformedError if it is not a manifest, of another schema, or of another distribution.
    """
    try:
        decoded = json.loads(manifest)
        owner, schema = decoded["distribution"], decoded["schema"]
        found = {(facts["kind"], facts["name"]): facts for facts in decoded["providers"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedError(f"it is not a manifest ({type(error).__name__}: {error}).") from error
    if schema != 1:
        raise MalformedError(f"it has the schema {schema!r}; this pluglm reads 1.")
    if not isinstance(owner, str) or normalise(owner) != distribution:
        raise MalformedError(f"it is that of the distribution {owner!r}, not of {distribution!r}.")
    return found


@dataclass(frozen=True, slots=True)
class Reference:
    """A provider as a user names it: `[distribution:][kind/]name[:variant]`, taken apart."""

    distribution: str | None
    kind: str | None
    name: str
    variant: str | None = None

    def matches(self, provider: Provider) -> bool:
        """True if `provider` is one that this reference may mean."""
        return (
            provider.name == self.name
            and self.kind in (None, provider.kind)
            and self.distribution in (None, provider.distribution)
        )


def parse_reference(text: str) -> Reference:
    """Take apart what a user typed.

    Args:
        text: `sdpa`, `quantized:hqq` (name and variant), `attention/fa3`, `acme-fa3:attention/fa3` or
            `acme-fa3:attention/fa3:variant`.
    Raises: InputError if it is none of these, or names a kind that does not exist.
    """
    before, slash, after = text.rpartition("/")
    distribution, colon, kind = before.rpartition(":")
    name, variant_colon, variant = after.partition(":")
    well_formed = (
        _PART.fullmatch(name)
        and (not variant_colon or _VARIANT.fullmatch(variant))
        and (not slash or _PART.fullmatch(kind))
        and (not colon or _PART.fullmatch(distribution))
    )
    if not well_formed:
        raise InputError(
            f"{text!r} does not name a plugin.",
            why="a name is made of letters and digits, with '.', '_' or '-' between them.",
            fix="write a name (sdpa), a name and a variant (quantized:hqq), "
            "or an id (acme-fa3:attention/fa3) as `pluglm plugins list` prints it.",
            argument=text,
        )
    if slash and kind not in KINDS:
        raise InputError(
            f"{text!r} names the kind {kind!r}, which does not exist.",
            why=f"there are {', '.join(KINDS)}.",
            fix=f"write one of these before the slash{_nearest(kind, KINDS)}.",
            argument=text,
        )
    return Reference(normalise(distribution) if colon else None, kind if slash else None, name, variant or None)


def _nearest(word: str, known: Mapping[str, object]) -> str:
    from difflib import get_close_matches

    return "".join(f" ({near!r} is near)" for near in get_close_matches(word, known, 1))
