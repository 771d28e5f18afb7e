"""Whole calls with processors, filters, guidance and outputs give what Transformers' `generate` gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import kit
import pluglm_decoding_speculative
import pluglm_decoding_standard
import pytest
import torch
from checkpoints import VOCAB_SIZE
from torch import Tensor

from pluglm.contracts import DecodingRequest, GenerationConfig, GenerationOutput
from pluglm.errors import InputError
from pluglm.lm import LanguageModel

Folder = Callable[[str], Path]
Loaded = Callable[..., LanguageModel]
NAME, STEPS, PAD = "llama-llama3", 16, 130
EOS = (3, 77)
#: Prompt lengths, longest first.
RAGGED = (17, 9, 5)


def allowed(batch: int, ids: Tensor) -> list[int]:
    return [(int(ids[-1]) * 3 + k) % VOCAB_SIZE for k in range(20)]


#: Fields that decide a greedy text, alone.
ALONE: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequence bias": {"sequence_bias": {(5,): 4.0, (101,): -30.0, (7, 9): 3.0}},
    "encoder penalty": {"encoder_repetition_penalty": 1.8},
    "repetition penalty": {"repetition_penalty": 1.7},
    "unigrams": {"no_repeat_ngram_size": 1},
    "bigrams": {"no_repeat_ngram_size": 2, "suppress_tokens": list(range(9, VOCAB_SIZE))},
    "encoder unigrams": {"encoder_no_repeat_ngram_size": 1},
    "min length": {"min_length": 24, "suppress_tokens": list(range(4, 70))},
    "min new tokens": {"min_new_tokens": 9, "suppress_tokens": list(range(4, 70))},
    "allowed": {"prefix_allowed_tokens_fn": allowed},
    "forced eos": {"forced_eos_token_id": 88},
    "invalid values": {"remove_invalid_values": True, "suppress_tokens": [62, 98]},
    "decay": {"exponential_decay_length_penalty": (3, 1.9)},
    "suppress": {"suppress_tokens": list(range(0, VOCAB_SIZE, 2))},
    "begin suppress": {"begin_suppress_tokens": [62, 17, 89]},
    "renormalize": {"renormalize_logits": True},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "penalties": {
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "encoder_repetition_penalty": 0.8,
        "sequence_bias": {(4, 5): 2.0, (12,): 1.5}, "renormalize_logits": True,
    },
    "lengths": {
        "min_length": 20, "exponential_decay_length_penalty": (6, 1.5), "forced_eos_token_id": [88, 3],
        "begin_suppress_tokens": list(range(40)), "suppress_tokens": [7],
    },
    "constraint": {"prefix_allowed_tokens_fn": allowed, "no_repeat_ngram_size": 1, "remove_invalid_values": True},
}  # fmt: skip
GUIDED: dict[str, dict[str, Any]] = {
    "last token": {"guidance_scale": 1.5},
    "negative prompt": {"guidance_scale": 2.5, "negative_prompt_ids": (5, 9, 33, 2)},
    "negative prompt and penalty": {
        "guidance_scale": 0.4, "negative_prompt_ids": (5, 9), "repetition_penalty": 1.5, "renormalize_logits": True
    },
}  # fmt: skip
SETTINGS = {**ALONE, **TOGETHER, **GUIDED}


@pytest.fixture(scope="module")
def theirs(folder: Folder) -> Any:
    return kit.reference(folder(NAME))


@pytest.fixture(scope="module")
def expected(theirs: Any) -> Callable[[str, int], Any]:
    """(name of settings, prompt length) -> the reference's whole output for that prompt alone."""

    @cache
    def generate(setting: str, length: int) -> Any:
        return ask(theirs, SETTINGS[setting], kit.prompt(length, 1)[None])

    return generate


def ask(model: Any, said: dict[str, Any], ids: Tensor, **more: Any) -> Any:
    """The reference's output with everything that it can show."""
    said = {"do_sample": False, "max_new_tokens": STEPS, **said, **more}
    if "negative_prompt_ids" in said:
        said["negative_prompt_ids"] = torch.tensor([said["negative_prompt_ids"]] * len(ids))
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), eos_token_id=list(EOS), pad_token_id=PAD, output_scores=True,
        output_logits=True, output_hidden_states=True, return_dict_in_generate=True, **said,
    )  # fmt: skip


def run(
    lm: LanguageModel,
    said: dict[str, Any],
    rows: Sequence[Tensor],
    side: str = "left",
    name: str = "greedy",
    **more: Any,
) -> GenerationOutput:
    said = dict(said)
    if isinstance(said.get("negative_prompt_ids"), tuple):
        said["negative_prompt_ids"] = [list(said["negative_prompt_ids"])] * len(rows)
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=STEPS).updated(**said)
    strategy = getattr(pluglm_decoding_standard, name).pluglm_build_decoding(
        request=DecodingRequest(VOCAB_SIZE, "cpu", None)
    )
    ids, mask = kit.padded(rows, side, PAD)
    output: GenerationOutput = strategy(lm.model, ids, attention_mask=mask, generation_config=config, **more)
    return output


