"""A kernel of attention: one build of a kernel repository, Python and perhaps compiled libraries."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pluglm.errors import InputError
from pluglm.metadata import OPEN_FLAGS
from pluglm.vendored_kernel import (
    FOLDER,
    MAX_FILES,
    MAX_TEXT_BYTES,
    MAX_TOTAL_BYTES,
    METADATA,
    PLACE,
    RECORD,
    is_kernel_file,
    is_variant,
    package_folder,
)
from pluglm_vendor.bundle import PAPER, Bundle, read_papers
from pluglm_vendor.sources import FolderSource, HubSource
from pluglm_vendor.variants import Here, choose, torch_range, wheel_tag

INIT = '''\
"""{summary}

Made by `pluglm vendor --kernel` from {source}. The kernel lies in `kernel`, its digests in `kernel.json`.
"""

from pluglm import hookimpl


@hookimpl
def pluglm_build_attention(request):
    """Check the kernel against its digests and make it a backend."""
    from pluglm_attention_flash.vendored import sealed_attention

    return sealed_attention(__name__, request)
'''
#: As pluglm-attention-flash says of itself, whose code runs the kernel; what a kernel lacks of it is refused when it is
#: built. The tier is not "tuned": `auto` takes a first-party backend before one that somebody published.
FACTS: Mapping[str, Any] = {
    "tier": "portable",
    "requires": {
        "devices": ["cuda"], "dtypes": ["bfloat16", "float16"], "head_dim": {"max": 256, "multiple_of": 8},
    },
    "features": [
        "grouped-heads", "bidirectional", "window", "chunk", "softcap", "sinks", "alibi", "padding", "segments",
    ],
    "views": ["dense", "paged", "quantized"],
    "numerics": {"kind": "tolerance", "atol": 0.01, "rtol": 0.01},
}  # fmt: skip
_LIBRARIES = (".so", ".dll", ".dylib", ".pyd", ".a", ".o", ".pyc", ".cubin", ".metallib")


@dataclass(frozen=True)
class Kernel(Bundle):
    """What was fetched of one build.

    Attributes:
        variant: name of the build. variants: all that the commit has.
    """

    variant: str = ""
    variants: tuple[str, ...] = ()

    noun: ClassVar[str] = "kernel"
    long: ClassVar[str] = "attention kernel"
    kind: ClassVar[str] = "attention"
    record_name: ClassVar[str] = RECORD
    place: ClassVar[str] = PLACE
    runtime: ClassVar[tuple[str, ...]] = ("pluglm>=0.1,<0.2", "pluglm-attention-flash>=0.1,<0.2")
    init: ClassVar[str] = INIT

    @property
    def version(self) -> str:
        """As of any; two builds of one commit differ in it, too."""
        return f"{super().version}.{self.variant.replace('-', '.').replace('_', '.')}"

    @cached_property
    def binaries(self) -> frozenset[str]:
        """Libraries, and whatever is no text."""
        return frozenset(name for name, data in self.files.items() if name.endswith(_LIBRARIES) or not _is_text(data))

    @property
    def tag(self) -> str:
        """Of the platform that the build is for, if it has compiled libraries."""
        return wheel_tag(self.variant)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What metadata.json says, {} without one. Raises: InputError if it cannot be read."""
        data = self.files.get(f"{FOLDER}/{self.variant}/{METADATA}", b"{}")
        try:
            said = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise unfit(self.repo, f"{METADATA} is no JSON: {str(error)!a}.", "Ask its author.") from error
        if not isinstance(said, dict):
            raise unfit(self.repo, f"{METADATA} is no object of JSON.", "Ask its author.")
        return said

    @property
    def requirements(self) -> str:
        """What metadata.json requires, one requirement a line. Raises: InputError for what would not be heeded."""
        said = self.metadata
        unknown = sorted(key for key in said if "depends" in key and key not in _DEPENDS and said[key])
        if unknown:
            raise unfit(
                self.repo, f"{METADATA} says {unknown[0]!a}, so it needs what is not taken along.",
                "Take a kernel that stands alone.",
            )  # fmt: skip
        backends = said.get(_DEPENDS[1]) or {}
        lists = [said.get(_DEPENDS[0]) or [], *([backends.get("cuda") or []] if isinstance(backends, dict) else [None])]
        if not all(isinstance(some, list) and all(isinstance(text, str) for text in some) for some in lists):
            raise unfit(self.repo, f"{METADATA} states dependencies that are no list of texts.", "Ask its author.")
        return "\n".join(text for some in lists for text in some)

    def facts(self) -> Mapping[str, Any]:
        """Those of pluglm-attention-flash, and the torch that the build is for."""
        wanted = torch_range(self.variant)
        return {**FACTS, "requires": {**FACTS["requires"], **({"torch": wanted} if wanted else {})}}

    def record(self) -> Mapping[str, Any]:
        """The build's name."""
        return {"variant": self.variant}

    def use(self, name: str) -> str:
        """In `load`."""
        return f"attention={name!r}"

    def details(self) -> Mapping[str, str]:
        """The build that was taken, and those that were not."""
        others = ", ".join(name for name in self.variants if name != self.variant)
        return {"variant": self.variant, "others": others or "none"}


