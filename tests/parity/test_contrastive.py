"""Contrastive search and DoLa choose the tokens that plain implementations on Transformers' models choose.

The reference library has neither any more, so the methods are written here once more, without a cache and without a
line of ours: every candidate, and every step, is a pass of the whole text through the reference's model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import kit
import pluglm_decoding_contrastive
import pytest
import torch
from checkpoints import VARIANTS, VOCAB_SIZE
from torch import Tensor

import pluglm
from pluglm.contracts import DecodingRequest, GenerationConfig, GenerationOutput
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm.lm import LanguageModel

Folder = Callable[[str], Path]
Loaded = Callable[..., LanguageModel]

#: Rotary; learned positions and a tied head; a cap on the logits and windows; scaled logits.
NAMES = ("llama-proportional", "gpt2-inverse", "gemma2-types", "granite-biases")
PAD = 130
RAGGED, STEPS = (19, 7, 12), 9

every_name = pytest.mark.parametrize("name", NAMES)


def start(name: str, length: int) -> Tensor:
    """The prompt [T] of one checkpoint and length."""
    return kit.prompt(length, VARIANTS[name].seed)


@torch.no_grad()
def contrastive_by_hand(model: Any, prompt: Tensor, alpha: float, k: int) -> list[int]:
    """Su et al. 2022, equation 5: every candidate is a text of its own."""
    text = prompt.tolist()
    for _ in range(STEPS):
        p = model(torch.tensor([text])).logits[0, -1].double().softmax(-1)
        candidates = p.argsort(descending=True)[:k].tolist()
        output = model(torch.tensor([[*text, token] for token in candidates]), output_hidden_states=True)
        values = {}
        for token, states in zip(candidates, output.hidden_states[-1].double(), strict=True):
            cosines = torch.cosine_similarity(states[:-1], states[-1], dim=-1)
            values[token] = (1 - alpha) * float(p[token]) - alpha * float(cosines.max())
        text.append(max(values, key=lambda token: values[token]))
    return text[len(prompt) :]


@torch.no_grad()
def dola_by_hand(model: Any, prompt: Tensor, layers: Sequence[int]) -> list[int]:
    """Chuang et al. 2023, section 2, with the reference's own head on the reference's own hidden states."""
    text, config = prompt.tolist(), model.config
    head, cap = model.get_output_embeddings(), getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logits_scaling", 1.0)
    for _ in range(STEPS):
        output = model(torch.tensor([text]), output_hidden_states=True)
        p = output.logits[0, -1].double().softmax(-1)
        inner = []
        for layer in layers:
            logits = head(output.hidden_states[layer][0, -1]).double() / scale
            inner.append((logits if cap is None else cap * torch.tanh(logits / cap)).softmax(-1))
        least = max(inner, key=lambda q: float((p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum()))
        allowed = p >= 0.1 * p.max()
        text.append(int(torch.where(allowed, p.log() - least.log(), -torch.inf).argmax()))
    return text[len(prompt) :]


METHODS: dict[str, tuple[Callable[..., list[int]], dict[str, dict[str, Any]]]] = {
    "contrastive-search": (contrastive_by_hand, {
        "usual": {"alpha": 0.6, "k": 4}, "wide": {"alpha": 0.3, "k": 9}, "unlike": {"alpha": 0.95, "k": 3},
    }),
    "dola": (dola_by_hand, {"all": {"layers": (0, 1, 2)}, "two": {"layers": (1, 2)}, "one": {"layers": (1,)}}),
}  # fmt: skip
CASES = [(method, setting) for method, (_, settings) in METHODS.items() for setting in settings]


@pytest.fixture(scope="module")
def expected(folder: Folder) -> Callable[[str, str, str, int], list[int]]:
    """(checkpoint, method, setting, prompt length) -> the tokens."""
    models = cache(lambda name: kit.reference(folder(name)))

    @cache
    def generate(name: str, method: str, setting: str, length: int) -> list[int]:
        by_hand, settings = METHODS[method]
        return by_hand(models(name), start(name, length), **settings[setting])

    return generate


def call(
    lm: LanguageModel,
    method: str,
    ids: Tensor,
    mask: Tensor,
    setting: str,
    changes: Mapping[str, Any] = {},
    **more: Any,
) -> GenerationOutput:
    """Our output. changes: of the settings. more: arguments of the call."""
    said = METHODS[method][1][setting]
    fields: dict[str, Any] = {"penalty_alpha": said.get("alpha"), "top_k": said.get("k")}
    if method == "dola":
        fields = {"dola_layers": list(said["layers"])}
    provider = getattr(pluglm_decoding_contrastive, method.replace("-", "_"))
    strategy = provider.pluglm_build_decoding(request=DecodingRequest(VOCAB_SIZE, "cpu", None))
    config = GenerationConfig(pad_token_id=PAD, max_new_tokens=STEPS).updated(**fields, **changes)
    output: GenerationOutput = strategy(lm.model, ids, attention_mask=mask, generation_config=config, **more)
    return output


def run(
    lm: LanguageModel, method: str, rows: Sequence[Tensor], side: str, setting: str,
    changes: Mapping[str, Any] = {}, **more: Any,
) -> GenerationOutput:  # fmt: skip
    """`call` with these prompts as a padded batch."""
    return call(lm, method, *kit.padded(rows, side, PAD), setting, changes, **more)


@every_name
@pytest.mark.parametrize(("method", "setting"), CASES)
def test_the_tokens_are_those_of_a_plain_implementation(
    name: str, method: str, setting: str, loaded: Loaded, expected: Any
) -> None:
    output = run(loaded(name), method, [start(name, RAGGED[0])], "left", setting)
    assert output.completion(0) == expected(name, method, setting, RAGGED[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", ["dynamic", "static", "hybrid", "paged", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_a_ragged_batch_are_the_rows_alone_with_every_layout(
    method: str, layout: str, side: str, loaded: Loaded, expected: Any
) -> None:
    name, setting = NAMES[0], CASES[0 if method == "contrastive-search" else 3][1]
    lm = loaded(name, "eager", "dynamic" if layout == "none" else layout)
    use = {"use_cache": False} if layout == "none" else {}
    chunks = {"prefill_chunk_size": 5} if side == "right" and layout != "none" else {}
    output = run(lm, method, [start(name, length) for length in RAGGED], side, setting, chunks, **use)
    for row, length in enumerate(RAGGED):
        assert output.completion(row) == expected(name, method, setting, length)


def test_settings_and_methods_choose_different_tokens(expected: Any) -> None:
    """Or the tests above would show little."""
    found = [len({tuple(expected(name, *case, RAGGED[0])) for case in CASES}) for name in NAMES]
    assert min(found) >= 3
    assert sum(found) >= 15


@pytest.mark.parametrize("name", ["falcon-h1-gated", "mamba2-tied"])
def test_states_follow_their_candidates(name: str, loaded: Loaded) -> None:
    """What cannot be taken back is tried in rows of its own; running each text again from its start is the measure."""
    rows = [start(name, length) for length in RAGGED]
    kept = run(loaded(name), "contrastive-search", rows, "left", "usual")
    again = run(loaded(name), "contrastive-search", rows, "left", "usual", use_cache=False)
    assert torch.equal(kept.sequences, again.sequences)


def test_a_given_cache_with_states_is_refused(loaded: Loaded) -> None:
    lm = loaded("mamba2-tied")
    with pytest.raises(InputError, match=r"(?s)cannot be used for contrastive search.*crop, rollback"):
        run(lm, "contrastive-search", [start("mamba2-tied", 7)], "left", "usual",
            past_key_values=lm.model.new_cache(batch_size=1))  # fmt: skip


@pytest.mark.parametrize("layout", ["dynamic", "static", "paged"])
@pytest.mark.parametrize("method", METHODS)
def test_a_given_cache_of_rows_that_end_apart_can_be_continued(
    method: str, layout: str, loaded: Loaded, expected: Any
) -> None:
    name, setting = NAMES[0], CASES[0 if method == "contrastive-search" else 3][1]
    lm, rows = loaded(name, "eager", layout), [start(name, length) for length in RAGGED[:2]]
    plain = expected(name, method, setting, RAGGED[1])
    changes = {"eos_token_id": (plain[2],)}
    kept = lm.model.new_cache(batch_size=2, capacity=70)
    first = run(lm, method, rows, "left", setting, changes, past_key_values=kept)
    assert first.num_new_tokens[1] == plain.index(plain[2]) + 1 < first.num_new_tokens[0]
    assert (kept.batch_size, kept.length) == (2, first.sequences.shape[1] - 1)

    more = torch.tensor([[9, 8, 7], [6, 5, 4]])
    _, mask = kit.padded(rows, "left", PAD)
    real = torch.arange(first.sequences.shape[1] - first.prompt_length) < torch.tensor(first.num_new_tokens)[:, None]
    mask = torch.cat((mask, real.long(), torch.ones_like(more)), dim=1)
    goes_on = call(lm, method, torch.cat((first.sequences, more), dim=1), mask, setting, past_key_values=kept)
    for row, prompt in enumerate(rows):
        whole = torch.cat((prompt, torch.tensor(first.completion(row)), more[row]))
        assert goes_on.completion(row) == run(lm, method, [whole], "left", setting).completion(0)


@pytest.mark.parametrize("method", METHODS)
def test_packed_cells_follow_their_candidates(method: str) -> None:
    """A cache that rounds: fed to a new one, one by one, the tokens have the log-probabilities that the search saw."""
    lm = pluglm.load(
        "pystdlib", dtype="float32", device="cpu", cache="quantized", options={"cache": {"bits": 8, "residual": 8}}
    )
    assert lm.tokenizer is not None
    prompt = lm.tokenizer.encode("def read_csv(path):\n    with open(path) as file:\n")
    done: Any = lm.complete(prompt, decoding=method, max_new_tokens=20, return_logprobs=True)
    fresh, said = lm.new_cache(capacity=len(prompt) + 20), []
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt]), past_key_values=fresh, use_cache=True).logits[:, -1]
        for token in done.token_ids:
            said.append(float(logits.log_softmax(-1)[0, token]))
            logits = lm.model.step(torch.tensor([[token]]), fresh)[:, -1]
    assert done.logprobs == pytest.approx(said, abs=1e-3)


def test_a_head_applied_to_the_last_hidden_state_gives_the_logits(loaded: Loaded) -> None:
    for name in NAMES:
        lm = loaded(name)
        with torch.no_grad():
            output = lm.model(start(name, 9)[None], output_hidden_states=True)
            torch.testing.assert_close(lm.model.logits_of(output.hidden_states[-1]), output.logits)


def test_a_model_that_cannot_apply_its_head_to_an_inner_layer_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCAB_SIZE, d_model=16, d_ff=20, d_kv=4, num_heads=2, num_layers=2, decoder_start_token_id=7,
                      eos_token_id=None, pad_token_id=PAD)  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    lm = kit.load(tmp_path)
    said: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": PAD}
    with pytest.raises(
        UnsupportedRequestError, match="module of this t5 model cannot apply its head to an inner layer"
    ):
        lm.complete([5, 6, 7], decoding="dola", **said)
    done: Any = lm.complete([5, 6, 7], decoding="contrastive-search", **said)
    again: Any = lm.complete([5, 6, 7], decoding="contrastive-search", use_cache=False, **said)
    assert done.token_ids == again.token_ids
    assert len(done.token_ids) == 4
