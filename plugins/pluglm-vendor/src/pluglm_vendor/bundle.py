"""What was fetched, as bytes in memory: shown, consented to, sealed and installed. It is a recipe or a kernel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pluglm.errors import InputError
from pluglm.vendored import file_table, table_digest

PAPER = re.compile(r"README\.md|LICENSE[\w.\-]*", re.ASCII)
MAX_PAPERS, MAX_PAPER_BYTES = 8, 2**19
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Bundle:
    """The files of one commit, or of a folder as it is now.

    Attributes:
        source: as written into the plugin ("hub:org/repo@commit", "dir:name"). repo: "org/repo" or the folder's name.
        commit: 40 hex digits, or None for a folder.
        files: name → content of what is run, and of what it reads.
        papers: the same for README.md and LICENSE*, which are carried along.
        left_out: other names beside the files, which are not taken.

    Of its form (the same for every one):
        noun: "recipe". long: for summaries. kind: of provider. record_name, place: of the record, and of the files'
        folder, in the package. runtime: what runs it. init: text of the package's `__init__.py`.
    """

    source: str
    repo: str
    commit: str | None
    files: Mapping[str, bytes]
    papers: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    noun: ClassVar[str]
    long: ClassVar[str]
    kind: ClassVar[str]
    record_name: ClassVar[str]
    place: ClassVar[str]
    runtime: ClassVar[tuple[str, ...]]
    init: ClassVar[str]

    @cached_property
    def table(self) -> dict[str, str]:
        """Name → sha256 of `files`."""
        return file_table(self.files)

    @property
    def digest(self) -> str:
        """Over the table: says which code this is, wherever it came from."""
        return table_digest(self.table)

    @property
    def version(self) -> str:
        """Of the distribution: tells two commits, or two states of a folder, apart."""
        return f"1.0+g{self.commit[:12]}" if self.commit is not None else f"1.0+d{self.digest[:12]}"

    @cached_property
    def binaries(self) -> frozenset[str]:
        """Names of files that nobody can read."""
        return frozenset()

    @property
    def tag(self) -> str:
        """The wheel's."""
        return "py3-none-any"

    def distribution(self, name: str) -> str:
        """Of the wheel for the provider `name`."""
        return f"pluglm-{self.noun}-{name}"

    def summary(self, name: str) -> str:
        """One line for lists."""
        return f"The {self.long} {name}, vendored from {self.repo}."

    def facts(self) -> Mapping[str, Any]:
        """What the manifest says of the provider, beside kind, name, summary and API."""
        raise NotImplementedError

    def record(self) -> Mapping[str, Any]:
        """What the record says beside source, files and digest."""
        return {}

    def use(self, name: str) -> str:
        """How users name it."""
        raise NotImplementedError

    def details(self) -> Mapping[str, str]:
        """Lines of the page that only this form has: word → text."""
        return {}


def read_papers(folder: Path, repo: str) -> dict[str, bytes]:
    """README.md and LICENSE* of a folder. Raises: InputError."""
    papers: dict[str, bytes] = {}
    for path in sorted(folder.iterdir()):
        if PAPER.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            check_papers(repo, {**dict.fromkeys(papers, 0), path.name: path.stat().st_size})
            papers[path.name] = path.read_bytes()
    return papers


def check_papers(source: str, sizes: Mapping[str, int | None], noun: str = "recipe") -> None:
    """Refuse more, or larger, README and LICENSE files than such a thing has. Raises: InputError."""
    large = [name for name, size in sizes.items() if (size or 0) > MAX_PAPER_BYTES]
    if large or len(sizes) > MAX_PAPERS:
        raise InputError(
            f"the {noun} of `{source}` cannot be taken.",
            why=f"{large[0]} has {sizes[large[0]]} bytes; {MAX_PAPER_BYTES} are allowed."
            if large
            else f"it has {len(sizes)} files called README.md or LICENSE; {MAX_PAPERS} are allowed.",
            fix="Ask its author for shorter ones.",
            argument="source",
        )


def provider_name(repo: str, wish: str | None, long: str = "decoding method") -> str:
    """What users will type: `wish`, or made from the repository's name: lower case, words joined by hyphens.

    Raises: InputError if it cannot be a name.
    """
    name = wish if wish is not None else re.sub(r"[^a-z0-9]+", "-", repo.rpartition("/")[2].lower()).strip("-")
    if not _NAME.fullmatch(name) or name == "auto" or len(name) > 64:
        article = "an" if long.startswith("a") else "a"
        raise InputError(
            f"{name!r} cannot name {article} {long}.",
            why="the name becomes part of a distribution, of a package and of what users type; auto has a meaning.",
            fix='Write lower-case letters and digits, with hyphens between words: --name "my-method".',
            argument="name",
        )
    return name
