"""Each checkpoint is written and loaded once a session."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

# Test folders are no packages (importlib mode), so the two modules beside this file are found by their folder.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Variant name -> folder of its checkpoint."""
    from checkpoints import write_checkpoint

    @cache
    def write(name: str) -> Path:
        return write_checkpoint(name, tmp_path_factory.mktemp(name))

    return write


@pytest.fixture(scope="session")
def loaded(folder: Callable[[str], Path]) -> Callable[..., Any]:
    """(variant name, attention, cache) -> the model in pluglm."""
    import kit

    @cache
    def load(name: str, attention: str = "eager", layout: str = "dynamic") -> Any:
        return kit.load(folder(name), attention=attention, layout=layout)

    return load


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