def completion(output: Any, length: int) -> list[int]:
    """Of the reference, up to the first end token."""
    row: list[int] = output.sequences[0, length:].tolist()
    return next((row[: i + 1] for i, token in enumerate(row) if token in EOS), row)


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_tokens_are_the_references(setting: str, loaded: Loaded, expected: Any) -> None:
    output = run(loaded(NAME), SETTINGS[setting], [kit.prompt(RAGGED[0], 1)])
    assert output.completion(0) == completion(expected(setting, RAGGED[0]), RAGGED[0])


def test_every_setting_changes_the_text(expected: Any) -> None:
    """Or the tests above would show little; what only reshapes numbers is seen in the scores."""
    same = [
        n
        for n in SETTINGS
        if completion(expected(n, RAGGED[0]), RAGGED[0]) == completion(expected("plain", RAGGED[0]), RAGGED[0])
    ]
    assert set(same) <= {"plain", "renormalize"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("setting", ["bigrams", "encoder unigrams", "last token", "negative prompt", *TOGETHER])
def test_rows_of_a_ragged_batch_are_the_references_alone(
    setting: str, side: str, loaded: Loaded, expected: Any
) -> None:
    output = run(loaded(NAME), SETTINGS[setting], [kit.prompt(length, 1) for length in RAGGED], side)
    for row, length in enumerate(RAGGED):
        assert output.completion(row) == completion(expected(setting, length), length)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("setting", ["plain", "penalties", "negative prompt and penalty"])
def test_scores_logits_and_hidden_states_are_the_references(
    setting: str, cached: bool, loaded: Loaded, expected: Any
) -> None:
    said = {**SETTINGS[setting], "output_scores": True, "output_logits": True, "output_hidden_states": True}
    output, want = run(loaded(NAME), said, [kit.prompt(9, 1)], use_cache=cached), expected(setting, 9)
    assert output.completion(0) == completion(want, 9)
    for name in ("scores", "logits"):
        found = getattr(output, name)
        assert len(found) == len(getattr(want, name)) == output.num_new_tokens[0]
        for got, true in zip(found, getattr(want, name), strict=True):
            torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-4)
    assert output.hidden_states is not None
    for step, true in zip(output.hidden_states, want.hidden_states, strict=True):
        for got, layer in zip(step, true, strict=True):
            torch.testing.assert_close(got, layer, rtol=1e-4, atol=1e-4)


