"""Modules built without storage, and without the random values that layers begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: How the layers of `torch.nn` fill their parameters, as methods of tensors and as functions of `torch.nn.init`.
_FILLS = frozenset(("normal_", "uniform_", "kaiming_uniform_"))


@contextmanager
def unfilled() -> Iterator[None]:
    """Within it, tensors are made on the meta device, and filling one of those with random numbers does nothing.

    They hold no numbers, so nothing else changes. But on the meta device torch 2.13 runs `normal_` (every
    `nn.Embedding`) in Python, and imports its compiler for that: longer than importing torch itself.
    """
    with torch.device("meta"), _WithoutFilling():
        yield


class _WithoutFilling(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        given = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            tensor = args[0] if args else given.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **given)
