"""How fast this machine reads memory, with as many threads as the contenders have; a process of its own, too."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

PASSES = 3


def compiler() -> str | None:
    """A C compiler: what CC names, or the first of the usual ones."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CC"), "cc", "gcc", "clang")))), None)


def compiled_reader(cc: str) -> Callable[[Any], Any]:
    """`read_memory.c` for this machine. ctypes lets go of the interpreter's lock meanwhile, so threads read abreast."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "read.so"
        source = Path(__file__).with_name("read_memory.c")
        subprocess.run([cc, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        words = ctypes.CDLL(str(library)).read_words
    words.argtypes, words.restype = (ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint64
    return lambda part: words(part.ctypes.data, part.size)


class Bandwidth:
    """Served like a contender, with one thing to ask."""

    def imports(self) -> dict[str, str]:
        """Nothing that takes time."""
        return {}

    def load(self, job: dict[str, Any]) -> dict[str, Any]:
        """A buffer, a part for each thread, which writes it first."""
        cc, self.threads = compiler(), job["threads"]
        self.read, how = np.add.reduce, "numpy"
        if cc is not None:
            with suppress(OSError, subprocess.CalledProcessError):  # numpy is slower; `reader` says which it was
                self.read, how = compiled_reader(cc), "C"
        buffer = np.empty(job["read_bytes"] // 8, dtype=np.uint64)
        self.count = buffer.nbytes
        self.parts = np.array_split(buffer, self.threads)
        self.pool = ThreadPoolExecutor(self.threads)
        list(self.pool.map(lambda part: part.fill(1), self.parts))
        return {"reader": how}

    def read_memory(self) -> float:
        """Bytes a second: the best of some passes."""
        best = 0.0
        for _ in range(PASSES):
            started = time.perf_counter()
            list(self.pool.map(self.read, self.parts))
            best = max(best, self.count / (time.perf_counter() - started))
        return best
