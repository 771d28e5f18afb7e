"""The conformance kit for cache layouts.

    class TestDynamic(CacheContract):
        provider = pluglm_caches.dynamic
        facts = provider_facts("pluglm_caches", "cache", "dynamic")

Everything else follows from the facts: which slot kinds it must make, which operations it must have, how exactly it
must give back what was appended. Needs `pluglm[testing]`.
"""

from __future__ import annotations

import gc
import importlib.resources
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from pluglm.contracts import (
    OPERATIONS,
    Cache,
    CacheLayout,
    CacheRequest,
    CrossSlot,
    KVSlot,
    LatentSlot,
    Slot,
    StateSlot,
    Step,
)
from pluglm.errors import CacheError, ContextLengthError, InputError, SaveError, UnsupportedRequestError
from pluglm.testing.cache_machine import cache_machine
from pluglm.testing.cache_model import ListModel

#: One slot of each kind; all sizes differ, so that a swapped dimension cannot hide.
SLOTS: Mapping[str, Slot] = {
    "kv": KVSlot(3, 8, 6),
    "window": KVSlot(2, 12, 11, window=5),
    "chunk": KVSlot(1, 5, 7, chunk=4),
    "latent": LatentSlot(9, 10),
    "state": StateSlot((("conv", (3, 2), None), ("ssm", (4,), "float32"))),
    "cross": CrossSlot(4, 13, 14),
}


class UnknownSlot:
    """A kind of slot that a later contract may bring."""

    kind = "no-such-kind"


