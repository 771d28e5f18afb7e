"""Makes `pluglm.json` from the `[tool.pluglm]` table of a plugin's pyproject.toml."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pluglm.errors import ManifestError, SaveError
from pluglm.kinds import GROUPS, KINDS
from pluglm.manifest import parse_manifest


@dataclass(frozen=True, slots=True)
class Prepared:
    """A manifest that is ready to be written.

    Attributes:
        path: where it belongs, beside the package's `__init__.py`.
        text: the JSON.
        warnings: entry points that the table says nothing about, one sentence each.
    """

    path: Path
    text: str
    warnings: tuple[str, ...]

    @property
    def stale(self) -> bool:
        """True if the file is absent or holds something else."""
        try:
            return self.path.read_text("utf-8") != self.text
        except (OSError, UnicodeDecodeError):
            return True


def build_manifest(pyproject: Path) -> Path:
    """Write the `pluglm.json` that `pyproject` describes and return its path; see `prepare_manifest`.

    Raises: ManifestError if the table is wrong; SaveError if the file cannot be written (the old one is intact).
    """
    prepared = prepare_manifest(pyproject)
    write_manifest(prepared)
    return prepared.path


def write_manifest(prepared: Prepared) -> None:
    """Write the file, whole or not at all. Raises: SaveError."""
    temporary = prepared.path.with_name(f".{prepared.path.name}.{os.getpid()}")
    try:
        temporary.write_text(prepared.text, "utf-8")
        temporary.replace(prepared.path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SaveError(
            f"{prepared.path} was not written.", why=str(error), fix="make the folder writable.", path=prepared.path
        ) from error


def provides_nothing(pyproject: Path) -> bool:
    """True for a package that announces no provider and describes none, such as a library of a plugin's parts.

    Raises: ManifestError if the file cannot be read.
    """
    decoded = _read(pyproject / "pyproject.toml" if pyproject.is_dir() else pyproject)
    project, tool = decoded.get("project"), decoded.get("tool")
    return (
        isinstance(project, Mapping)
        and not _entry_points(project)
        and not (isinstance(tool, Mapping) and "pluglm" in tool)
    )


def prepare_manifest(pyproject: Path) -> Prepared:
    """Read the table, check it against the entry points, and render the JSON.

    Args:
        pyproject: a pyproject.toml, or the folder it lies in.
    Raises: ManifestError if the file, the table or the package is not as it should be.
    """
    if pyproject.is_dir():
        pyproject = pyproject / "pyproject.toml"
    project, table = _tables(pyproject)
    points = _entry_points(project)
    raw = {"schema": 1, "distribution": project.get("name"), **table}
    manifest = parse_manifest(raw, f"[tool.pluglm] of {pyproject}")
    described = {(facts.kind, facts.name) for facts in manifest.providers}
    for kind, name in sorted(described - points.keys()):
        group = f'[project.entry-points."{KINDS[kind].group}"]'
        raise ManifestError(
            f"{pyproject} describes {kind}/{name}, but announces no such plugin.",
            why=f"{group} has no entry {name!r}.",
            fix=f'add `{name} = "package.module"` to {group}, or remove the table of {name!r}.',
            path=pyproject,
        )
    warnings = tuple(
        f"{kind}/{name} has no table in [[tool.pluglm.providers]]: it works when named, `auto` never chooses it."
        for kind, name in sorted(points.keys() - described)
    )
    text = manifest.model_dump_json(by_alias=True, exclude_defaults=True, indent=2)
    body = {"schema": 1, **json.loads(text)}
    return Prepared(_package(pyproject, points) / "pluglm.json", json.dumps(body, indent=2) + "\n", warnings)


def _tables(pyproject: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    decoded = _read(pyproject)
    return _table(decoded, ("project",), pyproject), _table(decoded, ("tool", "pluglm"), pyproject)


def _read(pyproject: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(pyproject.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        fix = "name a plugin's pyproject.toml or the folder it lies in."
        raise ManifestError(f"{pyproject} cannot be read.", why=str(error), fix=fix, path=pyproject) from error


def _table(decoded: Mapping[str, Any], keys: tuple[str, ...], pyproject: Path) -> Mapping[str, Any]:
    table: Any = decoded
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping):
        raise ManifestError(
            f"{pyproject} has no [{'.'.join(keys)}] table.",
            why="the manifest is made from [project] and [tool.pluglm].",
            fix="add it; docs/reference/manifest.md has an example.",
            path=pyproject,
        )
    return table


def _entry_points(project: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """(kind, name) → target of the entry points in pluglm's groups."""
    groups = project.get("entry-points", {})
    return {
        (kind, name): target
        for group, kind in GROUPS.items()
        for name, target in dict(groups.get(group, {})).items()
        if isinstance(target, str)
    }


def _package(pyproject: Path, points: Mapping[tuple[str, str], str]) -> Path:
    """Folder of the one package that all entry points lie in, under src/ or beside pyproject.toml."""
    names = sorted({re.split(r"[.:\s\[]", target, maxsplit=1)[0] for target in points.values()})
    if len(names) != 1:
        raise ManifestError(
            f"the entry points of {pyproject} lie in {len(names)} packages.",
            why=f"a manifest belongs to one package; found {', '.join(names) or 'none'}.",
            fix='announce plugins in [project.entry-points."pluglm.…"], all in one package.',
            path=pyproject,
        )
    places = [pyproject.parent / "src" / names[0], pyproject.parent / names[0]]
    for place in places:
        if (place / "__init__.py").is_file():
            return place
    raise ManifestError(
        f"the package {names[0]!r} that {pyproject} announces does not exist.",
        why=f"there is no __init__.py in {places[0]} or {places[1]}.",
        fix="create the package, or correct the entry points.",
        path=pyproject,
    )
