"""Compares the files of a vendored package with the digests that were recorded when somebody consented to them.

Recipes and kernels are sealed in one way: a record in JSON beside `__init__.py`, and the files below one folder.
Nothing here imports or runs a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any

from pluglm.errors import PluginError
from pluglm.vendored import table_digest

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Form:
    """What one kind of vendored package looks like.

    Attributes:
        noun: for messages ("recipe"). record: name of the record. folder: what the files lie in, inside the package.
        is_file: whether a name can be a file's. has_entry: whether the names together can be used.
        keeps: whether the content of a file is wanted; the others are compared, and not held in memory. None: all.
    """

    noun: str
    record: str
    folder: str
    is_file: Callable[[str], bool]
    has_entry: Callable[[Mapping[str, str]], bool]
    keeps: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Sealed:
    """A package whose every file has the digest that was recorded when it was vendored.

    Attributes:
        package: the import package it lies in. source: "hub:org/repo@commit" or "dir:name".
        repo: "org/repo", or the directory's name. commit: 40 hex digits; None for a directory. These three are what
            the record says; the digest is over the files alone.
        digest: over the table of files; see `pluglm.vendored.table_digest`.
        table: name → sha256. files: name → content, as fetched, of those that the form keeps.
        record: everything that the record says.
    """

    package: str
    source: str
    repo: str
    commit: str | None
    digest: str
    table: Mapping[str, str]
    files: Mapping[str, bytes]
    record: Mapping[str, Any]


def read_sealed(package: str, form: Form) -> Sealed:
    """The files of an installed package, read once and checked; what is run must be these bytes.

    Args:
        package: the import package that `pluglm vendor` made ("pluglm_recipe_dola").
    Raises: PluginError, whose `.path` is the file, if its record is not one, a file is absent, changed or not listed,
        or the digest over all of them is another.
    """
    record = read_record(package, form)
    place = files(package).joinpath(form.folder)
    table: Mapping[str, str] = record["files"]
    for extra in sorted(set(_listed(place, "")) - table.keys()):
        raise broken(package, form, f"{form.folder}/{extra}", "it is not in the list of the files that were vendored.")
    content: dict[str, bytes] = {}
    for name in sorted(table):
        found, data = _digest(package, form, place, name)
        if found != table[name]:
            raise broken(
                package, form, f"{form.folder}/{name}", f"its sha256 is {found}, and {table[name]} was vendored."
            )
        if data is not None:
            content[name] = data
    if table_digest(table) != record["digest"]:
        why = f"it says the digest {record['digest']}, and its files have {table_digest(table)}."
        raise broken(package, form, form.record, why)
    return Sealed(
        package, record["source"], record["repo"], record["commit"], record["digest"], MappingProxyType(dict(table)),
        MappingProxyType(content), MappingProxyType(dict(record)),
    )  # fmt: skip


def read_record(package: str, form: Form) -> Mapping[str, Any]:
    """What the record of a package says, its form checked and its files not. Raises: PluginError."""
    try:
        record = json.loads(files(package).joinpath(form.record).read_bytes())
        table = record["files"]
        well_formed = (
            all(isinstance(record[key], str) for key in ("source", "repo", "digest"))
            and isinstance(record["commit"], str | None)
            and isinstance(table, dict)
            and all(form.is_file(name) and isinstance(value, str) for name, value in table.items())
            and form.has_entry(table)
        )
        schema = record["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise broken(package, form, form.record, f"it cannot be read ({type(error).__name__}: {error}).") from error
    if schema != 1:
        raise broken(package, form, form.record, f"it has the schema {schema!r}; this release of pluglm reads 1.")
    if not well_formed:
        raise broken(package, form, form.record, "it is not of the form that `pluglm vendor` writes.")
    found: Mapping[str, Any] = record
    return found


def broken(package: str, form: Form, path: str, why: str) -> PluginError:
    """The error for a file that is not what was consented to."""
    owner = package.replace("_", "-")  # as `pluglm vendor` names the two
    option = "" if form.noun == "recipe" else f" --{form.noun}"
    return PluginError(
        f"{path} of {owner} is not as it was vendored; nothing of the {form.noun} was run.",
        why=why,
        fix=f"Uninstall {owner}, look at who changed it, and vendor it again: "
        f"`pluglm vendor SOURCE{option} --install`.",
        plugin=owner, path=path,
    )  # fmt: skip


def _digest(package: str, form: Form, place: Traversable, name: str) -> tuple[str, bytes | None]:
    """sha256 of a file, and its content if that is wanted: both of the same bytes, read once."""
    try:
        with place.joinpath(*name.split("/")).open("rb") as file:
            if form.keeps is None or form.keeps(name):
                data = file.read()
                return hashlib.sha256(data).hexdigest(), data
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
            return digest.hexdigest(), None
    except OSError as error:
        raise broken(package, form, f"{form.folder}/{name}", f"it cannot be read: {error.strerror}.") from error


def _listed(folder: Traversable, prefix: str) -> Iterator[str]:
    """Names of all files below a folder, but those that Python compiled."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            if entry.name != "__pycache__":
                yield from _listed(entry, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name
