"""Beam search finds the hypotheses and scores of Transformers' `generate(num_beams=…)`, in batches as alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import kit
import pluglm_decoding_beam
import pytest
import torch
from checkpoints import VARIANTS, VOCAB_SIZE
from pluglm_decoding_beam.phrases import PhrasalConstraint

import pluglm
from pluglm.completions import Completion
from pluglm.contracts import DecodingRequest, GenerationConfig
from pluglm.errors import PlanError
from pluglm.lm import LanguageModel

Folder = Callable[[str], Path]
Loaded = Callable[..., LanguageModel]

#: One of each kind: rotary, learned positions, soft caps with every second layer windowed, and windows alone.
NAMES = ("llama-proportional", "gemma2-types", "gpt2-inverse", "mistral-window")
#: Ids that end a text here, so that hypotheses of many lengths compete; the checkpoints name none.
EOS, PAD = tuple(range(3, 129, 7)), 130
RAGGED, STEPS = (29, 13, 20), 24

SETTINGS: dict[str, dict[str, Any]] = {
    "four beams": {"num_beams": 4},
    "early": {"num_beams": 4, "early_stopping": True, "length_penalty": 0.6, "num_return_sequences": 3},
    "never": {"num_beams": 5, "early_stopping": "never", "length_penalty": 2.0, "num_return_sequences": 5},
    "never by the mean": {"num_beams": 5, "early_stopping": "never", "num_return_sequences": 5},
    "never without length": {"num_beams": 3, "early_stopping": "never", "length_penalty": 0.0},
    "short ones": {"num_beams": 3, "length_penalty": -1.5, "num_return_sequences": 2},
    "two beams, one end": {"num_beams": 2, "eos_token_id": (5,), "num_return_sequences": 2},
    "no end": {"num_beams": 4, "eos_token_id": (), "num_return_sequences": 4},
    "penalty and minimum": {"num_beams": 4, "repetition_penalty": 1.4, "min_new_tokens": 9, "num_return_sequences": 4},
    "processors": {
        "num_beams": 4, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2, "bad_words_ids": [[7], [9, 11]],
        "suppress_tokens": [20, 21], "begin_suppress_tokens": [30], "exponential_decay_length_penalty": (3, 1.05),
        "renormalize_logits": True, "forced_eos_token_id": EOS[1], "num_return_sequences": 3,
    },
}  # fmt: skip
every_name = pytest.mark.parametrize("name", NAMES)


def start(name: str, length: int) -> torch.Tensor:
    """The prompt [T] of one checkpoint and length."""
    return kit.prompt(length, VARIANTS[name].seed)


@pytest.fixture(scope="module")
def expected(folder: Folder) -> Callable[[str, str, int], tuple[list[list[int]], list[float]]]:
    """(checkpoint, name of settings, prompt length) -> the reference's completions, best first, and their scores."""
    models = cache(lambda name: kit.reference(folder(name)))

    @cache
    def generate(name: str, setting: str, length: int) -> tuple[list[list[int]], list[float]]:
        ids = start(name, length)[None]
        said = {"eos_token_id": EOS, **SETTINGS[setting]}
        eos = list(said.pop("eos_token_id")) or None
        output = models(name).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False, eos_token_id=eos,
            pad_token_id=PAD, return_dict_in_generate=True, output_scores=True, **said,
        )  # fmt: skip
        rows = [ended(row, eos or ()) for row in output.sequences[:, length:].tolist()]
        return rows, output.sequences_scores.tolist()

    return generate


