"""Where fetched files lie before anybody has agreed to them: named by digest, so that no import can find one.

A file keeps neither its name nor its suffix, and the names stand in a table of JSON beside it. A commit is fetched
once: when its table is there and every file still has its digest, the Hub is not asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from pluglm.errors import SaveError
from pluglm.index import cache_directory
from pluglm.vendored import ENTRY, is_recipe_file
from pluglm_vendor.recipe import PAPER, Recipe
from pluglm_vendor.sources import HubSource


class Quarantine:
    """The place of one commit.

    Args:
        source: a pinned one.
        root: the folder of all; None: `quarantine` in $PLUGLM_CACHE_DIR, or in pluglm in the user's cache directory.
    """

    def __init__(self, source: HubSource, root: Path | None = None) -> None:
        self.source = source
        place = hashlib.sha256(str(source).encode()).hexdigest()
        self.folder = (root or Path(cache_directory()) / "quarantine") / place

    def load(self) -> Recipe | None:
        """What was fetched before; None if that is not all there, or not what it was."""
        try:
            table = json.loads((self.folder / "table.json").read_bytes())
            content = {name: (self.folder / digest).read_bytes() for name, digest in table["files"].items()}
            if table["source"] != str(self.source) or ENTRY not in content:
                return None
            left_out = tuple(map(str, table["left_out"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        if any(hashlib.sha256(data).hexdigest() != table["files"][name] for name, data in content.items()):
            return None
        return self._recipe(content, left_out)

    def store(self, content: Mapping[str, bytes], left_out: tuple[str, ...]) -> Recipe:
        """Keep what was fetched. The table comes last: without it nothing counts as there. Raises: SaveError."""
        files = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        table = {"source": str(self.source), "files": files, "left_out": left_out}
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name, digest in files.items():
                self._write(digest, content[name])
            self._write("table.json", json.dumps(table, indent=2).encode())
        except OSError as error:
            raise SaveError(
                f"{self.folder} was not written.", why=str(error),
                fix="Make it writable, or set PLUGLM_CACHE_DIR to a folder that is.", path=str(self.folder),
            ) from error  # fmt: skip
        return self._recipe(content, left_out)

    def _write(self, name: str, data: bytes) -> None:
        temporary = self.folder / f"{name}.{os.getpid()}"
        try:
            temporary.write_bytes(data)
            temporary.replace(self.folder / name)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _recipe(self, content: Mapping[str, bytes], left_out: tuple[str, ...]) -> Recipe:
        files = {name: data for name, data in content.items() if is_recipe_file(name)}
        papers = {name: data for name, data in content.items() if PAPER.fullmatch(name)}
        return Recipe(str(self.source), self.source.repo, self.source.revision, files, papers, left_out)
