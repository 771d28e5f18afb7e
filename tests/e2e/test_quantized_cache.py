"""The packed cache under a whole model: what it reads back, and that every attention backend reads the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pluglm
from pluglm.completions import Completion

PROMPT = "def read_csv(path):\n    with open(path) as file:\n"
LONG = PROMPT + "        for line in file:\n            yield line.split(',')\n\n\n" * 12


@pytest.fixture(scope="module")
def full() -> pluglm.LanguageModel:
    return pluglm.load("pystdlib", dtype="float32", cache="dynamic", attention="sdpa")


def packed(attention: str = "sdpa", *, name: str = "quantized", **options: Any) -> pluglm.LanguageModel:
    return pluglm.load("pystdlib", dtype="float32", attention=attention, cache=name, options={"cache": options})


def tokens(lm: pluglm.LanguageModel, prompt: str, count: int) -> tuple[int, ...]:
    done = lm.complete(prompt, max_new_tokens=count, do_sample=False)
    assert isinstance(done, Completion)
    return done.token_ids


def logits(lm: pluglm.LanguageModel, text: str, piece: int) -> torch.Tensor:
    """[T, V] of a text that is fed in pieces, and the cache is asked to have packed most of it."""
    assert lm.tokenizer is not None
    ids = torch.tensor([lm.tokenizer.encode(text)])
    cache = lm.new_cache()
    with torch.no_grad():
        parts = (ids[:, start : start + piece] for start in range(0, ids.shape[1], piece))
        return torch.cat([lm.model(part, past_key_values=cache).logits[0] for part in parts])


def test_auto_never_chooses_it() -> None:
    plan = pluglm.load("pystdlib", dtype="float32").plan
    assert "quantized" not in str(plan["cache"].provider)


def test_while_everything_is_in_the_tail_the_tokens_are_those_of_a_full_cache(full: pluglm.LanguageModel) -> None:
    lm = packed(bits=8, residual=128)
    assert tokens(lm, PROMPT, 32) == tokens(full, PROMPT, 32)
    assert torch.equal(logits(lm, PROMPT, 7), logits(full, PROMPT, 7))


def test_eager_and_sdpa_read_the_same_stored_numbers() -> None:
    made = {name: packed(name, bits=4, residual=16) for name in ("eager", "sdpa")}
    assert tokens(made["eager"], LONG, 24) == tokens(made["sdpa"], LONG, 24)
    assert torch.allclose(logits(made["eager"], LONG, 16), logits(made["sdpa"], LONG, 16), atol=2e-3)


def test_fewer_bits_are_further_off_and_each_less_than_it_may(full: pluglm.LanguageModel) -> None:
    exact = logits(full, LONG, 16).log_softmax(-1)
    off = []
    for bits in (8, 4, 2):
        got = logits(packed(bits=bits, residual=16), LONG, 16).log_softmax(-1)
        off.append(float((exact.exp() * (exact - got)).sum(-1).mean()))  # mean KL divergence, nats a token
    assert off[0] < off[1] < off[2]
    assert off[0] < 1e-4
    assert off[1] < 1e-2
    assert off[2] < 0.3


def test_the_variant_hqq_serves_a_model() -> None:
    pytest.importorskip("hqq.core.optimize")
    lm = packed(name="quantized:hqq", bits=4, residual=16)
    assert lm.plan["cache"].variant == "hqq"
    assert len(tokens(lm, LONG, 8)) == 8


def test_an_option_it_does_not_know_is_refused_by_name() -> None:
    with pytest.raises(pluglm.PluglmError, match="residual_length"):
        packed(residual_length=64)
