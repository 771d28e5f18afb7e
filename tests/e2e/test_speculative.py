"""Speculative decoding over whole models: the tokens of plain decoding, with every cache, alone and in ragged batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pluglm
from pluglm import InputError, PlanError, UnsupportedRequestError
from pluglm.completions import Completion
from pluglm.contracts import ForwardInput
from pluglm.registry import Registry

PROMPTS = 10
TOKENS = 40
ROWS = [[60, 17, 201, 5, 99, 60, 17], [8], [40, 41, 42, 40, 41, 42, 40, 41], [7, 7]]
LOSSLESS = ("dynamic", "static", "hybrid", "paged")
INSTALLED = {provider.name for provider in Registry.installed().of("cache")}


def many(done: Completion | list[Completion]) -> list[Completion]:
    assert isinstance(done, list)
    return done


def one(done: Completion | list[Completion]) -> Completion:
    assert isinstance(done, Completion)
    return done


def statistics(lm: pluglm.LanguageModel) -> Any:
    """Of the speculative strategy that this model began to use last."""
    found = [s for s in lm._strategies.built() if hasattr(s, "statistics")]
    return found[-1].statistics


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Heads of files that the embedded model was not trained on, of different lengths; every other one given twice."""
    held_out = pytest.importorskip("pluglm_model_pystdlib").held_out
    texts = []
    for i, text in enumerate(sorted(held_out().values())[:PROMPTS]):
        head = text[: 200 + 37 * i]
        texts.append(head if i % 2 else f"{head}\n{head[: 60 + 11 * i]}")
    return texts


@pytest.fixture(scope="module")
def pystdlib() -> pluglm.LanguageModel:
    """The embedded model, decoding plainly."""
    return pluglm.load("pystdlib", dtype="float32")


@pytest.fixture(scope="module")
def greedy(pystdlib: pluglm.LanguageModel, prompts: list[str]) -> list[Completion]:
    """What it says."""
    return [one(pystdlib.complete(prompt, max_new_tokens=TOKENS)) for prompt in prompts]


@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_prompt_lookup_says_what_greedy_says_alone_and_in_a_ragged_batch(
    prompts: list[str], greedy: list[Completion], cache: str
) -> None:
    lm = pluglm.load("pystdlib", dtype="float32", cache=cache, decoding="prompt-lookup")
    accepted = 0
    for prompt, expected in zip(prompts, greedy, strict=True):
        assert lm.complete(prompt, max_new_tokens=TOKENS) == expected
        accepted += statistics(lm).accepted
    assert accepted > TOKENS
    assert lm.complete(prompts[:4], max_new_tokens=TOKENS) == greedy[:4]
    assert statistics(lm).accepted > 10
    assert "".join(lm.stream(prompts[0], max_new_tokens=TOKENS)) == greedy[0].text


def test_an_assistant_helps_itself_to_the_same_tokens(
    pystdlib: pluglm.LanguageModel, prompts: list[str], greedy: list[Completion]
) -> None:
    said: dict[str, Any] = {"decoding": "assisted", "assistant_model": pystdlib, "max_new_tokens": TOKENS}
    lm = pluglm.load("pystdlib", dtype="float32")
    assert lm.complete(prompts[:4], **said) == greedy[:4]
    found = statistics(lm)
    assert found.accepted == found.guessed > 2 * TOKENS
    lm.complete(prompts[:4], **said, temperature=1.0, seed=3)
    assert statistics(lm).accepted == statistics(lm).guessed


def test_prompt_lookup_samples_what_sampling_samples(pystdlib: pluglm.LanguageModel, prompts: list[str]) -> None:
    said: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 5}
    expected = pystdlib.complete(prompts[:3], max_new_tokens=TOKENS, **said)
    assert pystdlib.complete(prompts[:3], max_new_tokens=TOKENS, decoding="prompt-lookup", **said) == expected


