"""Seeds for code that draws from torch's own generator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pluglm.errors import InputError


@contextlib.contextmanager
def seeded(seed: int | tuple[int, ...] | None, device: torch.device) -> Iterator[None]:
    """torch's generators at `seed` inside, as they were afterwards. None: they go on as they are.

    Raises: InputError for a seed a row, which one generator cannot honour.
    """
    if seed is None:
        yield
        return
    if not isinstance(seed, int):
        if len(set(seed)) != 1:
            raise InputError(
                "a seed for each row cannot be honoured by a recipe.", why="all its rows draw from one generator.",
                fix="Pass one seed, or the prompts one by one.", argument="seed",
            )  # fmt: skip
        seed = seed[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
