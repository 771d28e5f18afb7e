# ruff: noqa: INP001 - a script of the build, in no package
"""Compiles `native/step.cpp` into the package while its wheel is built; without a C++ compiler there is no library.

PLUGLM_NATIVE=0 leaves the library out, PLUGLM_NATIVE=1 fails the build where it cannot be made. CXX names a compiler.
With neither of them a library that is newer than its sources, from an earlier build of this folder, is used again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math",
    "-fvisibility=hidden", "-Wno-psabi",
)  # fmt: skip


class NativeHook(BuildHookInterface[Any]):
    """Puts the library beside the Python modules, so that an editable installation finds it, too."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a wheel or an editable installation is put together."""
        package = Path(self.root) / "src" / "pluglm_executor_cpu"
        library = package / f"libstep{SUFFIX}"
        wanted = os.environ.get("PLUGLM_NATIVE", "")
        why = "PLUGLM_NATIVE=0" if wanted == "0" else ""
        if not why and (wanted or os.environ.get("CXX") or not is_current(library, package / "native")):
            why = compiled(package / "native" / "step.cpp", library)
        if why:
            library.unlink(missing_ok=True)
            if wanted == "1":
                raise RuntimeError(f"PLUGLM_NATIVE=1, and step.cpp was not compiled: {why}")
            self.app.display_warning(f"pluglm-executor-cpu is built without its C++ library: {why}")
            return
        # No part of it is Python's own ABI: one wheel for every Python on this platform.
        tags = (tag.platform for tag in sys_tags() if "linux" not in tag.platform or tag.platform.startswith("linux_"))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(tags)}"


def is_current(library: Path, sources: Path) -> bool:
    """Whether it is newer than everything that it is made of, this script included. Compiling takes a minute."""
    made_of = [*sources.iterdir(), Path(__file__)]
    return library.exists() and library.stat().st_mtime_ns > max(file.stat().st_mtime_ns for file in made_of)


def compiled(source: Path, library: Path) -> str:
    """Why there is no library; empty: it is there. Replaced in one step: a running process may use the old one."""
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = named or [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))][:1]
    if not compiler:
        return "no C++ compiler was found (c++, g++, clang++ or CXX)"
    part = library.with_name(f".{library.name}.{os.getpid()}")
    command = [*compiler, *FLAGS, "-o", str(part), str(source)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{shlex.join(compiler)} failed: {error}"
    if done.returncode:
        part.unlink(missing_ok=True)
        return f"{shlex.join(compiler)} failed: {done.stderr.strip()[-2000:]}"
    part.replace(library)
    return ""