def test_hidden_states_come_in_chunks_and_copies_as_in_one_piece(loaded: Loaded) -> None:
    rows, said = [kit.prompt(9, 1), kit.prompt(5, 1)], {"output_hidden_states": True, "max_new_tokens": 3, "seed": 4}
    whole = run(loaded(NAME), said, [rows[0], rows[0], rows[1], rows[1]], name="sampling")
    parts = run(loaded(NAME), {**said, "prefill_chunk_size": 4, "num_return_sequences": 2}, rows, name="sampling")
    assert torch.equal(whole.sequences, parts.sequences)
    assert whole.hidden_states is not None and parts.hidden_states is not None
    assert [state.shape for state in parts.hidden_states[0]] == [(4, 9, 48)] * 4
    assert [state.shape for state in parts.hidden_states[2]] == [(4, 1, 48)] * 4
    for got, want in zip(parts.hidden_states, whole.hidden_states, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a[:, -5:], b[:, -5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting", ["bigrams", "allowed", "forced eos", *TOGETHER])
def test_speculation_gives_the_same_tokens(setting: str, loaded: Loaded, expected: Any) -> None:
    """The processors are shown guesses, and rows of which each is at another place."""
    request = DecodingRequest(VOCAB_SIZE, "cpu", None)
    strategy = pluglm_decoding_speculative.prompt_lookup.pluglm_build_decoding(request=request)
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=STEPS).updated(**SETTINGS[setting])
    ids, mask = kit.padded([kit.prompt(length, 1) for length in RAGGED], "left", PAD)
    output = strategy(loaded(NAME).model, ids, attention_mask=mask, generation_config=config)
    for row, length in enumerate(RAGGED):
        assert output.completion(row) == completion(expected(setting, length), length)


WARPED = {
    "top-h": {"top_h": 0.6, "temperature": 0.9},
    "typical and cutoffs": {"typical_p": 0.8, "epsilon_cutoff": 0.004, "eta_cutoff": 0.01},
    "all": {
        "temperature": 1.4, "top_h": 0.95, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9,
        "epsilon_cutoff": 0.003, "eta_cutoff": 0.005, "renormalize_logits": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("setting", WARPED)
def test_sampling_draws_from_the_references_distribution(setting: str, loaded: Loaded, theirs: Any) -> None:
    """The scores, which are the distribution, after the same text: the second token is after what was drawn here."""
    said, start = WARPED[setting], kit.prompt(9, 1)
    output = run(
        loaded(NAME), {**said, "output_scores": True, "max_new_tokens": 2, "seed": 1}, [start], name="sampling"
    )
    assert output.scores is not None
    for step, found in enumerate(output.scores):
        ids = output.sequences[:, : len(start) + step]
        want = ask(theirs, {"top_k": 0, **said}, ids, do_sample=True, max_new_tokens=1).scores[0]
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
        assert 1 < int((found > -torch.inf).sum()) < VOCAB_SIZE
        assert float(found[0, output.sequences[0, len(start) + step]]) > -torch.inf


@pytest.mark.parametrize(("side", "use_cache"), [("left", True), ("right", False)])
def test_each_row_is_guided_by_its_own_negative_prompt(side: str, use_cache: bool, loaded: Loaded) -> None:
    """Negative prompts of different lengths, padded on either side, with two sequences of each prompt."""
    rows, negative = [kit.prompt(9, 1), kit.prompt(5, 1)], [kit.prompt(4, 2), kit.prompt(2, 2)]
    said: dict[str, Any] = {"guidance_scale": 2.0, "temperature": 0.8, "max_new_tokens": 9}
    ids, mask = kit.padded(negative, side, PAD)
    both = {"negative_prompt_ids": ids, "negative_prompt_attention_mask": mask}
    settings = {**said, **both, "num_return_sequences": 2, "seed": (1, 2, 3, 4)}
    output = run(loaded(NAME), settings, rows, name="sampling", use_cache=use_cache)
    for i in range(4):
        own = {"negative_prompt_ids": negative[i // 2][None], "seed": (i + 1,)}
        alone = run(loaded(NAME), {**said, **own}, [rows[i // 2]], name="sampling")
        assert output.completion(i) == alone.completion(0)


def test_guidance_continues_a_given_cache(loaded: Loaded) -> None:
    lm, said, ids = loaded(NAME), SETTINGS["negative prompt"], kit.prompt(9, 1)
    kept = lm.new_cache(capacity=40)
    run(lm, {"max_new_tokens": 1}, [ids[:6]], past_key_values=kept)
    assert run(lm, said, [ids], past_key_values=kept).completion(0) == run(lm, said, [ids]).completion(0)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"negative_prompt_ids": [[1]]}, "negative_prompt_ids is given, and nothing is guided away from it"),
        ({"guidance_scale": "much"}, "guidance_scale='much' makes no sense: it must be a finite number"),
        ({"guidance_scale": 2, "negative_prompt_ids": [[1], [2]]}, r"has shape \(2, 1\) for 1 prompts"),
        ({"guidance_scale": 2, "negative_prompt_ids": [[1], [2, 3]]}, "is no tensor of integers"),
        ({"guidance_scale": 2, "negative_prompt_ids": [[VOCAB_SIZE]]}, "negative_prompt_ids cannot be used: token id"),
        ({"guidance_scale": 2, "negative_prompt_attention_mask": [[1]]}, "is given without negative_prompt_ids"),
        (
            {"guidance_scale": 2, "negative_prompt_ids": [[1, 2]], "negative_prompt_attention_mask": [[1]]},
            "negative_prompt_attention_mask cannot be used",
        ),
    ],
)
def test_guidance_that_makes_no_sense_is_refused(said: dict[str, Any], why: str, loaded: Loaded) -> None:
    with pytest.raises(InputError, match=why) as caught:
        run(loaded(NAME), said, [kit.prompt(5)])
    assert str(caught.value.argument).startswith(("guidance", "negative"))


def test_an_encoder_decoders_source_is_its_encoders_input(tmp_path: Path) -> None:
    """In a batch of prompts of different lengths; and its decoder cannot be guided away from another prompt."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "d_model": 48, "d_ff": 84, "d_kv": 10, "num_heads": 6}
    theirs: Any = T5ForConditionalGeneration(T5Config(
        **sizes, num_layers=2, feed_forward_proj="relu", decoder_start_token_id=7, eos_token_id=None, pad_token_id=PAD,
    )).eval()  # fmt: skip
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            gain = 0.35 if "shared" in key else 2 / noise.shape[-1] ** 0.5
            parameter.copy_(1 + 0.3 * noise if noise.ndim == 1 else gain * noise)
    theirs.save_pretrained(tmp_path)
    lm, rows = kit.load(tmp_path), [kit.prompt(length, 3) for length in RAGGED]
    said: dict[str, Any] = {
        "encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2, "forced_bos_token_id": 11,
        "begin_suppress_tokens": list(range(0, VOCAB_SIZE, 2)), "eos_token_id": 3, "pad_token_id": PAD,
    }  # fmt: skip
    done = lm.complete([row.tolist() for row in rows], decoding="greedy", max_new_tokens=8, **said)
    plain = lm.complete([row.tolist() for row in rows], max_new_tokens=8, eos_token_id=3, pad_token_id=PAD)
    assert isinstance(done, list) and isinstance(plain, list)
    for row, one in zip(rows, done, strict=True):
        ids = row[None]
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **said)
        found: list[int] = want[0, 1:].tolist()
        assert list(one.token_ids) == next((found[: i + 1] for i, token in enumerate(found) if token == 3), found)
    assert done != plain
    with pytest.raises(InputError, match="guidance_scale cannot be honoured for an encoder-decoder"):
        lm.complete(rows[0].tolist(), guidance_scale=2.0, max_new_tokens=1)