def ended(row: list[int], eos: Sequence[int]) -> list[int]:
    """Up to the first end token."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in eos), row)


def search(lm: LanguageModel, rows: Sequence[torch.Tensor], side: str, setting: dict[str, Any], **more: Any) -> Any:
    """Our output for these prompts."""
    strategy = pluglm_decoding_beam.beam.pluglm_build_decoding(request=DecodingRequest(VOCAB_SIZE, "cpu", None))
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=STEPS).updated(**setting)
    ids, mask = kit.padded(rows, side, PAD)
    return strategy(lm.model, ids, attention_mask=mask, generation_config=config, **more)


def check(output: Any, row: int, want: tuple[list[list[int]], list[float]]) -> None:
    """Are the hypotheses of prompt `row` those of the reference?"""
    tokens, scores = want
    copies = len(tokens)
    assert [output.completion(row * copies + i) for i in range(copies)] == tokens
    assert output.sequence_scores[row * copies : (row + 1) * copies] == pytest.approx(scores, abs=1e-4, rel=1e-5)


@every_name
@pytest.mark.parametrize("setting", SETTINGS)
def test_hypotheses_and_scores_are_the_references(name: str, setting: str, loaded: Loaded, expected: Any) -> None:
    output = search(loaded(name), [start(name, RAGGED[0])], "left", SETTINGS[setting])
    check(output, 0, expected(name, setting, RAGGED[0]))


@every_name
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("setting", ["early", "never", "penalty and minimum"])
def test_rows_of_a_ragged_batch_are_the_references_alone(
    name: str, setting: str, side: str, loaded: Loaded, expected: Any
) -> None:
    output = search(loaded(name), [start(name, length) for length in RAGGED], side, SETTINGS[setting])
    for row, length in enumerate(RAGGED):
        check(output, row, expected(name, setting, length))


@every_name
@pytest.mark.parametrize("layout", ["static", "hybrid", "paged", "none"])
def test_every_layout_finds_the_references_hypotheses(name: str, layout: str, loaded: Loaded, expected: Any) -> None:
    lm = loaded(name, "eager", "dynamic" if layout == "none" else layout)
    use = {"use_cache": False} if layout == "none" else {}
    output = search(lm, [start(name, length) for length in RAGGED], "left", SETTINGS["never"], **use)
    for row, length in enumerate(RAGGED):
        check(output, row, expected(name, "never", length))


def test_hypotheses_of_several_lengths_compete(expected: Any) -> None:
    """Or the tests above would show little."""
    lengths = {len(row) for name in NAMES for setting in SETTINGS for row in expected(name, setting, RAGGED[0])[0]}
    assert len(lengths) > 8


def test_sampled_searches_have_the_references_distribution(folder: Folder, loaded: Loaded) -> None:
    """Two samples, one of each side, differ as two samples of one distribution do: temperature, filters, two steps."""
    name, size = "mistral-window", 800
    ids = start(name, RAGGED[1]).expand(size, -1)
    said: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 2, "temperature": 2.0, "top_k": 9, "top_p": 0.9}
    torch.manual_seed(0)
    theirs = kit.reference(folder(name)).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, eos_token_id=list(EOS[:2]), pad_token_id=PAD, **said
    )
    strategy = pluglm_decoding_beam.beam_sampling.pluglm_build_decoding(
        request=DecodingRequest(VOCAB_SIZE, "cpu", None)
    )
    config = GenerationConfig(eos_token_id=EOS[:2], pad_token_id=PAD, seed=11)

    def difference(**changed: Any) -> float:
        ours = strategy(loaded(name).model, ids, generation_config=config.updated(**{**said, **changed})).sequences
        want, got = (Counter(tuple(row) for row in found[:, RAGGED[1] :].tolist()) for found in (theirs, ours))
        both = [key for key in want | got if want[key] + got[key] >= 10]
        assert len(both) > 10
        return sum((want[key] - got[key]) ** 2 / (want[key] + got[key]) for key in both) / len(both)

    same, other = difference(), difference(temperature=1.2)
    assert same < 1.6
    assert other > 3


@pytest.mark.parametrize("name", ["falcon-h1-gated", "mamba2-tied"])
def test_states_follow_their_beams(name: str, loaded: Loaded) -> None:
    """The reference cannot move every state; running each text again from its start is the measure."""
    rows = [start(name, length) for length in RAGGED]
    kept = search(loaded(name), rows, "left", SETTINGS["never"])
    again = search(loaded(name), rows, "left", SETTINGS["never"], use_cache=False)
    assert torch.equal(kept.sequences, again.sequences)
    assert kept.sequence_scores == pytest.approx(again.sequence_scores, rel=1e-4)


@pytest.mark.parametrize("bits", [8, 2])
def test_packed_cells_follow_their_beams(bits: int) -> None:
    """Fed to a new cache one by one, the tokens have the log-probabilities that the search saw: rows were not mixed up.

    The other layouts give back what they were given, so the tests above are enough for them.
    """
    lm = pluglm.load(
        "pystdlib", dtype="float32", device="cpu", cache="quantized", options={"cache": {"bits": bits, "residual": 16}}
    )
    assert lm.tokenizer is not None
    prompt = lm.tokenizer.encode("def read_csv(path):\n    with open(path) as file:\n" * 2)
    done = lm.complete(
        prompt, decoding="beam", num_beams=4, num_return_sequences=4, max_new_tokens=40, return_logprobs=True
    )
    assert isinstance(done, list)
    for one in done:
        cache, said = lm.new_cache(capacity=len(prompt) + 40), []
        with torch.no_grad():
            logits = lm.model(torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits[:, -1]
            for token in one.token_ids:
                said.append(float(logits.log_softmax(-1)[0, token]))
                logits = lm.model.step(torch.tensor([[token]]), cache)[:, -1]
        assert one.logprobs == pytest.approx(said, abs=1e-3)


@pytest.mark.parametrize("setting", ["early", "short ones", "processors"])
def test_an_encoder_decoders_hypotheses_are_the_references(setting: str, tmp_path: Path) -> None:
    """Prompts of different lengths go to the encoder; its keys follow the beams."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 48,
        "d_ff": 84,
        "d_kv": 10,
        "num_heads": 6,
        "num_layers": 2,
    }
    theirs: Any = T5ForConditionalGeneration(T5Config(
        **sizes, feed_forward_proj="relu", decoder_start_token_id=7, eos_token_id=None, pad_token_id=PAD,
    )).eval()  # fmt: skip
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            gain = 0.35 if "shared" in key else 2 / noise.shape[-1] ** 0.5
            parameter.copy_(1 + 0.3 * noise if noise.ndim == 1 else gain * noise)
    theirs.save_pretrained(tmp_path)
    said, rows = {"eos_token_id": EOS, **SETTINGS[setting]}, [kit.prompt(length) for length in RAGGED]
    done = kit.load(tmp_path).complete(
        [row.tolist() for row in rows], decoding="beam", max_new_tokens=STEPS, pad_token_id=PAD, **said
    )
    assert isinstance(done, list)
    want = []
    for row in rows:
        output = theirs.generate(
            row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=STEPS, do_sample=False,
            pad_token_id=PAD, **{**said, "eos_token_id": list(EOS)},
        )  # fmt: skip
        want += [ended(found, EOS) for found in output[:, 1:].tolist()]
    assert [list(one.token_ids) for one in done] == want
    assert len(set(map(len, want))) > 2


