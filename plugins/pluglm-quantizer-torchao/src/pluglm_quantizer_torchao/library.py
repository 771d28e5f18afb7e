"""torchao, imported late and quietly."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any


def find(place: str) -> Any:
    """What lies at `module:name` of torchao.

    Its remarks on CUDA libraries that a CPU build of torch cannot load are kept off the screen while it is imported.
    """
    module, _, name = place.partition(":")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(f"torchao.{module}"), name)
    finally:
        logging.disable(level)


def mapping(name: str) -> Any:
    """`MappingType` by its name in small letters."""
    return find("quantization.quant_primitives:MappingType")[name.upper()]


def granularity(columns: int | str) -> Any:
    """Which weights share a scale: "row", "tensor", "block" (1x128 of an input, 128x128 of a weight) or a count."""
    if columns == "block":
        per_block = find("quantization.granularity:PerBlock")
        return [per_block([1, 128]), per_block([128, 128])]
    if isinstance(columns, int):
        return find("quantization.granularity:PerGroup")(columns)
    return find("quantization.granularity:" + {"row": "PerRow", "tensor": "PerTensor"}[columns])()


def axis_or_group(columns: int | str) -> Any:
    """The same for the intx types, which call a row an axis."""
    return find("quantization.granularity:PerAxis")(0) if columns == "row" else granularity(columns)


def choice(name: str) -> Callable[[str], Any]:
    """Turns a text into the member of that value of an enumeration of torchao's."""
    return lambda value: find(f"quantization.quantize_.workflows:{name}")(value)
