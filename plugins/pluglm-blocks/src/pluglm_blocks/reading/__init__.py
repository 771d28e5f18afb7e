"""What architecture plugins share when they read a config.json: sizes, rotary positions, windows, ids. No torch."""

from pluglm_blocks.reading.config import (
    ACTIVATIONS,
    UNREAD,
    Config,
    Sizes,
    positive,
    read_sizes,
    read_windows,
    refuse,
    sliding_window,
    token_ids,
    window_or_none,
)
from pluglm_blocks.reading.describe import Family, describe
from pluglm_blocks.reading.rope import read_rope, stretched

__all__ = [
    "ACTIVATIONS",
    "UNREAD",
    "Config",
    "Family",
    "Sizes",
    "describe",
    "positive",
    "read_rope",
    "read_sizes",
    "read_windows",
    "refuse",
    "sliding_window",
    "stretched",
    "token_ids",
    "window_or_none",
]