_DEPENDS = ("python-depends", "python-depends-backends")


def unfit(source: str, why: str, fix: str) -> InputError:
    """The error for a kernel that breaks a rule for names, kinds or sizes of files."""
    return InputError(f"the kernel of `{source}` cannot be taken.", why=why, fix=fix, argument="source")


def variants_of(source: str, names: Iterable[str]) -> list[str]:
    """The builds among the names of a repository. Raises: InputError if there is none."""
    found = {parts[1] for name in names if (parts := name.split("/"))[0] == FOLDER and len(parts) > 2}
    if not found:
        raise InputError(
            f"`{source}` does not contain a build of a kernel.",
            why="a repository of kernels has a folder build, and one folder a build in it.",
            fix="Check the spelling; without --kernel a decoding method is looked for.",
            argument="source",
        )
    return sorted(filter(is_variant, found))


def check_names(source: str, variant: str, names: Mapping[str, int | None]) -> list[str]:
    """The files of one build among the names (with sizes in bytes) of a repository, sorted.

    Raises: InputError for a name that is not plain, for none of a package, for too many or too large files.
    """
    prefix = f"{FOLDER}/{variant}/"
    inside = sorted(name for name in names if name.startswith(prefix) and "/__pycache__/" not in name)
    odd = [name for name in inside if not is_kernel_file(name)]
    if odd:
        raise unfit(source, f"{odd[0]!a} is no plain name of a file.", "Ask its author to rename it.")
    if len({name.lower() for name in inside}) != len(inside):
        raise unfit(source, "two file names differ in nothing but capitals.", "Ask its author to rename one.")
    if package_folder(inside) is None:
        raise unfit(source, f"{prefix} holds no Python package, or several.", "Take another build, or another commit.")
    sizes = {name: names[name] or 0 for name in inside}
    large = [name for name, size in sizes.items() if size > limit(name)]
    total = sum(sizes.values())
    if large or len(inside) > MAX_FILES or total > MAX_TOTAL_BYTES:
        found = f"{large[0]} has {sizes[large[0]]} bytes" if large else f"it has {len(inside)} files of {total} bytes"
        raise unfit(
            source, f"{found}; at most {MAX_FILES} files, {MAX_TEXT_BYTES} bytes a file of Python and "
            f"{MAX_TOTAL_BYTES} bytes in all are taken.", "Ask its author for less.",
        )  # fmt: skip
    return inside


def limit(name: str) -> int:
    """The largest size of a file, in bytes."""
    return MAX_TEXT_BYTES if name.endswith((".py", ".json")) else MAX_TOTAL_BYTES


def fetched_kernel(
    source: HubSource, variants: tuple[str, ...], variant: str, content: Mapping[str, bytes]
) -> Kernel | None:
    """The kernel among files of a commit; None if its package is not among them."""
    files = {name: data for name, data in content.items() if is_kernel_file(name)}
    if package_folder(files) is None:
        return None
    papers = {name: data for name, data in content.items() if PAPER.fullmatch(name)}
    return Kernel(str(source), source.repo, source.revision, files, papers, (), variant, variants)


def read_kernel_folder(source: FolderSource, wish: str | None, at: Here) -> Kernel:
    """The kernel of a folder that contains `build`. Follows no symbolic link. Raises: InputError."""
    names: dict[str, int | None] = {}
    for path, folders, inside in os.walk(source.path / FOLDER):
        folder = Path(path)
        for name in [*folders, *inside]:
            if (folder / name).is_symlink() or folder.is_symlink():
                raise unfit(source.repo, f"{name!a} is a symbolic link.", "Put the file itself there.")
        for name in inside:
            names[(folder / name).relative_to(source.path).as_posix()] = (folder / name).stat().st_size
    variants = variants_of(str(source.path), names)
    variant = choose(source.repo, variants, wish, at)
    files = {name: _read(source, name) for name in check_names(source.repo, variant, names)}
    papers = read_papers(source.path, source.repo)
    return Kernel(str(source), source.repo, None, files, papers, (), variant, tuple(variants))


def _read(source: FolderSource, name: str) -> bytes:
    try:
        descriptor = os.open(source.path / name, OPEN_FLAGS | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise unfit(source.repo, f"{name!r} is no ordinary file.", "Put an ordinary file there.")
            data = file.read(limit(name) + 1)
    except OSError as error:
        raise unfit(source.repo, f"{name!r} cannot be read: {error}.", "Make it readable.") from error
    if len(data) > limit(name):
        raise unfit(source.repo, f"{name!r} has grown while it was read.", "Try again.")
    return data


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode("utf-8")
    except UnicodeDecodeError:
        return False
