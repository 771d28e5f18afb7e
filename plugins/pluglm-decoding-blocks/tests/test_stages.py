"""Every processor and warper against the reference library's, made as its `generate` makes them; padding counts not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pluglm_decoding_blocks.processors import Processors
from pluglm_decoding_blocks.source import Source
from pluglm_decoding_blocks.texts import Texts
from pluglm_decoding_blocks.warpers import Warpers
from torch import Tensor

from pluglm.contracts import GenerationConfig

reference = pytest.importorskip("transformers.generation.utils")
configuration = pytest.importorskip("transformers.generation.configuration_utils")
V, EOS, NEW = 137, (1, 5), 7  # more tokens than top-h looks at
CPU = torch.device("cpu")


def allowed(batch: int, ids: Tensor) -> list[int]:
    return sorted({(batch + int(ids[-1]) + k * len(ids)) % V for k in range(1, 50)})


class Mark(configuration.BaseWatermarkingConfig):  # type: ignore[misc]
    """Of the reference's class, since its `generate` takes no other."""

    def construct_processor(self, vocab_size: int, device: Any) -> Any:
        return lambda ids, scores: scores + ((torch.arange(vocab_size, device=device) + ids[:, -1:]) % 3)

    def validate(self) -> None:
        pass


#: Processors, each alone. Ids are few, so that runs and sequences occur again.
ALONE: dict[str, dict[str, Any]] = {
    "sequence bias": {"sequence_bias": {(3,): 1.5, (4, 5): -2.0, (2, 5): 0.75, (0, 2, 4): 3.0, (7, 7, 7, 1): 9.0}},
    "sequence bias as JSON": {"sequence_bias": [[[3, 4], -1.5], [[2], 0.5]]},
    "encoder penalty": {"encoder_repetition_penalty": 1.7},
    "encoder penalty below one": {"encoder_repetition_penalty": 0.4},
    "repetition penalty": {"repetition_penalty": 1.3},
    "unigrams": {"no_repeat_ngram_size": 1},
    "bigrams": {"no_repeat_ngram_size": 2},
    "trigrams": {"no_repeat_ngram_size": 3},
    "encoder unigrams": {"encoder_no_repeat_ngram_size": 1},
    "encoder bigrams": {"encoder_no_repeat_ngram_size": 2},
    "encoder trigrams": {"encoder_no_repeat_ngram_size": 3},
    "bad words": {"bad_words_ids": [[2], [1], [3, 4], [4, 2, 0]]},
    "min length": {"min_length": 9},
    "min new tokens": {"min_new_tokens": 3},
    "allowed": {"prefix_allowed_tokens_fn": allowed},
    "forced bos": {"forced_bos_token_id": 3},
    "forced eos": {"forced_eos_token_id": [2, 6]},
    "forced eos, one": {"forced_eos_token_id": 6},
    "invalid values": {"remove_invalid_values": True},
    "decay": {"exponential_decay_length_penalty": (2, 1.6)},
    "suppress": {"suppress_tokens": [0, 9, 4]},
    "suppress at first": {"begin_suppress_tokens": [0, 9, 4]},
    "suppress after bos": {"begin_suppress_tokens": [0, 9, 4], "forced_bos_token_id": 3},
    "renormalize": {"renormalize_logits": True},
}
#: Warpers, each alone; with temperatures that make few and many tokens likely.
WARPERS: dict[str, dict[str, Any]] = {
    "top-h": {"top_h": 0.4},
    "top-h of all": {"top_h": 1.0, "temperature": 0.3},
    "typical": {"typical_p": 0.6},
    "typical, narrow": {"typical_p": 0.05, "temperature": 0.4},
    "epsilon": {"epsilon_cutoff": 0.02},
    "epsilon above all": {"epsilon_cutoff": 0.9, "temperature": 3.0},
    "eta": {"eta_cutoff": 0.3},
    "eta, peaked": {"eta_cutoff": 0.1, "temperature": 0.4},
    "min-p": {"min_p": 0.2},
    "top-k and top-p": {"top_k": 9, "top_p": 0.7},
    "temperature": {"temperature": 0.7},
}
EVERYTHING: dict[str, Any] = {
    "sequence_bias": {(3,): 1.5, (4, 5): -2.0, (2, 0): 2.5}, "encoder_repetition_penalty": 1.2,
    "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 4,
    "bad_words_ids": [[8], [3, 4]], "min_length": 9, "min_new_tokens": 2, "prefix_allowed_tokens_fn": allowed,
    "forced_bos_token_id": 3, "forced_eos_token_id": [2, 6], "remove_invalid_values": True,
    "exponential_decay_length_penalty": (3, 1.2), "suppress_tokens": [10, 11], "begin_suppress_tokens": [12],
    "temperature": 0.8, "top_h": 0.9, "top_k": 60, "top_p": 0.97, "min_p": 0.01, "typical_p": 0.96,
    "epsilon_cutoff": 0.001, "eta_cutoff": 0.002, "renormalize_logits": True,
    "watermarking_config": Mark(),
}  # fmt: skip


