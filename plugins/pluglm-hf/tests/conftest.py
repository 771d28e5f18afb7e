"""The reference, imported once and quietly; tiny checkpoints; one thread."""

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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> folder: "llama", a smaller "draft" of the same vocabulary, "t5"."""
    import hf_checkpoints as tiny

    return {
        "llama": str(tiny.write_llama(tmp_path_factory.mktemp("llama"))),
        "draft": str(tiny.write_llama(tmp_path_factory.mktemp("draft"), seed=3, layers=1)),
        "t5": str(tiny.write_t5(tmp_path_factory.mktemp("t5"))),
    }


@pytest.fixture(scope="session")
def llama(folders: dict[str, str]) -> Any:
    """The decoder-only model of pluglm_hf."""
    import pluglm_hf

    return pluglm_hf.AutoModelForCausalLM.from_pretrained(folders["llama"])


@pytest.fixture(scope="session")
def t5(folders: dict[str, str]) -> Any:
    """The encoder-decoder of pluglm_hf."""
    import pluglm_hf

    return pluglm_hf.AutoModelForSeq2SeqLM.from_pretrained(folders["t5"])


@pytest.fixture(scope="session")
def tokenizer(folders: dict[str, str]) -> Any:
    """The tokenizer of pluglm_hf."""
    import pluglm_hf

    return pluglm_hf.AutoTokenizer.from_pretrained(folders["llama"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