@pytest.mark.parametrize("cache", [name for name in LOSSLESS if name in INSTALLED])
@pytest.mark.parametrize("decoding", ("prompt-lookup", "assisted", "early-exit"))
def test_every_lossless_cache_gives_the_tokens_of_greedy(
    folder: Path, lm: pluglm.LanguageModel, write_model: Callable[..., Path], tmp_path: Path, decoding: str, cache: str
) -> None:
    other = write_model(tmp_path / "helper", seed=4)
    options: dict[str, dict[str, Any]] = {
        "prompt-lookup": {"token_price": 0.0}, "assisted": {"assistant": str(other)},
        "early-exit": {"assistant_early_exit": 1},
    }  # fmt: skip
    helper: Any = {"options": {"decoding": options[decoding]}}
    mine: Any = pluglm.load(folder, cache=cache, decoding=decoding, **helper)
    expected = many(lm.complete(ROWS, max_new_tokens=60))
    own = {"assistant_confidence_threshold": 0.0, "num_assistant_tokens": 5} if decoding != "prompt-lookup" else {}
    assert mine.complete(ROWS, max_new_tokens=60, **own) == expected
    assert statistics(mine).guessed > 20
    assert [mine.complete(row, max_new_tokens=60, **own) for row in ROWS] == expected
    assert mine.plan["cache"].provider.endswith(f"/{cache}")


def test_first_layers_guess_and_the_whole_model_speaks(
    prompts: list[str], greedy: list[Completion], pystdlib: pluglm.LanguageModel
) -> None:
    """Nothing that calls share is changed by it."""
    module: Any = pystdlib.model.module
    layers, said = list(module.layers), {"decoding": "early-exit", "max_new_tokens": TOKENS, "num_assistant_tokens": 3}
    accepted = []
    for count in (1, 5):
        own = {**said, "assistant_early_exit": count, "assistant_confidence_threshold": 0.0}
        assert pystdlib.complete(prompts[:3], **own) == greedy[:3]
        assert pystdlib.complete(prompts[3], **own) == greedy[3]
        accepted.append(statistics(pystdlib).accepted)
    assert accepted[1] > max(accepted[0], 10)
    assert list(module.layers) == layers
    assert pystdlib.complete(prompts[3], max_new_tokens=TOKENS) == greedy[3]
    with pytest.raises(InputError, match=r"assistant_early_exit=6 leaves nothing to check[\s\S]*has 6 layers"):
        pystdlib.complete(prompts[0], **said, assistant_early_exit=6)


def test_first_layers_are_the_models_own_without_the_rest(pystdlib: pluglm.LanguageModel) -> None:
    """What they say is the head's opinion of an inner layer, and they have no parameter that the model has not."""
    module: Any = pystdlib.model.module
    cut = module.first_layers(2)
    assert {p.data_ptr() for p in cut.parameters()} < {p.data_ptr() for p in module.parameters()}
    ids = torch.tensor([[60, 17, 201, 5]])
    with torch.no_grad():
        inner = pystdlib.model(ids, output_hidden_states=True).hidden_states[2]
        expected = module.logits_of(module.norm(inner))
        got = cut(ForwardInput(ids, torch.arange(4)[None], None, dense=True)).logits
    assert torch.allclose(got, expected, atol=1e-5)


def test_an_assistant_with_another_tokenizer_changes_no_token(
    folder: Path, lm: pluglm.LanguageModel, pystdlib: pluglm.LanguageModel, prompts: list[str], greedy: list[Completion]
) -> None:
    """290 ids of one tokenizer, 6,144 of the other; each helps the other, with caches of fixed size too."""
    texts = ["the cat sat on a mat", "hello world", "a book of cats . hello wor"]
    helper = pluglm.load("pystdlib", dtype="float32", cache="static")
    own: dict[str, Any] = {"decoding": "assisted", "assistant_model": helper, "num_assistant_tokens": 3}
    own["assistant_confidence_threshold"] = 0.0
    for said in ({}, {"temperature": 0.8, "seed": 3}):
        expected = lm.complete(texts, max_new_tokens=16, **said)  # type: ignore[arg-type]
        assert lm.complete(texts, max_new_tokens=16, **said, **own) == expected
        assert statistics(lm).guessed > 20
    own = {"decoding": "assisted", "assistant_model": lm, "num_assistant_tokens": 2}
    assert pystdlib.complete([text[:90] for text in prompts[:2]], max_new_tokens=12, **own) == pystdlib.complete(
        [text[:90] for text in prompts[:2]], max_new_tokens=12
    )