def prompt(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(seed))


def scores(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(100 + seed)) * 3


def ours(said: dict[str, Any], ids: Tensor, *, mask: Tensor | None = None, **more: Any) -> Processors:
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=EOS).updated(**said)
    keep = more.pop("keep", 1)
    return Processors(
        config, more.pop("own", None), prompt_length=ids.shape[1], mask=mask, device=CPU,
        warpers=Warpers([config], CPU, keep=keep), **more,
    )  # fmt: skip


def theirs(said: dict[str, Any], ids: Tensor, *, encoder: Tensor | None = None, own: Any = None, beams: int = 1) -> Any:
    """The list that the reference's `generate` would make."""
    said = dict(said)
    allowed_fn = said.pop("prefix_allowed_tokens_fn", None)
    draws = bool(
        {"temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"} & set(said)
    )
    config = configuration.GenerationConfig(
        **{"top_k": 0, **said}, do_sample=draws, eos_token_id=list(EOS), max_length=ids.shape[1] + NEW, num_beams=beams
    )
    config._eos_token_tensor = torch.tensor(EOS)
    kind = SimpleNamespace(
        is_encoder_decoder=encoder is not None, get_text_config=lambda: SimpleNamespace(vocab_size=V)
    )
    model = SimpleNamespace(
        config=kind, _merge_criteria_processor_list=lambda a, b: reference.LogitsProcessorList([*a, *b])
    )
    return reference.GenerationMixin._get_logits_processor(
        model, config, ids.shape[1], ids if encoder is None else encoder, allowed_fn, own, device="cpu", model_kwargs={}
    )


def check(mine: Processors, other: Any, ids: Tensor, *, changes: bool = True) -> None:
    """The same numbers at every step, and other ones than before at some step."""
    changed = False
    for step in range(NEW):
        x = scores(ids.shape[0], step)
        if step == 2:
            x[0, 3], x[-1, 4] = -torch.inf, -torch.inf
        got, want = mine(ids, x)[0], other(ids, x.clone())
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        changed = changed or not torch.equal(got, x)
        ids = torch.cat((ids, prompt(ids.shape[0], 1, seed=40 + step)), dim=1)
    assert changed == changes


@pytest.mark.parametrize("shape", [(3, 5), (1, 1)])
@pytest.mark.parametrize("name", ALONE)
def test_a_processor_alone_gives_the_references_numbers(name: str, shape: tuple[int, int]) -> None:
    ids = prompt(*shape, seed=shape[1])
    idle = {"forced bos": shape[1] > 1, "encoder bigrams": shape[1] < 2}
    idle["encoder trigrams"] = idle["encoder bigrams"]
    check(ours(ALONE[name], ids), theirs(ALONE[name], ids), ids, changes=not idle.get(name, False))


@pytest.mark.parametrize("name", WARPERS)
@pytest.mark.parametrize("keep", [1, 3])
def test_a_warper_alone_gives_the_references_numbers(name: str, keep: int) -> None:
    """With beams the reference keeps one token more than there are end tokens."""
    ids = prompt(4, 5)
    check(ours(WARPERS[name], ids, keep=keep), theirs(WARPERS[name], ids, beams=1 if keep == 1 else 2), ids)


@pytest.mark.parametrize("name", ["encoder penalty", "encoder unigrams", "encoder bigrams", "encoder trigrams"])
def test_an_encoders_input_is_the_source_where_there_is_one(name: str) -> None:
    source, ids = prompt(2, 9, seed=3), prompt(4, 2)
    check(ours(ALONE[name], ids, source=Source(source, None)), theirs(ALONE[name], ids, encoder=source), ids)


def test_rows_of_one_prompt_are_constrained_as_in_the_reference() -> None:
    said = {"prefix_allowed_tokens_fn": lambda batch, ids: [batch * 7, int(ids[-1]) + 20]}
    ids = prompt(6, 4)
    check(ours(said, ids, beams=3), theirs(said, ids, beams=3), ids)
    said["suppress_tokens"] = list(range(V))  # afterwards, so nothing is left; before, the constraint would win
    mine, words = ours({**said, "bad_words_ids": [[i] for i in range(V)]}, ids, beams=3), said.pop("suppress_tokens")
    assert bool((mine(ids, scores(6, 0))[0] == -torch.inf).all())
    said["bad_words_ids"] = [[i] for i in words if i not in EOS]
    check(ours(said, ids, beams=3), theirs(said, ids, beams=3), ids)


