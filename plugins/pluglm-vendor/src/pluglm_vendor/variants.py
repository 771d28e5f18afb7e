"""The builds of a kernel: what their names say, and which of them fits the torch that is installed.

Names: `torch28-cxx11-cu128-x86_64-linux` (torch 2.8, C++11 ABI, CUDA 12.8), without the ABI in newer builds and outside
Linux; `torch-cuda` for Python that is compiled when it runs; `torch-universal` for the same, of whatever backend.
Within a major version, a build for an older CUDA runs on a newer one. Source: huggingface/kernels, docs/source/
kernel-requirements.md and kernels/src/kernels/variants.py, 2026.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass

from pluglm.errors import InputError

UNIVERSAL = "torch-universal"
_COMPILED = re.compile(
    r"torch(?P<major>\d)(?P<minor>\d+)(?:-(?P<abi>cxx11|cxx98))?-(?P<backend>[a-z]+)(?P<version>\d*)-"
    r"(?P<machine>x86_64|aarch64)-(?P<system>linux|darwin|windows)"
)


@dataclass(frozen=True)
class Here:
    """What is installed. torch: (2, 8). abi: "cxx11" or "cxx98". backend: "cuda", "rocm" or "cpu", with its version.

    machine, system: as builds spell them.
    """

    torch: tuple[int, int]
    abi: str
    backend: str
    version: tuple[int, int] | None
    machine: str
    system: str

    def __str__(self) -> str:
        backend = self.backend if self.version is None else f"{self.backend} {self.version[0]}.{self.version[1]}"
        abi = f", {self.abi}" if self.system == "linux" else ""
        return f"torch {self.torch[0]}.{self.torch[1]}, {backend}{abi}, {self.machine}, {self.system}"


def here() -> Here:
    """Asks torch and the platform."""
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    backend = "cuda" if torch.version.cuda else "rocm" if torch.version.hip else "cpu"
    said = torch.version.cuda or torch.version.hip
    version = tuple(int(part) for part in said.split(".")[:2]) if said else None
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    abi = "cxx11" if torch.compiled_with_cxx11_abi() else "cxx98"
    return Here(
        (major, minor), abi, backend, None if version is None else (version[0], version[1]), machine,
        platform.system().lower(),
    )  # fmt: skip


def misfit(name: str, at: Here) -> str | None:
    """Why a build does not run on a machine; None if it does."""
    if name.startswith("torch-"):
        backend = name.removeprefix("torch-")
        return (
            None
            if backend in ("universal", at.backend)
            else f"it is for {backend}, and torch is built for {at.backend}"
        )
    match = _COMPILED.fullmatch(name)
    if match is None:
        return "its name does not say what it is for, in a way that is known here"
    wanted = (int(match["major"]), int(match["minor"]))
    if wanted != at.torch:
        return f"it is for torch {wanted[0]}.{wanted[1]}, and {at.torch[0]}.{at.torch[1]} is installed"
    if (match["machine"], match["system"]) != (at.machine, at.system):
        return f"it is for {match['machine']} and {match['system']}, and this is {at.machine} and {at.system}"
    abi = match["abi"] or "cxx11"  # newer builds leave it out
    if at.system == "linux" and abi != at.abi:
        return f"it has the ABI {abi}, and torch has {at.abi}"
    backend = "cuda" if match["backend"] == "cu" else match["backend"]
    if backend != at.backend:
        return f"it is for {backend}, and torch is built for {at.backend}"
    version = _version(match["version"])
    if version is None or at.version is None or backend != "cuda":
        return None if version == at.version else f"it is for {backend} {match['version']}, and there is {at}"
    if version[0] != at.version[0] or version[1] > at.version[1]:
        return f"it is for CUDA {version[0]}.{version[1]}, and torch is built for {at.version[0]}.{at.version[1]}"
    return None


def choose(repo: str, names: Iterable[str], wish: str | None, at: Here) -> str:
    """The build that is wished for, or the best that fits: compiled for the newest CUDA, then Python of the backend.

    A build that is named is taken whatever is installed here: the wheel may be meant for another machine, and says
    which torch it needs.

    Raises: InputError with every build and why it is not taken.
    """
    known = sorted(names)
    if wish is not None and wish in known:
        return wish
    reasons = {name: misfit(name, at) for name in known}
    fitting = [name for name, reason in reasons.items() if reason is None]
    if wish is None and fitting:
        return min(fitting, key=_rank)
    table = "\n".join(f"{name}: {reasons[name] or 'fits'}" for name in known) or "there is no folder below build."
    what = f"`{repo}` has no build {wish!r}." if wish is not None else f"no build of `{repo}` fits what is installed."
    raise InputError(
        what, why=f"here is {at}.\n{table}",
        fix="Name one of these with --variant, install a torch that one of them is for, or take another commit.",
        argument="variant",
    )  # fmt: skip


def torch_range(name: str) -> str:
    """The range of torch versions that a build needs; "" if its name states none."""
    match = _COMPILED.fullmatch(name)
    return f"=={int(match['major'])}.{int(match['minor'])}.*" if match else ""


def wheel_tag(name: str) -> str:
    """The tag of the wheel for a build: of its platform, or of any."""
    match = _COMPILED.fullmatch(name)
    if match is None:
        return "py3-none-any"
    platforms = {
        "linux": f"linux_{match['machine']}",
        "windows": "win_amd64" if match["machine"] == "x86_64" else "win_arm64",
        "darwin": f"macosx_15_0_{'arm64' if match['machine'] == 'aarch64' else 'x86_64'}",
    }
    return f"py3-none-{platforms[match['system']]}"


def _version(digits: str) -> tuple[int, int] | None:
    """ "128" → (12, 8), "" → None."""
    return (int(digits[:-1]), int(digits[-1])) if len(digits) >= 2 else None


def _rank(name: str) -> tuple[int, int]:
    match = _COMPILED.fullmatch(name)
    if match is None:
        return (2 if name == UNIVERSAL else 1, 0)
    version = _version(match["version"])
    return (0, -(version[0] * 100 + version[1]) if version else 0)