def test_the_packaged_draft_model_helps_the_packaged_model(
    pystdlib: pluglm.LanguageModel, prompts: list[str], greedy: list[Completion]
) -> None:
    draft = pluglm.load("pystdlib-draft", dtype="float32")
    said: dict[str, Any] = {"decoding": "assisted", "assistant_model": draft, "num_assistant_tokens": 2}
    assert pystdlib.complete(prompts[:4], max_new_tokens=TOKENS, **said) == greedy[:4]
    assert statistics(pystdlib).accepted > TOKENS


@pytest.mark.parametrize("cache", [name for name in ("hybrid", "sliding", "paged") if name in INSTALLED])
def test_windowed_caches_go_back_as_far_as_a_guess_is_long(
    write_model: Callable[..., Path], tmp_path: Path, cache: str
) -> None:
    config = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    path = write_model(tmp_path / "windows", config=config)
    expected = many(pluglm.load(path, cache="dynamic").complete(ROWS, max_new_tokens=120))
    lm = pluglm.load(path, cache=cache, decoding="prompt-lookup", options={"decoding": {"token_price": 0.0}})
    assert lm.complete(ROWS, max_new_tokens=120) == expected
    assert [lm.complete(row, max_new_tokens=120) for row in ROWS] == expected


@pytest.mark.skipif("quantized" not in INSTALLED, reason="no such layout here")
def test_a_cache_that_rounds_serves_speculation_too(folder: Path) -> None:
    lm = pluglm.load(
        folder,
        cache="quantized",
        decoding="prompt-lookup",
        options={"cache": {"residual": 16}, "decoding": {"token_price": 0.0}},
    )
    done = many(lm.complete(ROWS, max_new_tokens=100))
    assert [len(c.token_ids) for c in done] == [100] * 4
    assert statistics(lm).guessed > 20


def test_a_given_cache_goes_on_in_the_next_turn(lm: pluglm.LanguageModel) -> None:
    cache, rows = lm.new_cache(batch_size=4), [list(row) for row in ROWS]
    rows = [[*row, *row, *row, *row][:9] for row in rows]
    for _ in range(3):
        done = many(lm.complete(rows, past_key_values=cache, max_new_tokens=13, decoding="prompt-lookup"))
        assert done == lm.complete(rows, max_new_tokens=13)
        rows = [[*row, *c.token_ids, 33] for row, c in zip(rows, done, strict=True)]
        assert cache.length == len(rows[0]) - 2


def test_the_context_is_used_to_its_last_token_and_no_further(folder: Path, lm: pluglm.LanguageModel) -> None:
    prompt = ROWS[2] * 20
    expected = one(lm.complete(prompt))
    assert len(prompt) + len(expected.token_ids) == 192
    for cache in ("dynamic", "static"):
        assert pluglm.load(folder, cache=cache, decoding="prompt-lookup").complete(prompt) == expected


def test_models_with_recurrent_states_are_refused_when_they_are_planned(tmp_path: Path) -> None:
    config = {
        "model_type": "mamba2", "vocab_size": 37, "hidden_size": 20, "num_hidden_layers": 2, "num_heads": 8,
        "head_dim": 5, "state_size": 7, "n_groups": 2, "chunk_size": 4, "dtype": "float32",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"unread": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        PlanError, match=r"no [a-z, ]*rollback for this model \(recurrent states cannot give back a token"
    ):
        pluglm.load(tmp_path, decoding="prompt-lookup")


def test_assistants_that_cannot_be_are_refused(lm: pluglm.LanguageModel) -> None:
    with pytest.raises(InputError, match="there is no assistant"):
        lm.generate([5, 6], decoding="assisted", max_new_tokens=3)
    other = pluglm.load("pystdlib")
    with pytest.raises(
        UnsupportedRequestError, match=r"token ids, the model 307, and the tokenizer of the assistant is"
    ):
        lm.generate([5, 6], decoding="assisted", assistant_model=other.model, max_new_tokens=3)
    assert lm.generate([5, 6], decoding="assisted", assistant_model=lm.model, max_new_tokens=3) == lm.generate(
        [5, 6], max_new_tokens=3
    )
