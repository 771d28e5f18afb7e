"""Checkpoints: where they are, what they hold, and how they are written.

`resolve` finds the folder, `open_folder` checks it and gives tensors as views of its files, `ConfigReader` reads its
config and accounts for every key, `atomic_folder` with `write_safetensors` saves a new one.
"""

from __future__ import annotations

from pluglm.checkpoint.config_reader import REQUIRED, ConfigReader, ConfigReport
from pluglm.checkpoint.folder import Checkpoint, open_folder
from pluglm.checkpoint.header import Header, TensorInfo, read_header
from pluglm.checkpoint.hub import resolve
from pluglm.checkpoint.neutral import NEUTRAL
from pluglm.checkpoint.progress import track
from pluglm.checkpoint.save import atomic_folder, write_safetensors

__all__ = [
    "Checkpoint",
    "ConfigReader",
    "ConfigReport",
    "Header",
    "NEUTRAL",
    "REQUIRED",
    "TensorInfo",
    "atomic_folder",
    "open_folder",
    "read_header",
    "resolve",
    "track",
    "write_safetensors",
]
