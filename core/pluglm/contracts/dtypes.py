"""dtypes by name, so that what is planned without torch can be built with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name without "torch." ("bfloat16")."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        from pluglm.errors import InputError

        raise InputError(f"{name!r} is not a torch dtype.", fix='Write e.g. "float32" or "bfloat16".', argument="dtype")
    return dtype
