"""One way to run a strategy on the scripted model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pluglm_decoding_beam
import pytest
import torch

from pluglm.contracts import DecodingRequest, GenerationConfig, GenerationOutput
from pluglm.testing.decoding import text
from pluglm.testing.scripted_model import ScriptedModel

ARGUMENTS = (
    "attention_mask", "past_key_values", "use_cache", "streamer", "logits_processor", "stopping_criteria",
)  # fmt: skip


@pytest.fixture
def run() -> Callable[..., GenerationOutput]:
    """(name, model, rows of ids, **settings and arguments) -> the output."""

    def call(name: str, model: ScriptedModel, ids: Sequence[Sequence[int]], **said: Any) -> GenerationOutput:
        provider = getattr(pluglm_decoding_beam, name.replace("-", "_"))
        strategy = provider.pluglm_build_decoding(request=DecodingRequest(model.vocab_size, "cpu", text))
        arguments = {key: said.pop(key) for key in list(said) if key in ARGUMENTS}
        config = GenerationConfig(max_new_tokens=5, pad_token_id=0).updated(**said)
        output = strategy(model, torch.tensor(ids), generation_config=config, **arguments)
        assert isinstance(output, GenerationOutput)
        return output

    return call
