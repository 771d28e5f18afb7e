"""The names that the package offers: all there, and cheap to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pluglm_hf
import pytest


def test_public_names_are_sorted_and_there() -> None:
    assert pluglm_hf.__all__ == sorted(pluglm_hf.__all__) == dir(pluglm_hf)
    for name in pluglm_hf.__all__:
        value = getattr(pluglm_hf, name)
        assert value.__doc__ and value.__name__ == name


def test_they_are_names_of_the_reference(transformers: Any) -> None:
    own = {"BaseStreamer", "PreTrainedTokenizer"}  # of a module below; of another class
    assert [name for name in pluglm_hf.__all__ if name not in own and not hasattr(transformers, name)] == []


def test_names_of_another_distribution_say_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pluglm_watermark", None)
    monkeypatch.delitem(vars(pluglm_hf), "WatermarkingConfig", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AttributeError, match="pip install pluglm-watermark"):
        _ = pluglm_hf.WatermarkingConfig


@pytest.mark.parametrize(
    "code", ["import pluglm_hf", "from pluglm_hf import GenerationConfig, HqqConfig, BatchEncoding"]
)
def test_importing_loads_no_torch_and_no_plugin(code: str) -> None:
    program = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    loaded = set(done.stdout.split())
    assert not loaded & {"torch", "transformers", "tokenizers", "pluglm_caches", "huggingface_hub"}


def test_no_public_name_is_that_of_a_module() -> None:
    """Importing the module would put it in the name's place."""
    rooms = {path.stem for path in Path(pluglm_hf.__file__).parent.iterdir()}
    assert not rooms & set(pluglm_hf.__all__)
