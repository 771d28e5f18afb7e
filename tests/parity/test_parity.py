"""Logits, hidden states and greedy tokens equal those of Transformers, in every way a text can be fed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from checkpoints import VARIANTS

from pluglm.errors import PlanError
from pluglm.lm import LanguageModel

Folder = Callable[[str], Path]
Loaded = Callable[..., LanguageModel]

TOLERANCE = 1e-4
#: Beyond every checkpoint's length before stretching (24) and longer than every window.
LENGTH = 90
STEPS = 64
#: Lengths of the prompts of a batch: below and above the length before stretching.
RAGGED = (29, 13)
#: Two best logits that are closer than this would make a token a matter of rounding: choose another seed.
MARGIN = 1e-4

every_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(scope="module")
def expected(folder: Folder) -> Callable[[str, int, bool], list[int]]:
    """(variant, prompt length, use_cache) -> the tokens Transformers chooses for that prompt alone."""

    @cache
    def choose(name: str, length: int, use_cache: bool) -> list[int]:
        use_cache = use_cache and VARIANTS[name].cached_reference
        tokens, rows = kit.greedy(kit.reference(folder(name)), start(name, length), STEPS, use_cache=use_cache)
        best = rows.topk(2, dim=-1).values
        assert (best[:, 0] - best[:, 1]).min() > MARGIN, "the reference's own choice is a matter of rounding"
        return tokens

    return choose


def start(name: str, length: int) -> torch.Tensor:
    """The prompt of one variant and length."""
    return kit.prompt(length, VARIANTS[name].seed)


@every_variant
def test_logits_and_hidden_states_equal_the_references(name: str, folder: Folder, loaded: Loaded) -> None:
    token_ids = kit.prompt(LENGTH)[None]
    with torch.no_grad():
        want = kit.reference(folder(name))(token_ids, output_hidden_states=True)
        got = loaded(name).model(token_ids, output_hidden_states=True)
    assert got.logits.shape == want.logits.shape
    assert (got.logits - want.logits).abs().max() <= TOLERANCE
    assert len(got.hidden_states) == len(want.hidden_states) == loaded(name).model.description.num_layers + 1
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        assert (ours - theirs).abs().max() <= TOLERANCE


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row(name: str, side: str, folder: Folder, loaded: Loaded) -> None:
    rows = [kit.prompt(length) for length in (67, LENGTH, 41)]
    token_ids, mask = kit.padded(rows, side)
    with torch.no_grad():
        got = loaded(name).model(token_ids, attention_mask=mask).logits
        for i, row in enumerate(rows):
            alone = kit.reference(folder(name))(row[None]).logits[0]
            assert (got[i][mask[i] == 1] - alone).abs().max() <= TOLERANCE


@every_variant
def test_a_prompt_in_pieces_equals_the_reference_fed_the_same_pieces(name: str, folder: Folder, loaded: Loaded) -> None:
    token_ids = kit.prompt(LENGTH)[None]
    model, reference = loaded(name).model, kit.reference(folder(name))
    ours = theirs = None
    past = 0
    for piece in token_ids.split((37, 1, 30, 22), dim=1):
        with torch.no_grad():
            got = model(piece, past_key_values=ours, use_cache=True)
            if VARIANTS[name].cached_reference:
                want = reference(piece, past_key_values=theirs, use_cache=True)
                theirs = want.past_key_values
            else:
                want = reference(token_ids[:, : past + piece.shape[1]])
        ours, past = got.past_key_values, past + piece.shape[1]
        assert (got.logits - want.logits[:, -piece.shape[1] :]).abs().max() <= TOLERANCE
    assert ours is not None
    assert ours.length == LENGTH


@every_variant
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_tokens_are_the_references(name: str, use_cache: bool, expected: Any, loaded: Loaded) -> None:
    got, _ = kit.greedy(loaded(name).model, start(name, RAGGED[0]), STEPS, use_cache=use_cache)
    assert got == expected(name, RAGGED[0], use_cache)


@every_variant
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_tokens_of_a_ragged_batch_are_those_of_each_row_alone(
    name: str, side: str, use_cache: bool, expected: Any, loaded: Loaded
) -> None:
    starts = [start(name, length) for length in RAGGED]
    got = kit.greedy_ragged(loaded(name), starts, STEPS, side=side, use_cache=use_cache)
    assert got == [expected(name, length, use_cache) for length in RAGGED]


@every_variant
@pytest.mark.parametrize(("attention", "layout"), [("sdpa", "static"), ("sdpa", "hybrid")])
def test_other_attention_and_caches_choose_the_references_tokens(
    name: str, attention: str, layout: str, expected: Any, loaded: Loaded
) -> None:
    lacking = kit.lacking(loaded(name), attention)
    if lacking:  # refused while planning, and not computed otherwise
        with pytest.raises(PlanError, match="cannot do what this model needs") as caught:
            loaded(name, attention, layout)
        assert all(feature in str(caught.value) for feature in lacking)
        return
    lm = loaded(name, attention, layout)
    got = kit.greedy_ragged(lm, [start(name, length) for length in RAGGED], STEPS, side="left", use_cache=True)
    assert got == [expected(name, length, True) for length in RAGGED]
