"""Where fetched files lie before anybody has agreed to them: named by digest, so that no import can find one.

A file keeps neither its name nor its suffix, and the names stand in a table of JSON beside it. A commit is fetched
once: when its table is there and every file still has its digest, the Hub is not asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pluglm.errors import SaveError
from pluglm.index import cache_directory
from pluglm_vendor.sources import HubSource


class Quarantine:
    """The place of one commit.

    Args:
        source: a pinned one.
        root: the folder of all; None: `quarantine` in $PLUGLM_CACHE_DIR, or in pluglm in the user's cache directory.
        form: of what is taken from the commit; each has a place of its own.
    """

    def __init__(self, source: HubSource, root: Path | None = None, *, form: str = "recipe") -> None:
        self.source = source
        said = str(source) if form == "recipe" else f"{form} {source}"
        place = hashlib.sha256(said.encode()).hexdigest()
        self.folder = (root or Path(cache_directory()) / "quarantine") / place

    def load(self, part: str = "") -> tuple[dict[str, bytes], tuple[str, ...]] | None:
        """What was fetched before, and what was left out; None if that is not all there, or not what it was.

        Args:
            part: of the commit, such as a build of a kernel; each part has a table of its own.
        """
        try:
            table = json.loads((self.folder / _table(part)).read_bytes())
            content = {name: (self.folder / digest).read_bytes() for name, digest in table["files"].items()}
            if table["source"] != str(self.source):
                return None
            left_out = tuple(map(str, table["left_out"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if any(hashlib.sha256(data).hexdigest() != table["files"][name] for name, data in content.items()):
            return None
        return content, left_out

    def store(self, content: Mapping[str, bytes], left_out: tuple[str, ...], part: str = "") -> None:
        """Keep what was fetched. The table comes last: without it nothing counts as there. Raises: SaveError."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        table = {"source": str(self.source), "files": files, "left_out": left_out}
        with self._writing():
            for name, digest in files.items():
                self._write(digest, content[name])
            self._write(_table(part), json.dumps(table, indent=2).encode())

    def load_listing(self) -> tuple[str | None, dict[str, int | None]] | None:
        """The repository's type, and name → size of the commit's files, if they were asked for before."""
        try:
            said = json.loads((self.folder / "listing.json").read_bytes())
            if said["source"] != str(self.source):
                return None
            sizes = {str(name): None if size is None else int(size) for name, size in said["sizes"].items()}
            return (None if said["type"] is None else str(said["type"])), sizes
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def store_listing(self, repo_type: str | None, sizes: Mapping[str, int | None]) -> None:
        """Keep what a commit's files are called: that never changes. Raises: SaveError."""
        said = {"source": str(self.source), "type": repo_type, "sizes": dict(sizes)}
        with self._writing():
            self._write("listing.json", json.dumps(said, indent=2).encode())

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise SaveError(
                f"{self.folder} was not written.", why=str(error),
                fix="Make it writable, or set PLUGLM_CACHE_DIR to a folder that is.", path=str(self.folder),
            ) from error  # fmt: skip

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.folder / f"{name}.{os.getpid()}"
        try:
            temporary.write_bytes(data)
            temporary.replace(self.folder / name)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def _table(part: str) -> str:
    return f"table-{part}.json" if part else "table.json"
