"""An on-disk index of what discovery found, so that the next start reads one small file a directory.

A shard holds who provides what in one search directory. It is used only while the directory has the inode and time it
was made with, and while every file that mattered besides (malformed ones, absent ones, the .pth files of editable
installs) has the time and size it had. What manifests say is not kept here: a manifest is read when its facts are
looked at, so an edited one counts at once.

The index holds facts and no verdicts: policy and state are read afresh, and files are hashed by those who verify them.
Anything unexpected in a shard makes it count as absent. It is a line of JSON that says what it is, then a line of JSON.
"""

# Paths are text here: with pathlib a search would take several times as long.
# ruff: noqa: PTH103, PTH105, PTH108, PTH111, PTH116, PTH118, PTH119, PTH120, PTH123

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import zlib
from dataclasses import dataclass
from typing import Any

from pluglm.kinds import GROUPS
from pluglm.metadata import OPEN_FLAGS
from pluglm.provider import Facts, Problem, Provider

SCHEMA = 1
_FRESH_NS = 20_000_000  # a file this young could change again within one tick of the clock its time is taken from
_LIMIT_BYTES = 256 * 2**20

Stamp = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Shard:
    """What one search directory holds.

    Attributes:
        directory: its real path.
        signature: (inode, mtime_ns) from before it was read.
        providers, problems: what was found in it.
        stamps: files outside the signature's reach that must not have changed, as (path, mtime_ns, size).
    """

    directory: str
    signature: tuple[int, int]
    providers: tuple[Provider, ...] = ()
    problems: tuple[Problem, ...] = ()
    stamps: tuple[Stamp, ...] = ()


def cache_directory() -> str:
    """$PLUGLM_CACHE_DIR, else pluglm in $XDG_CACHE_HOME or in ~/.cache."""
    own = os.environ.get("PLUGLM_CACHE_DIR")
    if own:
        return own
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "pluglm")


def stamp(path: str) -> Stamp:
    """(path, mtime_ns, size); a file that is absent has the time 0 and the size -1."""
    try:
        status = os.stat(path)
    except OSError:
        return path, 0, -1
    return path, status.st_mtime_ns, status.st_size


def shard_path(index: str, directory: str) -> str:
    """Where the shard of `directory` lies. Two directories may share a file; the header tells whose it is."""
    raw = os.fsencode(directory)
    return os.path.join(index, "discovery", f"{zlib.crc32(raw):08x}{zlib.adler32(raw):08x}.idx")


def _identity(directory: str, signature: tuple[int, int]) -> list[object]:
    groups = zlib.crc32(repr(sorted(GROUPS.items())).encode())
    return ["pluglm-index", SCHEMA, sys.implementation.cache_tag, groups, directory, *signature]


def load(index: str, directory: str, signature: tuple[int, int]) -> Shard | None:
    """Read the shard of `directory`. None if there is none, or it is stale, damaged or somebody else's."""
    try:
        raw = _read(shard_path(index, directory))
        head, _, body = raw.partition(b"\n")
        *identity, checksum = json.loads(head)
        if identity != _identity(directory, signature) or zlib.crc32(body) != checksum:
            return None
        stamps, problems, rows = json.loads(body)
        if any(stamp(path) != (path, mtime_ns, size) for path, mtime_ns, size in stamps):
            return None
        return Shard(
            directory,
            signature,
            _providers(directory, rows),
            tuple(Problem(*row) for row in problems),
            tuple((path, mtime_ns, size) for path, mtime_ns, size in stamps),
        )
    except (OSError, ValueError, TypeError, IndexError, RecursionError):
        return None


def _read(path: str) -> bytes:
    descriptor = os.open(path, OPEN_FLAGS)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if status.st_size > _LIMIT_BYTES or (hasattr(os, "geteuid") and status.st_uid not in (os.geteuid(), 0)):
            raise ValueError("not an index of this user")
        return file.readall() or b""


def _providers(directory: str, rows: list[tuple[Any, ...]]) -> tuple[Provider, ...]:
    found = []
    prefix = directory + os.sep
    for kind, name, distribution, version, target, folder, manifest, described in rows:
        facts = Facts(manifest, kind, name, distribution) if described else None
        found.append(Provider(kind, name, distribution, version, target, prefix + folder, facts, manifest))
    return tuple(found)


def save(index: str, shard: Shard) -> None:
    """Write a shard, whole or not at all.

    A place that cannot be written is no error, discovery is slower then. A directory or file that changed a moment ago
    is left out until it has settled, since a second change could carry the same time.
    """
    newest = max([shard.signature[1], *(mtime_ns for _, mtime_ns, _ in shard.stamps)])
    if time.time_ns() - newest < _FRESH_NS:
        return
    body = _encoded(shard)
    header = [*_identity(shard.directory, shard.signature), zlib.crc32(body)]
    path = shard_path(index, shard.directory)
    temporary = f"{path}.{os.getpid()}.{time.monotonic_ns()}"
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(json.dumps(header).encode() + b"\n" + body)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _encoded(shard: Shard) -> bytes:
    rows = [
        (p.kind, p.name, p.distribution, p.version, p.target, os.path.basename(p.location), p.manifest_path, described)
        for p in shard.providers
        for described in [p.facts is not None]
    ]
    problems = [(p.stage, p.subject, p.message) for p in shard.problems]
    return json.dumps([shard.stamps, problems, rows], separators=(",", ":")).encode()
