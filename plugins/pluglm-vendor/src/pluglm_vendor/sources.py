"""Where a recipe comes from: one commit of a repository on the Hub, or a folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pluglm.errors import InputError

_REPO = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][\w./\-]*", re.ASCII)
PREFIX = "hub:"


@dataclass(frozen=True)
class HubSource:
    """A repository and what was written after the @.

    Attributes:
        repo: "org/name". revision: as written, lower case if it is a commit; "" if nothing was.
    """

    repo: str
    revision: str

    @property
    def pinned(self) -> bool:
        """True if the revision is a whole commit hash, the only name on the Hub that cannot be moved."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repo}@{self.revision}"


@dataclass(frozen=True)
class FolderSource:
    """A folder that contains `custom_generate`. What is made of it names the folder, not the way to it."""

    path: Path

    @property
    def repo(self) -> str:
        """The folder's own name, in characters that may stand in metadata and in code."""
        return re.sub(r"[^\w.\-]", "_", self.path.resolve().name, flags=re.ASCII)

    def __str__(self) -> str:
        return f"dir:{self.repo}"


def parse_source(text: str) -> HubSource | FolderSource:
    """Tell what a user typed.

    Raises: InputError for what is neither `hub:ORG/REPO@REVISION` nor a folder.
    """
    if not text.startswith(PREFIX):
        path = Path(text).expanduser()
        if "\0" in text or not path.is_dir():
            hint = f" For the Hub write hub:{text}." if _REPO.fullmatch(text.partition("@")[0]) else ""
            raise InputError(
                f"{text!r} is no folder.",
                why="a source is a folder, or hub:ORG/REPO@COMMIT.",
                fix=f"Check the spelling and the working directory.{hint}",
                argument="source",
            )
        return FolderSource(path)
    repo, _, revision = text.removeprefix(PREFIX).partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or not (revision == "" or _is_revision(revision)):
        raise InputError(
            f"{text!r} does not name a commit on the Hub.",
            why="expected hub:ORG/REPO@COMMIT, of letters, digits, '-', '_' and '.', without '..' and '--'.",
            fix="For example hub:org/name@0123456789abcdef0123456789abcdef01234567.",
            argument="source",
        )
    lower = revision.lower()
    return HubSource(repo, lower if _COMMIT.fullmatch(lower) else revision)


def _is_revision(text: str) -> bool:
    return _REVISION.fullmatch(text) is not None and ".." not in text


def not_pinned(source: HubSource, now: str | None, endpoint: str) -> InputError:
    """The error for a branch, a tag, a short hash or nothing, where code is meant.

    Args:
        now: the commit that the revision leads to at present; None if the Hub could not be asked.
        endpoint: address of the Hub.
    """
    named = source.revision or "main"
    what = f'"{source.revision}" of {source.repo} is no commit.' if source.revision else f"{source} names no commit."
    if now is not None:
        fix = f"{named} is now at {now}; if that is what you mean, write {PREFIX}{source.repo}@{now}"
    else:
        fix = (
            f"Open {endpoint}/{source.repo}/commits/main, copy the whole hash of a commit, and write it after the @: "
            f"{PREFIX}{source.repo}@<40 hex digits>. (The Hub could not be asked from here.)"
        )
    return InputError(
        what,
        why="a branch or a tag can be moved, and a short hash can come to mean another commit: what you looked at "
        "would not be what is run. A commit of 40 hex digits never changes.",
        fix=fix,
        argument="source",
    )
