"""Hub recipes that became plugins: which files count, the digest over them, and the plugin made from a directory.

`pluglm vendor` seals a recipe with this digest, and the installed plugin is checked against it before anything of the
recipe runs. Nothing here imports or runs a recipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pluglm.errors import InputError, PluginConflictError, PluginNotFoundError
from pluglm.metadata import OPEN_FLAGS, MalformedError, read_file

#: The folder of a repository that holds a recipe; its name is the Hub's.
FOLDER = "custom_generate"
ENTRY = f"{FOLDER}/generate.py"
REQUIREMENTS = f"{FOLDER}/requirements.txt"
#: What an installed recipe says about itself, beside its package's `__init__.py`.
RECORD = "recipe.json"
#: A recipe is a few pages of Python. More than this is refused, before it is read as a whole.
MAX_FILES, MAX_FILE_BYTES, MAX_TOTAL_BYTES = 64, 2**19, 2**21

_MODULE = re.compile(rf"{FOLDER}/[A-Za-z_][A-Za-z0-9_]*\.py", re.ASCII)


def is_recipe_file(name: str) -> bool:
    """True for the names that belong to a recipe: modules of its one folder, and its requirements."""
    return name == REQUIREMENTS or _MODULE.fullmatch(name) is not None


def no_recipe(source: str) -> InputError:
    """The error for a place without a recipe, in the words that users of the Hub know."""
    return InputError(
        f"`{source}` does not contain a `{FOLDER}` subdirectory with a `generate.py` file, can't load the custom "
        "generate function.",
        why=f"a recipe is the folder {FOLDER} with generate.py in it.",
        fix="Check the spelling; name the folder that contains custom_generate, not custom_generate itself.",
        argument="source",
    )


def unfit(source: str, why: str, fix: str) -> InputError:
    """The error for a recipe that breaks a rule for names, kinds or sizes of files."""
    return InputError(f"the recipe of `{source}` cannot be taken.", why=why, fix=fix, argument="source")


def check_names(source: str, names: Mapping[str, int | None]) -> list[str]:
    """The files of a recipe among the `names` (with sizes in bytes) of a repository, sorted.

    Names of other folders are nobody's business. In `custom_generate`, whatever a relative import could not reach is
    refused: a folder below it, a name that is no module's, two names that one file system takes for the same.

    Raises: InputError.
    """
    inside = [name for name in names if name.startswith(FOLDER + "/")]
    inside = [name for name in inside if not name.startswith(f"{FOLDER}/__pycache__/")]
    if ENTRY not in inside:
        raise no_recipe(source)
    for name in inside:
        if "/" in name.removeprefix(FOLDER + "/"):
            raise unfit(
                source, f"{name!r} lies in a folder below {FOLDER}; only imports from the same folder exist.",
                "Ask its author for a recipe of one folder, or write a plugin: `pluglm new decoding NAME`.",
            )  # fmt: skip
        if name.endswith(".py") and not is_recipe_file(name):
            raise unfit(source, f"{name!r} is no module's name.", "Ask its author to rename it.")
    taken = sorted(filter(is_recipe_file, inside))
    if len({name.lower() for name in taken}) != len(taken):
        raise unfit(source, "two file names differ in nothing but capitals.", "Ask its author to rename one.")
    _check_sizes(source, {name: names[name] for name in taken})
    return taken


def _check_sizes(source: str, sizes: Mapping[str, int | None]) -> None:
    large = [name for name, size in sizes.items() if (size or 0) > MAX_FILE_BYTES]
    total = sum(size or 0 for size in sizes.values())
    if large or len(sizes) > MAX_FILES or total > MAX_TOTAL_BYTES:
        found = f"{large[0]} has {sizes[large[0]]} bytes" if large else f"it has {len(sizes)} files of {total} bytes"
        raise unfit(
            source,
            f"{found}; at most {MAX_FILES} files of {MAX_FILE_BYTES} bytes, {MAX_TOTAL_BYTES} in all, are taken.",
            "A recipe is code. Weights and data belong into a model's repository.",
        )


def read_recipe(directory: str | Path) -> dict[str, bytes]:
    """The files of the recipe in a directory, by name ("custom_generate/generate.py"). Follows no symbolic link.

    Raises: InputError if there is none, or it breaks a rule.
    """
    place, source = Path(directory), str(directory)
    folder = place / FOLDER
    if folder.is_symlink():
        raise unfit(source, f"{FOLDER} is a symbolic link.", "Put the files themselves there.")
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        raise no_recipe(source) from None
    except (OSError, ValueError) as error:
        raise unfit(source, f"{FOLDER} cannot be read: {error}.", "Make it readable.") from error
    names: dict[str, int | None] = {}
    for entry in entries:
        name = f"{FOLDER}/{entry.name}"
        if entry.is_symlink():
            raise unfit(source, f"{name!r} is a symbolic link.", "Put the file itself there.")
        if entry.is_dir():
            name += "/"
        names[name] = entry.stat().st_size if entry.is_file() else None
    return {name: _read(place / name, source, name) for name in check_names(source, names)}


def _read(path: Path, source: str, name: str) -> bytes:
    try:
        descriptor = os.open(path, OPEN_FLAGS | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise unfit(source, f"{name!r} is no ordinary file.", "Put an ordinary file there.")
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise unfit(source, f"{name!r} cannot be read: {error}.", "Make it readable.") from error
    _check_sizes(source, {name: len(data)})  # it may have grown since it was listed
    return data


def file_table(files: Mapping[str, bytes]) -> dict[str, str]:
    """Name → sha256 (64 hex digits), sorted by name."""
    return {name: hashlib.sha256(files[name]).hexdigest() for name in sorted(files)}


def table_digest(table: Mapping[str, str]) -> str:
    """sha256 over the lines that `sha256sum` prints for the files, sorted by name."""
    text = "".join(f"{table[name]}  {name}\n" for name in sorted(table))
    return hashlib.sha256(text.encode()).hexdigest()


def vendored_name(directory: str | Path) -> str:
    """The id (`distribution:decoding/name`) of the installed plugin that was made from exactly these files.

    It is usable wherever a decoding strategy is named. Nothing is imported: the plugin's own record is believed here,
    and checked against its files when the strategy is built. Whether it may be used is decided there, too.

    Args:
        directory: it contains `custom_generate/generate.py`.
    Raises: InputError if there is no recipe in it; PluginNotFoundError if no plugin was made from it;
        PluginConflictError if several were.
    """
    digest = table_digest(file_table(read_recipe(directory)))
    records = installed_recipes()
    found = [name for name, record in records.items() if record.get("digest") == digest]
    if len(found) == 1:
        return found[0]
    if found:
        raise PluginConflictError(
            f"{directory} was vendored more than once.", why=f"it is {', '.join(found)}.",
            fix=f"Name one: decoding={found[0]!r}; or uninstall the others.", candidates=tuple(found),
        )  # fmt: skip
    own = f"dir:{Path(directory).resolve().name}"
    older = [name for name, record in records.items() if record.get("source") == own]
    changed = f" {older[0]} was made from a folder of this name, with other contents." if older else ""
    raise PluginNotFoundError(
        f"{directory} is not vendored.",
        why=f"no installed plugin has the digest {digest[:16]}… of its files, and code is run from plugins only."
        + changed,
        fix=f"Look through it and make it a plugin: `pluglm vendor {directory} --install`.",
        kind="decoding", name=str(directory),
    )  # fmt: skip


def installed_recipes() -> dict[str, Mapping[str, Any]]:
    """Provider id → what its recipe.json says, for each installed recipe. Imports no plugin."""
    return installed_records("decoding", RECORD)


def installed_records(kind: str, record_name: str) -> dict[str, Mapping[str, Any]]:
    """Provider id → what its record says, for each installed provider of a kind that has one. Imports no plugin."""
    from pluglm.discovery import discover

    found: dict[str, Mapping[str, Any]] = {}
    for provider in discover(paths=sys.path).providers:
        if provider.kind == kind and provider.manifest_path is not None:
            path = os.path.join(os.path.dirname(provider.manifest_path), record_name)  # noqa: PTH118, PTH120 - as discovery
            try:
                record = json.loads(read_file(path)[0])
            except (OSError, MalformedError, ValueError, RecursionError):
                continue  # most providers were not vendored; a damaged one is refused when it is built
            if isinstance(record, dict):
                found[provider.id] = record
    return found
