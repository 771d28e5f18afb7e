"""Runs `custom_generate` recipes of the Hub, unmodified. Importing this package does not import torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import DecodingRequest, DecodingStrategy


@hookimpl
def pluglm_build_decoding(request: DecodingRequest) -> DecodingStrategy:
    """The strategy of a function: `decoding="recipe"` with the option `function`, which `custom_generate=` means."""
    from pluglm_hf.recipes.option import read_function
    from pluglm_hf.recipes.strategy import callable_strategy  # imports torch

    return callable_strategy(read_function(request), request)


def callable_strategy(function: Callable[..., Any], request: DecodingRequest) -> DecodingStrategy:
    """See `strategy.callable_strategy`."""
    made: DecodingStrategy = _strategy().callable_strategy(function, request)
    return made


def vendored_strategy(package: str, request: DecodingRequest) -> DecodingStrategy:
    """See `strategy.vendored_strategy`."""
    made: DecodingStrategy = _strategy().vendored_strategy(package, request)
    return made


def _strategy() -> Any:
    return importlib.import_module("pluglm_hf.recipes.strategy")
