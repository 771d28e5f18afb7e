"""Several tokens in one native call: the tokens of single passes, chosen as the strategies choose them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from native_models import SPEC, Pair, layer, llama, make, with_library
from pluglm_decoding_blocks.draw import draw as drawn
from pluglm_decoding_blocks.rng import uniforms
from pluglm_decoding_blocks.warpers import Warpers
from pluglm_executor_cpu import native

from pluglm import InputError
from pluglm.contracts import DecodeRun, Draw, Embedding, GenerationConfig, Head, KVSlot, MaskSpec, Rope
from pluglm.testing.executor import DecodesAheadContract

WINDOW = dataclasses.replace(SPEC, mask=MaskSpec(window=7))
ONE_HEAD = llama(layer(0, dataclasses.replace(SPEC, num_kv_heads=1)), slots=(KVSlot(1, 10, 10),))
WINDOWED = llama(*(layer(i, WINDOW) for i in range(2)), slots=tuple(KVSlot(3, 10, 10, window=7) for _ in range(2)))
SEEDS = (7, -(2**40), 2**63 - 1)


class _Kit(DecodesAheadContract):
    pair: Pair

    def parts(self) -> Any:
        return self.pair.executor, self.pair.layout, 37


@with_library
class TestDynamic(_Kit):
    pair = make(llama(), threads=2) if native.library() else None  # type: ignore[assignment]


@with_library
class TestStaticInBfloat16(_Kit):
    pair = make(ONE_HEAD, dtype="bfloat16", layout="static", threads=1) if native.library() else None  # type: ignore[assignment]


@with_library
class TestSliding(_Kit):
    pair = make(WINDOWED, layout="sliding", threads=1) if native.library() else None  # type: ignore[assignment]


def logits_of(pair: Pair, cache: Any, token_ids: Any) -> Any:
    """[rows, V] of one pass."""
    return pair.feed("cpu", cache, token_ids.tolist())[:, -1]


DRAWS = {
    "plain": GenerationConfig(), "temperature": GenerationConfig(temperature=0.7), "top_k": GenerationConfig(top_k=9),
    "top_p": GenerationConfig(top_p=0.8), "min_p": GenerationConfig(min_p=0.1), "more": GenerationConfig(top_k=10**30),
    "all": GenerationConfig(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
}  # fmt: skip


@with_library
@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_is_what_the_strategies_draw(name: str, dtype: str) -> None:
    how = DRAWS[name]
    pair = make(llama(), dtype=dtype, threads=2)
    warp, seeds = Warpers([how], torch.device("cpu")), torch.tensor(SEEDS)

    def choose(logits: Any, number: int) -> Any:
        return drawn(warp(logits.float()), uniforms(seeds, torch.tensor(number)))[:, None]

    one, two = pair.cache(3), pair.cache(3)
    first = torch.tensor([[3], [5], [9]])
    want = [first]
    for i in range(40):
        want.append(choose(logits_of(pair, one, want[-1]), 4 + i))
    made, handed = first, 0
    while made.shape[1] <= 40:
        told = Draw(
            SEEDS, 3 + made.shape[1], how.temperature or 1.0, how.top_k or 0, how.top_p or 1.0, how.min_p or 0.0
        )
        done = pair.executor.decode(DecodeRun(made[:, -1:], two, 41 - made.shape[1], draw=told))
        made = torch.cat((made, done.token_ids), dim=1)
        if done.logits is not None:
            handed += 1
            made = torch.cat((made, choose(done.logits, 3 + made.shape[1])), dim=1)
    assert torch.equal(made, torch.cat(want, dim=1))
    assert one.length == two.length == 40
    assert handed <= 8


@with_library
@torch.no_grad()
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_of_equal_scores_the_first_is_chosen_in_every_share_of_the_vocabulary(isa: str) -> None:
    if isa not in native.library().isas:  # type: ignore[union-attr]
        pytest.skip("this machine has no such instructions")
    for size in (37, 1500):
        for threads in (1, 3):
            pair = make(llama(embedding=Embedding(size, 24)), threads=threads, isa=isa)
            pair.module.embed.weight[:] = pair.module.embed.weight[0]
            pair.module.embed.weight[: size // 2] *= 0.5
            pair.executor._pack()
            logits = logits_of(pair, pair.cache(), torch.tensor([[1]]))
            chosen = pair.executor.decode(DecodeRun(torch.tensor([[1]]), pair.cache(), 1)).token_ids.item()
            assert chosen == int(logits[0].numpy().argmax())
            assert chosen in (0, size // 2)


@with_library
@torch.no_grad()
@pytest.mark.parametrize("draw", [None, Draw((1, 2), 0)])
def test_scores_that_are_not_finite_are_handed_over_unless_the_row_has_ended(draw: Draw | None) -> None:
    pair = make(llama(head=Head(tied=False)), threads=2)
    pair.module.embed.weight[30] = float("nan")  # a row that is fed this token has no other scores
    pair.executor._pack()
    cache, twin = pair.cache(2), pair.cache(2)
    run = DecodeRun(torch.tensor([[3], [30]]), cache, 1, draw=draw)
    done = pair.executor.decode(run)
    assert done.token_ids.shape == (2, 0)
    assert done.logits.isnan().all(dim=1).tolist() == [False, True]
    assert cache.length == 1
    done = pair.executor.decode(dataclasses.replace(run, cache=twin, ended=(False, True), pad=30))
    assert done.logits is None
    assert done.token_ids[1].tolist() == [30]


@with_library
@torch.no_grad()
def test_what_cannot_be_written_ahead_is_declined_and_nothing_has_happened() -> None:
    last = torch.tensor([[3]])
    long = make(llama(layer(0, rope=Rope("dynamic", 100.0, 10, parameters=(("factor", 3.0),), max_seq_len=23))))
    many, packed = make(llama(), threads=1), make(llama(), layout="quantized", threads=1)
    cache = many.cache(17)
    assert many.executor.decode(DecodeRun(last.expand(17, 1), cache, 4)) is None
    for pair in (long, packed):
        cache = pair.cache(capacity=290)
        for i in range(200 if pair is packed else 3):
            pair.feed("cpu", cache, [[i % 37]])
        before = cache.length
        assert pair.executor.decode(DecodeRun(last, cache, 4)) is None
        assert cache.length == before


@with_library
def test_gradients_are_asked_of_torch() -> None:
    pair = make(llama(), threads=1)
    assert pair.executor.decode(DecodeRun(torch.tensor([[3]]), pair.cache(), 4)) is None


@with_library
@torch.no_grad()
def test_a_cache_that_packs_old_cells_does_so_no_sooner_than_token_by_token() -> None:
    pair = make(llama(), layout="quantized", threads=1)
    one, two = pair.cache(capacity=290), pair.cache(capacity=290)
    want = [torch.tensor([[3]])]
    while pair.executor.torch_passes == 0:
        want.append(logits_of(pair, one, want[-1]).argmax(-1, keepdim=True))
    made, passes = want[0], 0
    while (done := pair.executor.decode(DecodeRun(made[:, -1:], two, 40))) is not None:
        made, passes = torch.cat((made, done.token_ids), dim=1), passes + 1
    assert made[0].tolist() == torch.cat(want[:-1], dim=1)[0].tolist()
    assert two.length == one.length - 1
    assert passes < 20


@with_library
@torch.no_grad()
def test_wrong_ids_and_positions_are_refused_and_the_cache_is_unchanged() -> None:
    pair = make(llama(embedding=Embedding(37, 24, learned_positions=9), max_seq_len=9), threads=1)
    cache = pair.cache()
    with pytest.raises(InputError, match="run from 37 to 37"):
        pair.executor.decode(DecodeRun(torch.tensor([[37]]), cache, 4))
    assert cache.length == 0
    last, fed = torch.tensor([[3]]), 0
    while fed < 9:  # as far as there are positions
        done = pair.executor.decode(DecodeRun(last, cache, 20))
        last, fed = done.token_ids[:, -1:], fed + done.token_ids.shape[1]
    with pytest.raises(InputError, match="no position 9"):
        pair.executor.decode(DecodeRun(last, cache, 20))
    assert cache.length == fed == pair.executor.native_passes == 9
