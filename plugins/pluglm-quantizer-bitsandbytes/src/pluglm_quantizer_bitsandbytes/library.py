"""bitsandbytes itself: imported quietly, without fetching anything, and asked which of its operators run where."""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch

from pluglm import UnsupportedRequestError

#: Kind -> the operators that packing and computing need.
OPERATORS = {
    "int8": (
        "int8_vectorwise_quant", "int8_mixed_scaled_mm", "int8_scaled_mm", "int8_linear_matmul", "int8_mm_dequant",
    ),
    "nf4": ("quantize_4bit", "gemm_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise"),
}  # fmt: skip
OPERATORS["fp4"] = OPERATORS["nf4"]
INSTALL = "pip install 'bitsandbytes>=0.50,<0.51'"


def load(kind: str, device: str) -> None:
    """Import bitsandbytes and make sure that it can compute a kind of weight on a device.

    Raises: UnsupportedRequestError if it is not installed, its native library does not load, or an operator is missing.
    """
    reasons = lacking(kind, device)
    if reasons:
        raise UnsupportedRequestError(
            f"bitsandbytes cannot compute {kind} layers on {device} here.", why="; ".join(reasons),
            fix=f"Run {INSTALL}, or load the model without it.", reasons=tuple(reasons),
        )  # fmt: skip


def lacking(kind: str, device: str) -> list[str]:
    """What is missing, in words."""
    try:
        _import()
    except ImportError as error:
        return [f"the package bitsandbytes cannot be imported ({error})"]
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    reasons = []
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        reasons.append("the native library of bitsandbytes cannot be loaded; python -m bitsandbytes says why")
    key = "CUDA" if device.startswith("cuda") else "CPU"
    reasons += [f"this bitsandbytes has no {name} for {device}" for name in OPERATORS[kind] if not _runs(name, key)]
    return reasons


def functional() -> Any:
    """The module `bitsandbytes.functional`, most of which has no types. After `load`."""
    import bitsandbytes.functional

    return bitsandbytes.functional


def _runs(name: str, key: str) -> bool:
    """Has this operator a kernel for a device? The general ones are made of torch operators and run on all."""
    keys = (key, "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    operator = f"bitsandbytes::{name}"
    if not hasattr(torch.ops.bitsandbytes, name):
        return False
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(operator, k) for k in keys)


def _import() -> None:
    """Import it, without two things it would do: load torch's compiler (seconds), and fetch a kernel from a hub.

    What it would compile are stand-ins for its native library, and optimizers: neither is used here. The kernel, on
    CPUs with AVX512-BF16, is for layers of its own that are not used either.
    """
    if "bitsandbytes" in sys.modules:
        return
    level, compiler, kernels = logging.root.manager.disable, torch.compile, sys.modules.get("kernels")
    logging.disable(logging.WARNING)
    torch.compile = _uncompiled  # type: ignore[assignment]
    sys.modules["kernels"] = None  # type: ignore[assignment]  # an import of it fails, which bitsandbytes catches
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logging.disable(level)
        torch.compile = compiler
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def _uncompiled(function: Any = None, **_: object) -> Any:
    """What `torch.compile` is while bitsandbytes is imported: a decorator, with or without arguments."""
    return _uncompiled if function is None else function