def test_a_model_that_learned_something_searches_as_in_the_reference(tmp_path: Path) -> None:
    """End to end, from text to text, by naming the strategy."""
    from transformers import AutoModelForCausalLM

    lm = pluglm.load("pystdlib", dtype="float32", device="cpu")
    text, said = "def read_csv(path):\n", {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 20}
    done = lm.complete(text, decoding="beam", **said)
    assert isinstance(done, list)
    assert lm.generate(text, decoding="beam", **said) == [one.text for one in done]
    lm.save(tmp_path)
    assert lm.tokenizer is not None
    ids = torch.tensor([lm.tokenizer.encode(text)])
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    eos = list(lm.generation.eos_token_id or ())
    output = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=eos[0], **said)
    assert done[0].num_prompt_tokens == ids.shape[1]
    assert [list(one.token_ids) for one in done] == [ended(row, eos) for row in output[:, ids.shape[1] :].tolist()]


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"num_beams": 3}, "beam"),
        ({"num_beams": 3, "do_sample": True, "seed": 4}, "beam-sampling"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}, "diverse-beam"),
        ({"num_beams": 3, "force_words_ids": [[60, 61], [[62], [63]]]}, "constrained-beam"),
        ({"num_beams": 3, "constraints": [PhrasalConstraint([60, 61])]}, "constrained-beam"),
    ],
)
def test_a_call_that_asks_for_beams_gets_the_search_that_honours_it(
    said: dict[str, Any], named: str, loaded: Loaded
) -> None:
    lm, ids = loaded("llama-proportional"), start("llama-proportional", 9).tolist()
    chosen = lm.complete(ids, max_new_tokens=9, decoding="auto", **said)
    assert chosen == lm.complete(ids, max_new_tokens=9, decoding=named, **said)
    assert chosen != lm.complete(ids, max_new_tokens=9)


def test_a_search_is_not_chosen_where_nobody_says_how_many_beams(loaded: Loaded) -> None:
    with pytest.raises(PlanError, match='"auto" may choose honours length_penalty') as caught:
        loaded("llama-proportional").complete([5, 6], decoding="auto", length_penalty=0.8, max_new_tokens=2)
    assert "decoding='beam'" in caught.value.fix


