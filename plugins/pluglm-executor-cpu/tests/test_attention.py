"""Attention over several hundred cells: ranges, tiles and any number of threads, against the torch module."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from native_models import SPEC, Pair, close, layer, llama, make, with_library
from pluglm_executor_cpu import native

from pluglm.contracts import DecoderProgram, KVSlot, MaskSpec, Rope

CELLS = 450
SLOPES = tuple(0.3 / (h + 1) for h in range(6))


def attending(kv_heads: int = 3, head_dim: int = 10, v_head_dim: int = 10, **changed: Any) -> DecoderProgram:
    """Two layers of six query heads; `changed` fields of their attention's spec."""
    spec = dataclasses.replace(
        SPEC, num_kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, scale=head_dim**-0.5, **changed
    )
    rope = None if spec.alibi_slopes else Rope("default", 1e4, head_dim)
    slot = KVSlot(kv_heads, head_dim, v_head_dim, window=spec.mask.window, chunk=spec.mask.chunk)
    return llama(*(layer(i, spec, rope) for i in range(2)), slots=(slot, slot), max_seq_len=900)


PROGRAMS = {
    "a key head for each": attending(6, 32, 32),
    "two query heads a key head": attending(3, 16, 48),
    "three query heads a key head": attending(2, 64, 40),
    "six query heads a key head": attending(1, 24, 33),
    "window": attending(2, mask=MaskSpec(window=250)),
    "chunk": attending(2, mask=MaskSpec(chunk=300)),
    "soft cap": attending(1, softcap=0.7),
    "sinks": attending(3, sinks=True),
    "alibi": attending(2, alibi_slopes=SLOPES),
    "bidirectional": attending(3, mask=MaskSpec(causal=False, chunk=400)),
}


def tokens(count: int, row: int = 0) -> list[int]:
    return [(i * i + 5 * row) % 37 for i in range(count)]


def compare(pair: Pair, rows: int = 1, positions: list[list[int]] | None = None) -> list[torch.Tensor]:
    """Passes of one, some and one token after a long prompt that torch reads; returns what the library computed."""
    one, two = pair.cache(rows, CELLS + 40), pair.cache(rows, CELLS + 40)
    for cache in (one, two):
        pair.feed("torch", cache, [tokens(CELLS, b) for b in range(rows)], positions)
    got = []
    for count in (1, 16 // rows, 1):
        ids = [tokens(count, b + count) for b in range(rows)]
        got.append(pair.feed("cpu", one, ids))
        close(pair, got[-1], pair.feed("torch", two, ids))
    assert pair.executor.native_passes == 3
    return got


@with_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_long_contexts_equal_the_torch_module(name: str, dtype: str) -> None:
    compare(make(PROGRAMS[name], dtype=dtype, threads=3))


@with_library
@pytest.mark.parametrize("isa", native.ISAS)
def test_every_instruction_set_reads_long_contexts(isa: str) -> None:
    library = native.library()
    assert library is not None
    if isa not in library.isas:
        pytest.skip(f"this machine has no {isa}")
    for name, dtype in itertools.product(("two query heads a key head", "six query heads a key head"), native.DTYPES):
        compare(make(PROGRAMS[name], dtype=dtype, isa=isa, threads=2))


@with_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_number_of_threads_computes_the_same_bits(dtype: str) -> None:
    """Ranges of cells depend on the pass alone, and are added up in their order whoever is done last."""
    program = PROGRAMS["three query heads a key head"]
    first, *others = (compare(make(program, dtype=dtype, threads=threads), rows=2) for threads in (1, 2, 4))
    for other in others:
        assert all(map(torch.equal, first, other))


@with_library
def test_long_rows_with_padding_and_holes() -> None:
    """Rows of other lengths, a row that is all padding, and cells that no token sees."""
    filled = [
        list(range(CELLS)),
        [-1] * 300 + list(range(150)),
        [-1] * CELLS,
        [*range(70), *[-1] * 310, *range(70, 140)],
    ]
    for name in ("three query heads a key head", "sinks", "alibi"):
        compare(make(PROGRAMS[name], threads=3), rows=4, positions=filled)


@with_library
@pytest.mark.parametrize("layout", ["dynamic", "static", "hybrid", "offloaded", "sliding", "chunked", "quantized"])
def test_long_contexts_in_every_layout(layout: str) -> None:
    reach = {"sliding": "window", "chunked": "chunk"}.get(layout)
    program = PROGRAMS["three query heads a key head" if reach is None else reach]
    if layout == "quantized":  # what it packs goes through torch: a context that it has not packed yet
        pair = make(program, layout=layout, threads=2)
        one, two = pair.cache(1, 200), pair.cache(1, 200)
        for i in range(100):
            got, want = (pair.feed(which, c, [[i % 37]]) for which, c in (("cpu", one), ("torch", two)))
        close(pair, got, want)
        assert pair.executor.native_passes == 100
        return
    compare(make(program, layout=layout, threads=2))