def test_the_whole_chain_is_the_references_in_its_order() -> None:
    def own(ids: Tensor, x: Tensor) -> Tensor:
        return x.roll(1, -1) + ids.shape[1]

    for said in (EVERYTHING, {k: v for k, v in EVERYTHING.items() if k != "forced_eos_token_id"}):
        for shape in ((3, 8), (2, 1)):
            ids = prompt(*shape, seed=9)
            mine, other = ours(said, ids, own=[own]), theirs(said, ids, own=[own])
            assert len(other) == len(said) + 1 == len(mine._chain)
            check(mine, other, ids)


def test_values_that_are_no_numbers_are_removed_as_in_the_reference() -> None:
    x = scores(2, 0)
    x[0, 2], x[0, 4], x[1, 5] = torch.nan, torch.inf, -torch.inf
    ids = prompt(2, 3)
    mine, raw = ours(ALONE["invalid values"], ids, own=[lambda ids, x: x])(ids, x)
    assert torch.equal(mine, theirs(ALONE["invalid values"], ids)(ids, x.clone()))
    assert raw is None, "who asks for their removal does not want them reported"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [*ALONE, "everything"])
def test_a_padded_row_gets_the_numbers_that_it_gets_alone(name: str, side: str) -> None:
    """Also where the padding's id could be part of a run, and each row has a limit of its own."""
    said = {**ALONE.get(name, EVERYTHING), "max_length": 9}
    rows = [prompt(length, seed=length) for length in (8, 5, 1)]
    mask, ids = torch.zeros(3, 8, dtype=torch.int64), torch.full((3, 8), 2)
    for i, row in enumerate(rows):
        at = slice(8 - len(row), 8) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    source = Source(ids, mask) if name.startswith("encoder b") else None
    together = ours(said, ids, mask=mask, source=source)
    alone = [ours(said, row[None], source=Source(row[None], None) if source else None) for row in rows]
    for step in range(5):
        x, new = scores(3, step), prompt(3, step, seed=70)
        if name in ("allowed", "everything"):  # a function that goes by the prompt's number
            alone[1:] = [_numbered(said, row[None], number) for number, row in enumerate(rows[1:], 1)]
        got = together(torch.cat((ids, new), dim=1), x)[0]
        for i, row in enumerate(rows):
            want = alone[i](torch.cat((row, new[i]))[None], x[i : i + 1])[0]
            torch.testing.assert_close(got[i : i + 1], want, rtol=0, atol=0)


def _numbered(said: dict[str, Any], row: Tensor, number: int) -> Processors:
    function = lambda _, ids: allowed(number, ids)  # noqa: E731
    return ours({**said, "prefix_allowed_tokens_fn": function}, row)


def test_holes_within_a_row_are_padding_too() -> None:
    texts = Texts(5, torch.tensor([[1, 0, 1, 0, 1], [0, 1, 1, 1, 1]]))
    ids = torch.tensor([[7, 0, 8, 0, 9, 3], [0, 1, 2, 3, 4, 5]])
    assert texts.lengths == (3, 4)
    assert texts.real(ids).tolist() == [[-1, -1, 7, 8, 9, 3], [-1, 1, 2, 3, 4, 5]]
    assert texts.left_padded(ids).tolist() == [[0, 0, 7, 8, 9, 3], [0, 1, 2, 3, 4, 5]]


def test_rows_of_an_engine_have_warpers_of_their_own() -> None:
    configs = [GenerationConfig(), *(GenerationConfig().updated(**said) for said in WARPERS.values())]
    x = scores(len(configs), 0)
    together = Warpers(configs, CPU)(x)
    for row, config in enumerate(configs):
        assert torch.equal(together[row], Warpers([config], CPU)(x[row : row + 1])[0])
    assert torch.equal(together[0], x[0])


def test_a_decay_beyond_every_number_leaves_a_number() -> None:
    ids = prompt(1, 4000)
    said = {"exponential_decay_length_penalty": (0, 3.0)}
    config = GenerationConfig(max_new_tokens=5000, eos_token_id=EOS).updated(**said)
    process = Processors(config, None, prompt_length=1, mask=None, device=CPU)
    found = process(ids, scores(1, 0))[0]
    assert bool(found.isfinite().all())
    assert int(found.argmax()) in EOS
