"""Finds every provider that is installed, from metadata alone.

Nothing of a plugin is imported, and neither are importlib.metadata, pydantic, pluggy or torch: the search reads
`entry_points.txt` and `METADATA` in each .dist-info and .egg-info directory on the path, and the package's
`pluglm.json`. What it cannot read or understand becomes a `Problem`; it raises for nothing that is installed.
"""

# Paths are text here: with pathlib a search would take several times as long.
# ruff: noqa: PTH110, PTH112, PTH116, PTH118, PTH119, PTH120, PTH208

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pluglm import index as _index
from pluglm import metadata
from pluglm.index import Shard
from pluglm.kinds import GROUPS
from pluglm.metadata import MalformedError, normalise
from pluglm.provider import Facts, Problem, Provider, facts_in, is_name

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Discovery", "Problem", "discover"]

MANIFEST = "pluglm.json"
_TARGET = re.compile(r"([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)*(?:\s*:\s*[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)?(?:\s*\[[^\]]*\])?")


@dataclass(frozen=True, slots=True)
class Discovery:
    """What is installed, sorted by kind, name and distribution, and what was stepped over on the way."""

    providers: tuple[Provider, ...]
    problems: tuple[Problem, ...]


def discover(*, paths: Sequence[str] | None = None, index: Path | Literal["auto"] | None = "auto") -> Discovery:
    """Find all providers of all kinds.

    Two providers of one name are both listed: using the name is the error. A distribution that is installed twice, with
    different versions or from different places, is a problem and neither copy is used.

    Args:
        paths: directories to search; None: sys.path.
        index: directory of the on-disk index, "auto" for the user's cache directory, None to read and write none.
    """
    place = None if index is None else _index.cache_directory() if index == "auto" else os.fspath(index)
    shards: list[Shard] = []
    problems: list[Problem] = []
    for directory in dict.fromkeys(os.path.realpath(path) for path in (sys.path if paths is None else paths)):
        shard = _shard(directory, place, problems)
        if shard is not None and (shard.providers or shard.problems):
            shards.append(shard)
            problems.extend(shard.problems)
    providers: Sequence[Provider] = (
        shards[0].providers
        if len(shards) == 1
        else sorted((provider for shard in shards for provider in shard.providers), key=_order)
    )
    return Discovery(_without_duplicates(providers, problems), tuple(problems))


def _order(provider: Provider) -> tuple[str, str, str, str]:
    return provider.kind, provider.name, provider.distribution, provider.location


def _shard(directory: str, place: str | None, problems: list[Problem]) -> Shard | None:
    """What `directory` holds, from the index or from itself. None, with a problem noted, if unreadable."""
    try:
        status = os.stat(directory)
        signature = (status.st_ino, status.st_mtime_ns)
        known = None if place is None else _index.load(place, directory, signature)
        if known is not None:
            return known
        scan = _Scan(directory)
        shard = scan.run(signature)
        if place is not None and not scan.failed:
            _index.save(place, shard)
        return shard
    except FileNotFoundError:
        if not directory.endswith(".zip"):  # every interpreter has the path of a zip that is seldom there
            problems.append(Problem("path", directory, "this entry of the import path does not exist."))
    except NotADirectoryError:
        problems.append(Problem("path", directory, "plugins inside an archive are not found; install them unpacked."))
    except (OSError, ValueError) as error:
        problems.append(Problem("path", directory, f"this entry of the import path cannot be read: {error}."))
    return None


