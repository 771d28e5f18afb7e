"""A scripted model as the surface needs it, and recipes from texts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pluglm_hf.recipes.loading import Recipe, load_recipe
from pluglm_hf.surface import GenerationSurface

from pluglm.testing.scripted_model import ScriptedModel

DESCRIPTION = SimpleNamespace(
    max_seq_len=None, slots=(), num_layers=1, vocab_size=23, hidden_size=1, program=None, eos_token_ids=(1,),
    bos_token_id=None, pad_token_id=None, is_encoder_decoder=False, model_type="scripted", decoder_start_token_id=None,
)  # fmt: skip


class Dressed:
    """A scripted model with the parts of a loaded one that the surface reads."""

    description, layout = DESCRIPTION, "scripted"

    def __init__(self, model: ScriptedModel) -> None:
        self.model, self.device, self.config = model, model.device, {"model_type": "scripted"}
        self.new_cache = model.new_cache

    def __call__(self, inputs_embeds: Any = None, output_hidden_states: bool = False, **kwargs: Any) -> Any:
        output = self.model(**kwargs)
        return SimpleNamespace(logits=output.logits, past_key_values=output.past_key_values, hidden_states=None)


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel(23)


@pytest.fixture
def dress() -> Callable[[ScriptedModel], Any]:
    """A scripted model -> the same in the form of a loaded one."""
    return Dressed


@pytest.fixture
def surface(model: ScriptedModel) -> GenerationSurface:
    return GenerationSurface(Dressed(model))  # type: ignore[arg-type]


@pytest.fixture
def load() -> Callable[..., Recipe]:
    """(text of generate.py, helper="text of helper.py", …) -> the recipe."""

    def made(text: str, requirements: str | None = None, **helpers: str) -> Recipe:
        files = {f"custom_generate/{name}.py": content.encode() for name, content in helpers.items()}
        if requirements is not None:
            files["custom_generate/requirements.txt"] = requirements.encode()
        return load_recipe({"custom_generate/generate.py": text.encode(), **files}, "mine")

    return made
