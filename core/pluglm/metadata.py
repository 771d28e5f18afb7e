"""Reads the few lines of installed metadata that pluglm needs, without importlib.metadata.

Everything here takes bytes or paths and raises OSError or `MalformedError`; discovery steps over what is broken.
"""

# Paths are text here: with pathlib a search would take several times as long.
# ruff: noqa: PTH118, PTH122, PTH208

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator

_LIMIT_BYTES = 2**20
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe must not block us
_NAME = re.compile(rb"^Name:[ \t]*(\S+)[ \t\r]*$", re.MULTILINE)
_VERSION = re.compile(rb"^Version:[ \t]*(\S+)[ \t\r]*$", re.MULTILINE)
_REQUIRES = re.compile(r"^Requires-Dist:[ \t]*(.+?)[ \t\r]*$", re.MULTILINE)


class MalformedError(Exception):
    """A file is not of the form it should have. Never leaves discovery."""


def normalise(distribution: str) -> str:
    """Spell a distribution's name as PEP 503 does: lower case, runs of `-_.` as one dash."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def read_file(path: str) -> tuple[bytes, tuple[int, int]]:
    """A small regular file and its (mtime_ns, size). Raises OSError, or MalformedError if it is large or special."""
    descriptor = os.open(path, OPEN_FLAGS)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise MalformedError("it is not a regular file.")
        if status.st_size > _LIMIT_BYTES:
            raise MalformedError(f"it has {status.st_size} bytes; at most {_LIMIT_BYTES} are read.")
        return os.read(descriptor, status.st_size), (status.st_mtime_ns, status.st_size)
    finally:
        os.close(descriptor)


def read_text(path: str) -> str:
    """A small UTF-8 file. Raises OSError or MalformedError."""
    return as_text(read_file(path)[0])


def as_text(raw: bytes) -> str:
    """`raw` as UTF-8. Raises MalformedError."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MalformedError(f"it is not UTF-8 (byte {error.start}).") from error


def core_metadata_path(folder: str) -> str:
    """METADATA of a .dist-info, PKG-INFO of an .egg-info."""
    return os.path.join(folder, "METADATA" if folder.endswith(".dist-info") else "PKG-INFO")


def name_and_version(folder: str) -> tuple[str, str]:
    """Name (as written) and version of the distribution. Raises OSError or MalformedError."""
    head = read_file(core_metadata_path(folder))[0].replace(b"\r\n", b"\n").partition(b"\n\n")[0]
    name, version = _NAME.search(head), _VERSION.search(head)
    if name is None or version is None:
        raise MalformedError(f"it has no {'Name' if name is None else 'Version'} line.")
    try:
        return name[1].decode(), version[1].decode()
    except UnicodeDecodeError as error:
        raise MalformedError("its Name or Version is not UTF-8.") from error


def requirements(folder: str) -> list[str]:
    """The PEP 508 texts of the distribution's Requires-Dist lines. Raises OSError or MalformedError."""
    head = read_text(core_metadata_path(folder)).replace("\r\n", "\n").partition("\n\n")[0]
    return _REQUIRES.findall(head)


def entry_points(text: str, groups: str) -> Iterator[tuple[str, str, str]]:
    """(group, name, value) of each entry point whose group starts with `groups`; a line without "=" has value ""."""
    group = ""
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[" and line[-1] == "]":
            group = line[1:-1].strip()
        elif group.startswith(groups):
            name, _, value = line.partition("=")
            yield group, name.rstrip(), value.lstrip()


def path_lines(directory: str, files: Iterable[str]) -> list[str]:
    """The directories that the .pth files of `directory` add to the import path. Lines of code are not run."""
    found = []
    for name in files:
        for raw in read_text(os.path.join(directory, name)).splitlines():
            line = raw.strip()
            if line and line[0] != "#" and not line.startswith(("import ", "import\t")):
                found.append(os.path.normpath(os.path.join(directory, line)))
    return found


def editable_roots(folder: str) -> list[str]:
    """Where the source of an editable install may lie, from its direct_url.json; empty for any other install."""
    try:
        raw, _ = read_file(os.path.join(folder, "direct_url.json"))
        direct = json.loads(raw)
        url, editable = direct["url"], direct["dir_info"].get("editable")
    except (OSError, MalformedError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []  # direct_url.json is optional, and says nothing that is needed of an ordinary install
    if editable is not True or not isinstance(url, str) or not url.startswith("file://"):
        return []
    from urllib.parse import unquote

    root = unquote(url[len("file://") :])
    return [os.path.join(root, "src"), root]


def installed_versions(paths: Iterable[str]) -> dict[str, str]:
    """Version of each installed distribution by normalised name, from the metadata directories' names.

    The first one on the path counts, as for imports. Directories that cannot be read are passed over.
    """
    found: dict[str, str] = {}
    for path in paths:
        try:
            names = os.listdir(path or os.curdir)
        except OSError:
            continue
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix not in (".dist-info", ".egg-info"):
                continue
            distribution, dash, version = stem.partition("-")
            if suffix == ".egg-info":
                version = re.sub(r"-py\d.*$", "", version)
            if not dash:
                try:
                    version = name_and_version(os.path.join(path, name))[1]
                except (OSError, MalformedError):
                    continue
            found.setdefault(normalise(distribution), version)
    return found