class _Scan:
    """One directory being read. `failed` is set if the system refused a read, so that the result is not kept."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.failed = False
        self.providers: list[Provider] = []
        self.problems: list[Problem] = []
        self.stamps: dict[str, _index.Stamp] = {}
        self._roots: list[str] | None = None
        self._path_files: list[str] = []

    def run(self, signature: tuple[int, int]) -> Shard:
        folders = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                if entry.name.endswith((".dist-info", ".egg-info")):
                    folders.append(entry.name)
                elif entry.name.endswith(".pth"):
                    self._path_files.append(entry.name)
        for name in sorted(folders):
            self._read_distribution(self.directory + os.sep + name)
        self.providers.sort(key=_order)
        stamps = tuple(self.stamps.values())
        return Shard(self.directory, signature, tuple(self.providers), tuple(self.problems), stamps)

    def _report(self, stage: str, subject: str, message: str, file: str) -> None:
        self.problems.append(Problem(stage, subject, message))
        self.stamps[file] = _index.stamp(file)

    def _refused(self, stage: str, file: str, error: OSError | MalformedError) -> None:
        self.failed |= isinstance(error, OSError)
        what = f"cannot be read: {error.strerror}." if isinstance(error, OSError) else f"is malformed: {error}"
        self._report(stage, file, f"{os.path.basename(file)} {what} Reinstall the distribution.", file)

    def _read_distribution(self, folder: str) -> None:
        file = folder + os.sep + "entry_points.txt"
        try:
            raw, _ = metadata.read_file(file)
            if b"pluglm." not in raw:
                return
            text = metadata.as_text(raw)
        except (FileNotFoundError, NotADirectoryError):
            return  # most distributions have no entry points; an old .egg-info may be a file
        except (OSError, MalformedError) as error:
            self._refused("entry points", file, error)
            return
        points = self._checked_points(text, file)
        if not points:
            return
        try:
            name, version = metadata.name_and_version(folder)
        except (OSError, MalformedError) as error:
            self._refused("metadata", metadata.core_metadata_path(folder), error)
            return
        self._add(folder, normalise(name), version, points)

    def _checked_points(self, text: str, file: str) -> dict[tuple[str, str], tuple[str, str]]:
        """(kind, name) → (target, top-level package) of the entry points that are well formed."""
        points: dict[tuple[str, str], tuple[str, str]] = {}
        for group, name, value in metadata.entry_points(text, "pluglm."):
            kind, target = GROUPS.get(group), _TARGET.fullmatch(value)
            if kind is None:
                self._report("entry points", file, f"the group {group!r} is not one of pluglm's.", file)
            elif not is_name(name):
                self._report("entry points", file, f"{name!r} in [{group}] cannot be a plugin's name.", file)
            elif target is None:
                message = f"{name!r} in [{group}] has the target {value!r}, which is not 'module' or 'module:object'."
                self._report("entry points", file, message, file)
            elif (kind, name) in points:
                self._report("entry points", file, f"{name!r} stands twice in [{group}]; the first counts.", file)
            else:
                points[kind, name] = (value, target[1])
        return points

    def _add(
        self, folder: str, distribution: str, version: str, points: dict[tuple[str, str], tuple[str, str]]
    ) -> None:
        manifests: dict[str, tuple[str | None, dict[tuple[str, str], Facts]]] = {}
        for (kind, name), (target, package) in points.items():
            if package not in manifests:
                manifests[package] = self._manifest(folder, distribution, package)
            path, facts = manifests[package]
            self.providers.append(
                Provider(kind, name, distribution, version, target, folder, facts.get((kind, name)), path)
            )

    def _manifest(
        self, folder: str, distribution: str, package: str
    ) -> tuple[str | None, dict[tuple[str, str], Facts]]:
        """Path and facts of the package's manifest, in this directory or where an editable install points."""
        for root in self._roots_of(folder):
            file = root + os.sep + package + os.sep + MANIFEST
            try:
                raw, _ = metadata.read_file(file)
            except (FileNotFoundError, NotADirectoryError):
                self.stamps[file] = (file, 0, -1)
            except (OSError, MalformedError) as error:
                self._refused("manifest", file, error)
                return file, {}
            else:
                return file, self._facts(file, raw, distribution)
        return None, {}

    def _facts(self, file: str, raw: bytes, distribution: str) -> dict[tuple[str, str], Facts]:
        try:
            facts = facts_in(raw, distribution)
        except MalformedError as error:
            self._refused("manifest", file, error)
            return {}
        return {key: Facts(file, *key, distribution, known) for key, known in facts.items()}

    def _roots_of(self, folder: str) -> Iterator[str]:
        """Where the package of the distribution may lie, the likeliest first."""
        yield self.directory
        if self._roots is None:
            self._roots = _path_roots(self.directory, self._path_files)
            for name in self._path_files:
                self.stamps[name] = _index.stamp(os.path.join(self.directory, name))
        yield from dict.fromkeys([*metadata.editable_roots(folder), *self._roots])


def _path_roots(directory: str, files: Sequence[str]) -> list[str]:
    roots: list[str] = []
    for name in files:
        try:
            roots += metadata.path_lines(directory, [name])
        except (OSError, MalformedError):
            continue  # the interpreter passes over such a file too
    return [root for root in dict.fromkeys(roots) if root != directory and os.path.isdir(root)]


def _without_duplicates(providers: Sequence[Provider], problems: list[Problem]) -> tuple[Provider, ...]:
    """Leave out distributions that are installed twice; copies of the same code count once."""
    first: dict[str, str] = {}
    copies: dict[str, dict[str, None]] = {}
    for provider in providers:
        location = first.setdefault(provider.distribution, provider.location)
        if location != provider.location:
            copies.setdefault(provider.distribution, {location: None})[provider.location] = None
    if not copies:
        return tuple(providers)
    dropped: set[str] = set()
    for distribution, locations in copies.items():
        views = {location: [p for p in providers if p.location == location] for location in locations}
        if len({_substance(view) for view in views.values()}) == 1:
            dropped.update(sorted(locations, key=_rank)[1:])
            continue
        dropped.update(locations)
        found = "; ".join(f"{view[0].version} in {location}" for location, view in views.items())
        message = f"installed more than once ({found}); none is used. Uninstall all but one."
        problems.append(Problem("duplicate", distribution, message))
    return tuple(provider for provider in providers if provider.location not in dropped)


def _rank(location: str) -> tuple[bool, str]:
    return not location.endswith(".dist-info"), location


def _substance(providers: Sequence[Provider]) -> tuple[object, ...]:
    """What makes two copies the same: version, entry points and the place the code is imported from."""
    entries = tuple((p.kind, p.name, p.target) for p in providers)
    return providers[0].version, entries, _home(providers[0])


def _home(provider: Provider) -> str:
    """Real path of the directory that the provider's package is imported from."""
    if provider.manifest_path is not None:
        return os.path.realpath(os.path.dirname(os.path.dirname(provider.manifest_path)))
    directory = os.path.dirname(provider.location)
    package = re.split(r"[.:\s\[]", provider.target, maxsplit=1)[0]
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".pth"))
    except OSError:
        names = []
    for root in [directory, *metadata.editable_roots(provider.location), *_path_roots(directory, names)]:
        if os.path.exists(os.path.join(root, package)) or os.path.exists(os.path.join(root, package + ".py")):
            return os.path.realpath(root)
    return os.path.realpath(directory)
