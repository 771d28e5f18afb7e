"""A recipe in memory: the bytes that are shown, consented to, sealed and installed. They are read once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pluglm.errors import InputError
from pluglm.vendored import REQUIREMENTS, file_table, read_recipe, table_digest
from pluglm_vendor.sources import FolderSource

PAPER = re.compile(r"README\.md|LICENSE[\w.\-]*", re.ASCII)
MAX_PAPERS, MAX_PAPER_BYTES = 8, 2**19
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Recipe:
    """What was fetched.

    Attributes:
        source: as written into the plugin ("hub:org/repo@commit", "dir:name"). repo: "org/repo" or the folder's name.
        commit: 40 hex digits, or None for a folder.
        files: name → content of what is run, and of requirements.txt.
        papers: the same for README.md and LICENSE*, which are carried along.
        left_out: other names in `custom_generate`, which are not taken.
    """

    source: str
    repo: str
    commit: str | None
    files: Mapping[str, bytes]
    papers: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
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

    @property
    def requirements(self) -> str:
        """Text of requirements.txt, "" if there is none. Raises: InputError if it is not UTF-8."""
        try:
            return self.files.get(REQUIREMENTS, b"").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{REQUIREMENTS} of `{self.repo}` is not UTF-8.", why=str(error), fix="Ask its author to save it so.",
                argument="source",
            ) from error  # fmt: skip


def read_folder(source: FolderSource) -> Recipe:
    """The recipe of a folder. Raises: InputError."""
    files = read_recipe(source.path)
    inside = sorted(path.name for path in (source.path / "custom_generate").iterdir() if path.name != "__pycache__")
    left_out = tuple(name for name in inside if f"custom_generate/{name}" not in files)
    papers: dict[str, bytes] = {}
    for path in sorted(source.path.iterdir()):
        if PAPER.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            check_papers(source.repo, {**dict.fromkeys(papers, 0), path.name: path.stat().st_size})
            papers[path.name] = path.read_bytes()
    return Recipe(str(source), source.repo, None, files, papers, left_out)


def check_papers(source: str, sizes: Mapping[str, int | None]) -> None:
    """Refuse more, or larger, README and LICENSE files than a recipe has. Raises: InputError."""
    large = [name for name, size in sizes.items() if (size or 0) > MAX_PAPER_BYTES]
    if large or len(sizes) > MAX_PAPERS:
        raise InputError(
            f"the recipe of `{source}` cannot be taken.",
            why=f"{large[0]} has {sizes[large[0]]} bytes; {MAX_PAPER_BYTES} are allowed."
            if large
            else f"it has {len(sizes)} files called README.md or LICENSE; {MAX_PAPERS} are allowed.",
            fix="Ask its author for shorter ones.",
            argument="source",
        )


def provider_name(repo: str, wish: str | None) -> str:
    """What users will type: `wish`, or made from the repository's name: lower case, words joined by hyphens.

    Raises: InputError if it cannot be a name.
    """
    name = wish if wish is not None else re.sub(r"[^a-z0-9]+", "-", repo.rpartition("/")[2].lower()).strip("-")
    if not _NAME.fullmatch(name) or name == "auto" or len(name) > 64:
        raise InputError(
            f"{name!r} cannot name a decoding method.",
            why="the name becomes part of a distribution, of a package and of what users type; auto has a meaning.",
            fix='Write lower-case letters and digits, with hyphens between words: --name "my-method".',
            argument="name",
        )
    return name
