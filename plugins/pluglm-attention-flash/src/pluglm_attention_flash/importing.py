"""Imports a sealed package under a name of its own: Python from the very bytes that were compared, nothing unlisted.

Compiled Python (`__pycache__`) is neither read nor written: it lies outside the seal. A compiled library is loaded from
its file, which was compared a moment before; it can be loaded once a process, so a package stays where it was put.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder, SourceLoader
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType

from pluglm.sealed import Sealed


def import_sealed(sealed: Sealed, place: Path, folder: str) -> ModuleType:
    """The package of a sealed build, run once a process.

    Args:
        sealed: compared already. place: where its files lie. folder: of the package's `__init__.py`, in the table.
    Raises: what the package raises while it is imported; none of its modules stays then.
    """
    name = private_name(sealed.digest)
    if name in sys.modules:
        return sys.modules[name]
    finder = _Finder(name, sealed, place, folder)
    sys.meta_path.insert(0, finder)  # it stays: kernels import their modules late, too
    try:
        return importlib.import_module(name)
    except BaseException:
        sys.meta_path.remove(finder)
        for known in [known for known in sys.modules if known == name or known.startswith(name + ".")]:
            del sys.modules[known]
        raise


def private_name(digest: str) -> str:
    """The import name of a build: made of its digest, so that two of one name never meet."""
    return f"_pluglm_kernel_{digest[:32]}"


class _Finder(MetaPathFinder):
    """Finds the modules of one package among the files of its seal, and nothing else."""

    def __init__(self, name: str, sealed: Sealed, place: Path, folder: str) -> None:
        self._name, self._sealed, self._place, self._folder = name, sealed, place, folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module of this package; None for any other."""
        if fullname != self._name and not fullname.startswith(self._name + "."):
            return None
        stem = "/".join((self._folder, *fullname.split(".")[1:]))
        package = f"{stem}/__init__.py"
        if package in self._sealed.table:
            return self._spec(fullname, package, _Source(fullname, self._path(package), self._sealed.files[package]))
        if fullname == self._name:
            return None
        if f"{stem}.py" in self._sealed.table:
            source = f"{stem}.py"
            return self._spec(fullname, source, _Source(fullname, self._path(source), self._sealed.files[source]))
        for suffix in EXTENSION_SUFFIXES:
            if stem + suffix in self._sealed.table:
                file = stem + suffix
                return self._spec(fullname, file, ExtensionFileLoader(fullname, self._path(file)))
        return None

    def _path(self, file: str) -> str:
        return str(self._place.joinpath(*file.split("/")))

    def _spec(self, fullname: str, file: str, loader: Loader) -> ModuleSpec | None:
        inside = [str(Path(self._path(file)).parent)] if file.endswith("/__init__.py") else None
        return importlib.util.spec_from_file_location(
            fullname, self._path(file), loader=loader, submodule_search_locations=inside
        )


class _Source(SourceLoader):
    """A module of given bytes. It states no time of change, so that no compiled file is taken for it."""

    def __init__(self, fullname: str, path: str, content: bytes) -> None:
        self._fullname, self._path, self._content = fullname, path, content

    def get_filename(self, fullname: str) -> str:
        """Where the file lies: kernels find their libraries beside it."""
        return self._path

    def get_data(self, path: str | bytes) -> bytes:
        """The bytes that were compared. Raises: OSError for any other file."""
        if path != self._path:
            raise FileNotFoundError(path)
        return self._content
