"""`set_seed`: one seed for every generator of numbers that a program may use."""

from __future__ import annotations

import random

import torch


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random numbers; calls that draw follow torch's."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
