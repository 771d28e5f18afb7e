"""Every operation of a cache in random order, beside a plain list (hypothesis, stateful)."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pluglm.contracts import Cache, CacheLayout
from pluglm.errors import CacheError, ContextLengthError
from pluglm.testing.cache_model import ListModel, Same

CAPACITY = 24
MAX_ROWS = 6
which = st.integers(0, 2)
small = st.integers(0, 4)
paddings = st.lists(st.tuples(small, small), min_size=MAX_ROWS, max_size=MAX_ROWS)


def cache_machine(layout: CacheLayout, dtype: str, same: Same, *, bounded: bool) -> type[RuleBasedStateMachine]:
    """A state machine for caches of `layout`.

    Args:
        same: compares what was given back with what was appended.
        bounded: the layout drops old cells, so crop and rollback may raise CacheError; then nothing may have changed.
    """

    class CacheMachine(RuleBasedStateMachine):
        """Up to three caches at a time, each with the list it must equal."""

        def __init__(self) -> None:
            super().__init__()
            self.pairs: list[tuple[Cache, ListModel]] = []
            self.folder = Path(tempfile.mkdtemp())

        def teardown(self) -> None:
            shutil.rmtree(self.folder, ignore_errors=True)

        def pair(self, n: int) -> tuple[Cache, ListModel]:
            return self.pairs[n % len(self.pairs)]

        def can(self, operation: str) -> bool:
            return operation in layout.operations

        def take_back(self, operation: str, act: Callable[[], None], meant: Callable[[], None]) -> None:
            if not self.can(operation):
                return
            try:
                act()
            except CacheError:
                assert bounded, f"{operation} is declared, and refused"
            else:
                meant()

        @initialize(rows=st.integers(1, 3))
        def start(self, rows: int) -> None:
            cache = layout.new(batch_size=rows, capacity=CAPACITY)
            self.pairs.append((cache, ListModel.empty(cache.slots, dtype, rows)))

        def advance(
            self, n: int, positions: torch.Tensor, *, dense: bool = False, commit: bool = True, cross: int = 0
        ) -> None:
            cache, model = self.pair(n)
            needed = model.length + positions.shape[1]
            if cache.capacity is not None and needed > cache.capacity:
                with pytest.raises(ContextLengthError) as caught:
                    cache.begin(positions, dense=dense)
                assert (caught.value.tokens, caught.value.limit) == (needed, cache.capacity)
            elif needed <= 2 * CAPACITY:
                model.forward(cache, positions, same, dense=dense, commit=commit, cross=cross)

        @rule(n=which, count=st.integers(1, 7), told=st.booleans(), commit=st.booleans() | st.just(True))
        def append_what_follows(self, n: int, count: int, told: bool, commit: bool) -> None:
            cache, _ = self.pair(n)
            self.advance(n, cache.next_positions(count), dense=told and cache.dense, commit=commit)

        @rule(n=which, padding=paddings, commit=st.booleans())
        def append_padded_rows(self, n: int, padding: list[tuple[int, int]], commit: bool) -> None:
            _, model = self.pair(n)
            rows = []
            for (left, right), first in zip(padding, model.next_positions(), strict=False):
                rows.append([first + t - left if left <= t < 5 - right else -1 for t in range(5)])
            self.advance(n, torch.tensor(rows), commit=commit)

        @rule(n=which, gap=st.integers(1, 5))
        def append_after_a_gap_in_all_rows(self, n: int, gap: int) -> None:
            _, model = self.pair(n)
            first = max(model.next_positions()) + gap
            self.advance(n, torch.tensor([[first, first + 1]]))

        @rule(n=which, length=st.integers(1, 6))
        def set_cross(self, n: int, length: int) -> None:
            cache, _ = self.pair(n)
            self.advance(n, cache.next_positions(1), cross=length)

        @rule(n=which, part=st.floats(0, 1))
        def crop(self, n: int, part: float) -> None:
            cache, model = self.pair(n)
            length = int(part * model.length)
            self.take_back("crop", lambda: cache.crop(length), lambda: model.crop(length))

        @rule(n=which, count=small)
        def rollback(self, n: int, count: int) -> None:
            cache, model = self.pair(n)
            count = min(count, model.length)
            counts = [count] * len(model.rows)
            self.take_back("rollback", lambda: cache.rollback(count), lambda: model.rollback(counts))

        @rule(n=which, counts=st.lists(small, min_size=MAX_ROWS, max_size=MAX_ROWS))
        def rollback_rows(self, n: int, counts: list[int]) -> None:
            cache, model = self.pair(n)
            own = [min(count, model.length) for count in counts[: len(model.rows)]]
            self.take_back("rollback", lambda: cache.rollback(torch.tensor(own)), lambda: model.rollback(own))

        @rule(n=which, seed=st.integers(0, 99))
        def reorder(self, n: int, seed: int) -> None:
            cache, model = self.pair(n)
            rows = len(model.rows)
            index = torch.randint(rows, (rows,), generator=torch.Generator().manual_seed(seed))
            if self.can("reorder"):
                cache.reorder(index)
                model.take_rows(index.tolist())

        @rule(n=which, chosen=st.lists(st.integers(0, MAX_ROWS - 1), min_size=1, max_size=MAX_ROWS))
        def select(self, n: int, chosen: list[int]) -> None:
            cache, model = self.pair(n)
            index = [row % len(model.rows) for row in chosen]
            if self.can("select"):
                cache.select(torch.tensor(index))
                model.take_rows(index)

        @rule(n=which, count=st.integers(1, 3))
        def repeat(self, n: int, count: int) -> None:
            cache, model = self.pair(n)
            if self.can("repeat") and len(model.rows) * count <= MAX_ROWS:
                cache.repeat(count)
                model.take_rows([row for row in range(len(model.rows)) for _ in range(count)])

        @rule(n=which)
        def fork(self, n: int) -> None:
            cache, model = self.pair(n)
            if self.can("fork"):
                self.pairs = [*self.pairs[-2:], (cache.fork(), copy.deepcopy(model))]

        @rule(n=which)
        def reset(self, n: int) -> None:
            cache, model = self.pair(n)
            if self.can("reset"):
                cache.reset()
                model.reset()

        @rule(n=which, rows=st.integers(1, 3), used=st.booleans())
        def save_and_load(self, n: int, rows: int, used: bool) -> None:
            cache, model = self.pair(n)
            if not (self.can("save") and self.can("load")):
                return
            cache.save(self.folder / "cache.safetensors", fingerprint="model")
            other = layout.new(batch_size=rows, capacity=CAPACITY)
            if used:
                waste = ListModel.empty(other.slots, dtype, rows)
                waste.set_cross(other, 3)
                waste.forward(other, other.next_positions(2), same)
            other.load(self.folder / "cache.safetensors", fingerprint="model")
            self.pairs[n % len(self.pairs)] = (other, model)

        @invariant()
        def every_cache_equals_its_list(self) -> None:
            for cache, model in self.pairs:
                model.check(cache, same)

    return CacheMachine