def provider_facts(package: str, kind: str, name: str) -> Mapping[str, Any]:
    """What `pluglm.json` of an import package says about one provider."""
    manifest = json.loads((importlib.resources.files(package) / "pluglm.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = next(p for p in manifest["providers"] if (p["kind"], p["name"]) == (kind, name))
    return found


class CacheContract:
    """Subclass it in a test file, as `Test…`. A test may be weakened only by `xfail(reason=…)`.

    Attributes:
        provider: object or module with the hook `pluglm_build_cache`.
        facts: its object in `pluglm.json`.
        bounded: the layout drops cells that no query reads any more, so crop and rollback may be refused.
        max_examples, max_steps: how long the state machine runs.
    """

    provider: ClassVar[Any]
    facts: ClassVar[Mapping[str, Any]]
    bounded: ClassVar[bool] = False
    max_examples: ClassVar[int] = 25
    max_steps: ClassVar[int] = 20
    phases: ClassVar[tuple[Phase, ...]] = (Phase.generate, Phase.shrink)

    # Tools

    def build(self, slots: tuple[Slot, ...], *, dtype: str = "float32", **request: Any) -> CacheLayout:
        """The layout for these slots."""
        views = request.pop("views", tuple(self.facts["views"]))
        made = CacheRequest(slots=slots, views=views, device="cpu", dtype=dtype, **request)
        layout: CacheLayout = self.provider.pluglm_build_cache(made)
        return layout

    def same(self, got: Tensor, wanted: Tensor) -> bool:
        """Equal within the declared numerics. Override it for what `pluglm.json` cannot say."""
        numerics = self.facts["numerics"]
        if numerics["kind"] == "bitwise":
            return got.dtype is wanted.dtype and torch.equal(got, wanted)
        return torch.allclose(got.float(), wanted.float(), rtol=numerics["rtol"], atol=numerics["atol"])

    def slots(self, *without: str) -> tuple[Slot, ...]:
        """One slot of each listed kind."""
        return tuple(SLOTS[kind] for kind in self.facts["slots"] if kind not in without)

    def filled(self, slots: tuple[Slot, ...], *, rows: int = 2, count: int = 3) -> tuple[Cache, ListModel]:
        """A cache with `count` dense tokens in every row, and room for as many more."""
        cache = self.build(slots).new(batch_size=rows, capacity=2 * count)
        model = ListModel.empty(slots, "float32", rows)
        model.set_cross(cache, 4)
        model.forward(cache, cache.next_positions(count), self.same, dense=True)
        return cache, model

    # Laws

    def test_it_is_a_layout_that_makes_caches(self) -> None:
        layout = self.build(self.slots())
        cache = layout.new(batch_size=2, capacity=8)
        assert isinstance(layout, CacheLayout)
        assert isinstance(cache, Cache)
        assert isinstance(cache.begin(cache.next_positions(1), dense=True), Step)
        assert layout.name == cache.layout == self.facts["name"]
        assert layout.view in self.facts["views"]
        assert cache.slots == self.slots()
        assert cache.operations == layout.operations <= set(self.facts["operations"]) <= set(OPERATIONS)

    def test_each_slot_kind_gives_back_what_was_appended(self) -> None:
        for kind, dtype in itertools.product(self.facts["slots"], ("float32", "bfloat16")):
            slots = (SLOTS[kind], SLOTS[kind])
            cache = self.build(slots, dtype=dtype).new(batch_size=2, capacity=40)
            model = ListModel.empty(slots, dtype, 2)
            model.set_cross(cache, 7)
            for count in (11, 1, 1, 5, 1):
                model.forward(cache, cache.next_positions(count), self.same, dense=True)
            assert cache.length == 19, kind
            assert cache.dense, f"{kind}: every pass was dense, and the host must know it"

    def test_random_operations_equal_a_plain_list_model(self) -> None:
        mixes = [self.slots("state"), self.slots()] if "state" in self.facts["slots"] else [self.slots()]
        for slots in mixes:
            machine = cache_machine(self.build(slots), "float32", self.same, bounded=self.bounded)
            run_state_machine_as_test(
                machine,
                settings=settings(
                    max_examples=self.max_examples, stateful_step_count=self.max_steps, deadline=None, database=None,
                    derandomize=True, phases=self.phases, suppress_health_check=list(HealthCheck),
                ),
            )  # fmt: skip

    def test_a_failed_pass_changes_nothing(self) -> None:
        cache, model = self.filled(self.slots())
        for _ in range(2):
            model.forward(cache, cache.next_positions(2), self.same, dense=True, commit=False)
            model.check(cache, self.same)
        model.forward(cache, cache.next_positions(1), self.same, dense=True)
        model.check(cache, self.same)

    def test_a_full_cache_refuses_before_it_writes(self) -> None:
        cache, model = self.filled(self.slots(), count=3)
        if cache.capacity is None:
            pytest.skip("bounded by memory alone")
        room = cache.capacity - cache.length
        with pytest.raises(ContextLengthError) as caught:
            cache.begin(cache.next_positions(room + 1), dense=True)
        assert (caught.value.tokens, caught.value.limit) == (cache.capacity + 1, cache.capacity)
        assert caught.value.fix
        model.check(cache, self.same)
        model.forward(cache, cache.next_positions(room), self.same, dense=True)

    def test_without_a_capacity_it_grows_or_asks_for_one(self) -> None:
        layout = self.build(self.slots())
        if layout.new(batch_size=2, capacity=8).capacity is not None:
            with pytest.raises(InputError) as caught:
                layout.new(batch_size=2)
            assert caught.value.data["argument"] == "capacity"
            return
        cache = layout.new(batch_size=2)
        model = ListModel.empty(cache.slots, "float32", 2)
        for count in (1, 70, 1, 130):
            model.forward(cache, cache.next_positions(count), self.same, dense=True)

    def test_segments_and_prefix_lengths_come_back_with_the_keys(self) -> None:
        slots = tuple(SLOTS[kind] for kind in ("kv",) if kind in self.facts["slots"])
        if not slots:
            pytest.skip("makes no kv slots")
        cache = self.build(slots).new(batch_size=2, capacity=8)
        k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 6)
        segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
        positions = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 1, 0, 1]])
        step = cache.begin(positions, segments=segments, prefix_lengths=torch.tensor([2, 3]))
        cache.append(0, k, v, step)
        cache.commit(step)
        more = torch.tensor([[1, 3], [2, 2]])
        step = cache.begin(torch.tensor([[3, 0], [2, 3]]), segments=more)
        cache.append(0, k[:, :, :2], v[:, :, :2], step)
        keys = step.keys(0)
        assert keys.segments is not None
        assert keys.q_segments is not None
        assert keys.prefix_lengths is not None
        assert torch.equal(keys.segments, torch.cat((segments, more), dim=1))
        assert torch.equal(keys.q_segments, more)
        assert keys.prefix_lengths.tolist() == [2, 3]
        assert not keys.dense

    def test_a_cross_slot_is_written_once(self) -> None:
        if "cross" not in self.facts["slots"]:
            pytest.skip("makes no cross slots")
        cache, model = self.filled((SLOTS["cross"],))
        k, v, positions = model.cross[0]
        with pytest.raises(CacheError):
            cache.set_cross(0, k, v, positions)
        model.check(cache, self.same)

    def test_nbytes_is_what_the_tensors_hold(self) -> None:
        gc.collect()
        others = _tensors()  # kept alive: an address that became free could be the cache's next
        before = _storages(others)
        cache, model = self.filled(self.slots(), rows=3, count=64)
        counted = cache.nbytes
        model.rows.clear()
        model.states.clear()
        model.cross.clear()
        gc.collect()
        held = sum(size for pointer, size in _storages(_tensors()).items() if pointer not in before)
        assert abs(counted - held) <= 0.02 * held, f"nbytes says {counted}, the allocator holds {held}"

    # What it must refuse

    def test_a_slot_kind_it_does_not_list_is_refused(self) -> None:
        unlisted: list[Any] = [slot for kind, slot in SLOTS.items() if kind not in self.facts["slots"]]
        for slot in [*unlisted, UnknownSlot()]:
            with pytest.raises(UnsupportedRequestError) as caught:
                self.build((slot,))
            assert any(slot.kind in reason for reason in caught.value.reasons)

    def test_what_it_does_not_know_is_refused_by_name(self) -> None:
        slots = tuple(slot for slot in self.slots() if isinstance(slot, KVSlot)) or self.slots()
        requests: dict[str, dict[str, Any]] = {
            "no-such-option": {"options": (("no-such-option", 1),)},
            "no-such-variant": {"variant": "no-such-variant"},
            "no-such-operation": {"operations": ("no-such-operation",)},
            "no-such-view": {"views": ("no-such-view",)},
        }
        for word, asked in requests.items():
            with pytest.raises(UnsupportedRequestError) as caught:
                self.build(slots, **asked)
            assert any(word in reason for reason in caught.value.reasons), caught.value.reasons

    def test_an_absent_operation_is_refused_when_asked_for_and_when_called(self, tmp_path: Path) -> None:
        for slots in (self.slots("state"), self.slots()):
            for operation in sorted(set(OPERATIONS) - self.build(slots).operations):
                with pytest.raises(UnsupportedRequestError) as unsupported:
                    self.build(slots, operations=(operation,))
                assert any(operation in reason for reason in unsupported.value.reasons)
                cache, model = self.filled(slots)
                with pytest.raises(CacheError) as caught:
                    _calls(cache, tmp_path / "x")[operation]()
                assert caught.value.data["operation"] == operation
                assert operation in str(caught.value)
                model.check(cache, self.same)

    def test_a_saved_cache_of_another_model_is_refused(self, tmp_path: Path) -> None:
        if not {"save", "load"} <= set(self.build(self.slots()).operations):
            pytest.skip("neither saves nor loads")
        cache, model = self.filled(self.slots())
        path = tmp_path / "cache.safetensors"
        cache.save(path, fingerprint="one")
        other, _ = self.filled((*self.slots(), self.slots()[0]))
        for reader, fingerprint, word in ((cache, "two", "two"), (other, "one", "slots")):
            with pytest.raises(CacheError, match=word) as caught:
                reader.load(path, fingerprint=fingerprint)
            assert caught.value.why
            assert caught.value.fix
        path.write_bytes(path.read_bytes()[:-7])
        for broken in (path, tmp_path / "absent"):
            with pytest.raises(CacheError):
                cache.load(broken, fingerprint="one")
        model.check(cache, self.same)

    def test_a_save_that_fails_leaves_what_was_there(self, tmp_path: Path) -> None:
        if "save" not in self.build(self.slots()).operations:
            pytest.skip("does not save")
        cache, _ = self.filled(self.slots())
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "folder", tmp_path / "absent" / "cache.safetensors"):
            with pytest.raises(SaveError):
                cache.save(path, fingerprint="one")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]


def _calls(cache: Cache, path: Path) -> dict[str, Callable[[], object]]:
    """One call of each operation on a cache with two rows."""
    index = torch.tensor([1, 0])
    return {
        "crop": lambda: cache.crop(1), "rollback": lambda: cache.rollback(1), "reorder": lambda: cache.reorder(index),
        "repeat": lambda: cache.repeat(2), "select": lambda: cache.select(index), "fork": cache.fork,
        "reset": cache.reset, "save": lambda: cache.save(path, fingerprint="x"),
        "load": lambda: cache.load(path, fingerprint="x"),
    }  # fmt: skip


def _tensors() -> list[Tensor]:
    """Every live tensor that the garbage collector knows."""
    return [thing for thing in gc.get_objects() if type(thing) is Tensor]


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of every storage that these tensors use, by address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
