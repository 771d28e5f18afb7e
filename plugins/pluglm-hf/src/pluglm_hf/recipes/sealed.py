"""Reads the files of a vendored recipe from its package, and refuses them if they are not what was consented to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from types import MappingProxyType
from typing import Any

from pluglm.errors import PluginError
from pluglm.vendored import ENTRY, RECORD, file_table, is_recipe_file, table_digest


@dataclass(frozen=True)
class Sealed:
    """A recipe whose every file has the digest that was recorded when it was vendored.

    Attributes:
        package: the import package it lies in. source: "hub:org/repo@commit" or "dir:name".
        repo: "org/repo", or the directory's name. commit: 40 hex digits; None for a directory. These three are what
            the record says; the digest is over the files alone.
        digest: over the table of files; see `pluglm.vendored.table_digest`.
        files: "custom_generate/generate.py" → content, as fetched.
    """

    package: str
    source: str
    repo: str
    commit: str | None
    digest: str
    files: Mapping[str, bytes]


def read_sealed(package: str) -> Sealed:
    """The recipe of an installed package, read once and checked; what is run must be these bytes.

    Args:
        package: the import package that `pluglm vendor` made ("pluglm_recipe_dola").
    Raises: PluginError, whose `.path` is the file, if its record is not one, a file is absent, changed or not listed,
        or the digest over all of them is another.
    """
    place = files(package)
    record = _record(package, place.joinpath(RECORD))
    table: Mapping[str, str] = record["files"]
    for extra in sorted(set(_listed(place.joinpath("recipe"), "")) - table.keys()):
        raise _broken(package, f"recipe/{extra}", "it is not in the list of the files that were vendored.")
    content = {name: _content(package, place, name) for name in table}
    for name, found in file_table(content).items():
        if found != table[name]:
            raise _broken(package, f"recipe/{name}", f"its sha256 is {found}, and {table[name]} was vendored.")
    if table_digest(table) != record["digest"]:
        raise _broken(
            package, RECORD, f"it says the digest {record['digest']}, and its files have {table_digest(table)}."
        )
    return Sealed(
        package, record["source"], record["repo"], record["commit"], record["digest"], MappingProxyType(content)
    )


def _record(package: str, path: Traversable) -> Mapping[str, Any]:
    """What recipe.json says, its form checked."""
    try:
        record = json.loads(path.read_bytes())
        table = record["files"]
        well_formed = (
            all(isinstance(record[key], str) for key in ("source", "repo", "digest"))
            and isinstance(record["commit"], str | None)
            and isinstance(table, dict)
            and all(is_recipe_file(name) and isinstance(value, str) for name, value in table.items())
            and ENTRY in table
        )
        schema = record["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _broken(package, RECORD, f"it cannot be read ({type(error).__name__}: {error}).") from error
    if schema != 1:
        raise _broken(package, RECORD, f"it has the schema {schema!r}; this pluglm-hf reads 1.")
    if not well_formed:
        raise _broken(package, RECORD, "it is not of the form that `pluglm vendor` writes.")
    found: Mapping[str, Any] = record
    return found


def _content(package: str, place: Traversable, name: str) -> bytes:
    try:
        return place.joinpath("recipe", *name.split("/")).read_bytes()
    except OSError as error:
        raise _broken(package, f"recipe/{name}", f"it cannot be read: {error.strerror}.") from error


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


def _broken(package: str, path: str, why: str) -> PluginError:
    owner = package.replace("_", "-")  # as `pluglm vendor` names the two
    return PluginError(
        f"{path} of {owner} is not as it was vendored; nothing of the recipe was run.",
        why=why,
        fix=f"Uninstall {owner}, look at who changed it, and vendor it again: `pluglm vendor SOURCE --install`.",
        plugin=owner, path=path,
    )  # fmt: skip
