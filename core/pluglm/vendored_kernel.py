"""Attention kernels that became plugins: which names their files may have, and where their package begins.

A repository of kernels has one folder a build, `build/<variant>/`, and in it a Python package: either the folder itself
or, in older ones, the one folder in it. Source: huggingface/kernels, docs/source/kernel-requirements.md, 2026.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FOLDER = "build"
#: What an installed kernel says about itself, beside its package's `__init__.py`; and the folder of its files there.
RECORD, PLACE = "kernel.json", "kernel"
METADATA = "metadata.json"
#: The largest flash-attn build that was seen has 0.5 GB. More than this is refused before it is fetched.
MAX_FILES, MAX_TOTAL_BYTES, MAX_TEXT_BYTES = 1024, 2**30, 2**22
#: What a kernel must define to be one of attention. A cache's own function is not asked for: views are read here.
FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")

_VARIANT = re.compile(r"[a-z0-9][\w.]*(?:-[\w.]+)*", re.ASCII)
_PART = re.compile(r"[A-Za-z0-9_][\w.\-+]*", re.ASCII)
_DEPTH = 10


def is_variant(name: str) -> bool:
    """True for what can be the name of a build's folder."""
    return _VARIANT.fullmatch(name) is not None and ".." not in name and len(name) <= 80


def is_kernel_file(name: str) -> bool:
    """True for the names that belong to a build: `build/<variant>/…`, in plain characters, upwards nowhere."""
    parts = name.split("/")
    return (
        3 <= len(parts) <= _DEPTH
        and parts[0] == FOLDER
        and is_variant(parts[1])
        and all(_PART.fullmatch(part) and ".." not in part for part in parts[2:])
        and "__pycache__" not in parts
    )


def package_folder(names: Iterable[str]) -> str | None:
    """The folder of a build's `__init__.py` ("build/torch-universal"); None if there is none, or no telling which."""
    found = [name.rpartition("/")[0] for name in names if name.endswith("/__init__.py")]
    flat = [folder for folder in found if folder.count("/") == 1]
    nested = [folder for folder in found if folder.count("/") == 2]
    chosen = flat or nested
    return chosen[0] if len(chosen) == 1 else None
