"""What architecture plugins share when they read a config.json: sizes, rotary positions, windows, ids. No torch."""

from pluglm_blocks.reading.alibi import alibi_slopes
from pluglm_blocks.reading.config import (
    ACTIVATIONS,
    UNREAD,
    Config,
    Sizes,
    positive,
    read_layer_types,
    read_sizes,
    read_windows,
    refuse,
    sliding_window,
    token_ids,
    window_or_none,
)
from pluglm_blocks.reading.describe import Family, describe
from pluglm_blocks.reading.rope import read_rope, read_ropes, stretched
from pluglm_blocks.reading.state_space import read_time_step_limit

__all__ = [
    "ACTIVATIONS",
    "UNREAD",
    "Config",
    "Family",
    "Sizes",
    "alibi_slopes",
    "describe",
    "positive",
    "read_layer_types",
    "read_rope",
    "read_ropes",
    "read_sizes",
    "read_time_step_limit",
    "read_windows",
    "refuse",
    "sliding_window",
    "stretched",
    "token_ids",
    "window_or_none",
]
