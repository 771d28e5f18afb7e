"""Where the tests find what they share; one thread, since tensors are tiny."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Test folders are no packages (importlib mode), so modules beside this file are found by their folder.
sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The reference library. Without it there is nothing to compare with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("transformers")
        library.utils.logging.disable_progress_bar()
    return library


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