def test_what_a_step_hands_out_is_the_references(folder: Folder, loaded: Loaded) -> None:
    """Rows, scores, logits, hidden states; and its own reckoning of transition scores takes ours."""
    name, length = "mistral-window", RAGGED[0]
    asked: dict[str, Any] = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    said: dict[str, Any] = {**SETTINGS["early"], "length_penalty": 0.7, "num_return_sequences": 4}
    ids, theirs = start(name, length)[None], kit.reference(folder(name))
    want = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False, eos_token_id=list(EOS),
        pad_token_id=PAD, return_dict_in_generate=True, **asked, **said,
    )  # fmt: skip
    got = search(loaded(name), [ids[0], start(name, RAGGED[1])], "right", {**said, **asked})
    rows = [row[row >= 0].tolist() for row in want.beam_indices]
    assert [list(row) for row in got.beam_indices[:4]] == rows
    assert len({index for row in rows for index in row}) > 2
    assert len(got.scores) == len(got.logits) == len(got.hidden_states)
    for step, (scores, logits, hidden) in enumerate(zip(want.scores, want.logits, want.hidden_states, strict=True)):
        torch.testing.assert_close(got.scores[step][:4], scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.logits[step][:4], logits, atol=1e-4, rtol=1e-4)
        for ours, state in zip(got.hidden_states[step], hidden, strict=True):
            torch.testing.assert_close(ours[:4, : state.shape[1]], state, atol=1e-4, rtol=1e-4)
    most = max(got.num_new_tokens)
    padded = torch.tensor([[*row, *[-1] * (most - len(row))] for row in got.beam_indices])
    transitions = theirs.compute_transition_scores(got.sequences, got.scores, padded)
    counts = torch.tensor(got.num_new_tokens)
    assert (transitions.sum(1) / counts**0.7).tolist() == pytest.approx(got.sequence_scores, rel=1e-4)


def test_the_text_of_a_search_is_streamed_as_it_becomes_certain() -> None:
    lm = pluglm.load("pystdlib", dtype="float32", device="cpu")
    said: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 24}
    pieces = list(lm.stream("import os", **said))
    assert "".join(pieces) == lm.generate("import os", **said)
    assert len(pieces) > 3


@pytest.mark.parametrize("layout", ["dynamic", "paged"])
def test_phrases_are_in_every_text_of_a_ragged_batch(layout: str, loaded: Loaded) -> None:
    lm = loaded("llama-proportional", "eager", layout)
    rows = [start("llama-proportional", length).tolist() for length in RAGGED]
    said: dict[str, Any] = {
        "num_beams": 4, "force_words_ids": [[60, 60, 61], [[62, 63], [64]]], "max_new_tokens": 12, "pad_token_id": PAD,
        "eos_token_id": EOS, "return_logprobs": True, "decoding": "constrained-beam",
    }  # fmt: skip
    done = lm.complete(rows, **said)
    assert isinstance(done, list)
    for row, one in zip(rows, done, strict=True):
        text = "".join(map(chr, one.token_ids))
        assert "<<=" in text
        assert ">?" in text or "@" in text
        alone = lm.complete(row, **said)
        assert isinstance(alone, Completion)
        assert one.token_ids == alone.token_ids
        assert one.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


@pytest.mark.parametrize("layout", ["dynamic", "static", "paged"])
def test_a_given_cache_can_be_continued_after_a_search(layout: str, loaded: Loaded) -> None:
    lm = loaded("llama-proportional", "eager", layout)
    cache, said = lm.new_cache(capacity=70), {"decoding": "beam", "num_beams": 4, "max_new_tokens": 10}
    first = lm.complete(kit.prompt(13).tolist(), past_key_values=cache, **said)
    assert isinstance(first, Completion)
    assert cache.length == 13 + len(first.token_ids) - 1
    turn = [*kit.prompt(13).tolist(), *first.token_ids, 9, 8, 7]
    continued, anew = (lm.complete(turn, **more, **said) for more in ({"past_key_values": cache}, {}))
    assert isinstance(continued, Completion)
    assert isinstance(anew, Completion)
    assert continued.token_ids == anew.token_ids
    assert continued.score == pytest.approx(anew.score, abs=1e-4)
