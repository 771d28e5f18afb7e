"""llama.cpp, built from source for this machine: an environment of its own in the cache folder, made once."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from peers.checkpoints import CannotMakeError, need_room
from peers.machine import cpu_flags, cpu_model, first_line

LLAMA_CPP_PYTHON, GGUF = "0.3.36", "0.19.0"
#: Everything for this CPU, nothing beside the library; no cache of objects, which would hide other flags.
CMAKE_ARGS = "-DGGML_NATIVE=ON -DGGML_OPENMP=ON -DLLAVA_BUILD=OFF -DGGML_CCACHE=OFF"


def cxx_compiler() -> str | None:
    """A C++ compiler: what CXX names, or the first of the usual ones."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None)


def find_llama(cache: Path, *, jobs: int, build: bool = True) -> tuple[Path, dict[str, Any]]:
    """A Python that has llama.cpp, built if there is none for this version, compiler and CPU; and how it was built.

    Args:
        jobs: compilers at once. build: False only looks.
    Raises: CannotMakeError.
    """
    cxx = cxx_compiler()
    if cxx is None:
        raise CannotMakeError("no C++ compiler is installed")
    facts = {
        "llama-cpp-python": LLAMA_CPP_PYTHON, "gguf": GGUF, "cmake_args": CMAKE_ARGS,
        "compiler": first_line([cxx, "--version"]), "python": platform.python_version(), "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache / f"llama.cpp-{LLAMA_CPP_PYTHON}-{digest}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / "built.json").is_file():
        return python, facts
    if not build:
        raise CannotMakeError(f"llama.cpp is not built in {cache}, and building was not wished")
    need_room(cache, 2_000_000_000)
    print(f"building llama.cpp with {jobs} jobs, some minutes, once: {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    _install(python, folder / "build.log", cxx, jobs)
    (folder / "built.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return python, facts


def _install(python: Path, log: Path, cxx: str, jobs: int) -> None:
    """pip fetches the source and, where it is not there, cmake."""
    command = [
        str(python), "-m", "pip", "install", "--verbose", "--no-binary", "llama-cpp-python",
        f"llama-cpp-python=={LLAMA_CPP_PYTHON}", f"gguf=={GGUF}",
    ]  # fmt: skip
    hook = shlex.quote(f"-DCMAKE_PROJECT_llama.cpp_INCLUDE={Path(__file__).with_name('without_common.cmake')}")
    told = {"CMAKE_ARGS": f"{CMAKE_ARGS} {hook}", "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs), "CXX": cxx}
    with log.open("wb") as out:
        code = subprocess.run(command, env=os.environ | told, stdout=out, stderr=out, check=False).returncode
    if code:
        said = [line for line in log.read_text("utf-8", "replace").splitlines() if "error" in line.lower()]
        raise CannotMakeError(f"llama.cpp was not built: {said[-1].strip() if said else f'see {log}'}")
