"""A name for what a model computes: equal for equal weights, config and dtype, another one as soon as a bit differs.

`Plan.fingerprint` is made before a weight is read, so two fine-tunes of one model may share it. Whatever is kept of a
model's work and used again later (keys and values, above all) needs to know that it is the same model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(module: nn.Module, *facts: str) -> str:
    """sha256, in hex, over the weights as they are now and over what else decides the result.

    Reads every weight once, on several cores: about a second for each 1 to 2 GB and core.

    Args:
        module: its persistent state counts: parameters and buffers, packed ones included.
        facts: the rest, such as the config's fingerprint and the dtype.
    """
    tensors = dict(_plain(module.state_dict().items()))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashing leaves Python to others
        digests = dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))
    whole = hashlib.sha256(repr(facts).encode())
    for name in sorted(digests):
        whole.update(name.encode() + b"\0" + digests[name])
    return whole.hexdigest()


def _plain(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by name; one that wraps others (packed weights) is taken apart."""
    for name, value in named:
        if hasattr(value, "__tensor_flatten__"):
            inner, _ = value.__tensor_flatten__()
            yield from _plain((f"{name}.{part}", getattr(value, part)) for part in inner)
        elif isinstance(value, Tensor):
            yield name, value


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()
