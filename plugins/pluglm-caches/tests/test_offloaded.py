"""Cells on the host: in a file on a CPU; beside an accelerator, that copies are where they must be when they must be."""

import gc
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pluglm_caches
import pytest
import torch
from hypothesis import Phase
from pluglm_caches.offloaded_layout import Offloaded, OffloadedCache
from pluglm_caches.offloaded_store import OffloadedStore
from pluglm_caches.shelves import MappedShelf, PinnedShelf

from pluglm.contracts import CacheRequest, KVSlot, LatentSlot, SharedSlot
from pluglm.errors import CacheError, InputError, UnsupportedRequestError
from pluglm.testing.cache import CacheContract, provider_facts

SLOT = KVSlot(3, 8, 6)


def request(slots=(SLOT,), **changes):
    return CacheRequest(**{"slots": slots, "views": ("dense",), "device": "cpu", "dtype": "float32", **changes})


def layout(slots=(SLOT,), name="offloaded", **changes):
    return getattr(pluglm_caches, name).pluglm_build_cache(request(slots, **changes))


def advance(cache, count=1):
    """One dense pass; keys and values are the positions. Returns the views."""
    step = cache.begin(cache.next_positions(count), dense=True)
    given = torch.arange(cache.length, cache.length + count).float()[None, None, :, None]
    views = []
    for i, slot in enumerate(cache.slots):
        if isinstance(slot, KVSlot):
            k, v = (given.expand(cache.batch_size, slot.num_kv_heads, -1, n) for n in (slot.head_dim, slot.v_head_dim))
            views.append(cache.append(i, k, v, step))
    cache.commit(step)
    return views


# Files


def mapped(tensor):
    """Whether a tensor is in one of this process's mapped, deleted files: the lines of /proc/self/maps, Linux only."""
    address = tensor.untyped_storage().data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return "pluglm-cache-" in line and line.endswith("(deleted)")
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_cells_are_in_a_deleted_file_that_grows_where_it_is(tmp_path):
    cache = layout(options=(("folder", str(tmp_path)),)).new(batch_size=2)
    ((first,),) = ([advance(cache, 10)[0]],)
    assert mapped(first.k)
    assert list(tmp_path.iterdir()) == []
    for _ in range(30):
        advance(cache, 50)
    (last,) = advance(cache)
    assert mapped(last.k)
    assert list(tmp_path.iterdir()) == []
    assert last.k[1, 2, :, 0].tolist() == [float(i) for i in range(1511)]
    assert first.k[1, 2, :10, 0].tolist() == [float(i) for i in range(10)]  # the mapping before still holds


def test_growing_copies_no_cell(monkeypatch):
    """A longer file begins with the shorter one, so nothing but new cells is ever written."""
    cache = layout((SLOT, LatentSlot(5, 4))).new(batch_size=1)
    monkeypatch.setattr("pluglm_caches.tokens.resized", None)
    for _ in range(5):
        step = cache.begin(cache.next_positions(200), dense=True)
        cache.append(0, torch.ones(1, 3, 200, 8), torch.ones(1, 3, 200, 6), step)
        cache.append(1, torch.ones(1, 200, 4), torch.ones(1, 200, 5), step)
        cache.commit(step)
    assert cache.read(0).k.sum() == 1000 * 3 * 8
    assert cache.read(1).latent.sum() == 1000 * 5


def test_nbytes_counts_the_file_and_its_spare_room():
    cache = layout().new(batch_size=2)
    advance(cache, 1000)
    store = cache.store(0)
    assert isinstance(store, OffloadedStore)
    assert store.cells.shape == (1500, 2 * 3 * (8 + 6))
    assert cache.nbytes == 1500 * 2 * 3 * 14 * 4 + sum(t.numel() * 8 for t in cache.cells.tensors())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_files_are_closed_with_the_cache():
    def files():
        links = (os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
        return sum("pluglm-cache-" in link for link in links)

    gc.collect()
    before = files()
    cache = layout((SLOT, SLOT)).new(batch_size=1)
    advance(cache, 300)
    twin = cache.fork()
    twin.select(torch.tensor([0, 0]))
    assert files() > before
    del cache, twin
    gc.collect()
    assert files() == before


def test_a_full_disk_is_told_before_anything_is_written(monkeypatch):
    cache = layout().new(batch_size=1)
    advance(cache, 64)

    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CacheError, match="could not grow") as caught:
            advance(cache, 100)
    assert "No space left" in caught.value.why
    assert "folder" in caught.value.fix
    assert cache.length == 64
    assert advance(cache, 100)[0].k[0, 0, :, 0].tolist() == [float(i) for i in range(164)]


def resident():
    """Bytes of private and of file-backed memory of this process: RssAnon and RssFile + RssShmem."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))


def grown_by(name: str) -> int:
    """Bytes of private memory that 4,096 tokens in a cache of this layout take."""
    slots = (KVSlot(4, 64, 64),) * 4
    before = resident()[0]
    cache = layout(slots, name).new(batch_size=1)
    for _ in range(64):
        advance(cache, 64)
    gc.collect()
    assert cache.nbytes >= 4096 * 4 * 4 * 128 * 4
    return resident()[0] - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_4096_tokens_take_no_private_memory():
    """`dynamic` takes it; what `offloaded` has resident belongs to a file and can be written back and dropped."""
    # Each in a process of its own: in one that has run other tests the allocator has memory to give already.
    code = f"import runpy; print(runpy.run_path({__file__!r})['grown_by'](%r))"
    grown = {
        name: int(
            subprocess.run([sys.executable, "-c", code % name], capture_output=True, text=True, check=True).stdout
        )
        for name in ("dynamic", "offloaded")
    }
    assert grown["dynamic"] > 24e6
    assert grown["offloaded"] < grown["dynamic"] / 4


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"options": (("folder", 3),)}, "is a text, not 3"),
        ({"options": (("folder", "/no/such/folder"),)}, "'/no/such/folder'"),
        ({"device": "cuda", "options": (("folder", "/tmp"),)}, "pinned"),
        ({"device": "meta"}, "not on 'meta'"),
    ],
)
def test_what_it_cannot_do_is_refused(changes, word):
    with pytest.raises(UnsupportedRequestError) as caught:
        layout(**changes)
    assert any(word in reason for reason in caught.value.reasons), caught.value.reasons


def test_without_reserved_space_a_file_is_refused(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    with pytest.raises(UnsupportedRequestError, match="posix_fallocate"):
        layout()


def test_rows_are_taken_some_cells_at_a_time(monkeypatch):
    monkeypatch.setattr("pluglm_caches.offloaded_store._AT_A_TIME", 7)
    cache, plain = layout().new(batch_size=3), layout(name="dynamic").new(batch_size=3)
    k, v = torch.randn(3, 3, 50, 8), torch.randn(3, 3, 50, 6)
    for each in (cache, plain):
        step = each.begin(each.next_positions(50), dense=True)
        each.append(0, k, v, step)
        each.commit(step)
        each.reorder(torch.tensor([2, 0, 0]))
        each.select(torch.tensor([1, 0]))
        each.repeat(2)
    for got, wanted in zip(cache.read(0).dense(), plain.read(0).dense(), strict=True):
        assert torch.equal(got, wanted)


def test_rows_of_a_cache_that_has_room_but_no_cells_are_taken():
    cache = layout().new(batch_size=2)
    cache.begin(cache.next_positions(3), dense=True)  # discarded: it made room and nothing counts
    cache.select(torch.tensor([1]))
    assert advance(cache, 2)[0].k[0, 0, :, 0].tolist() == [0.0, 1.0]


def test_gradients_flow_within_a_pass_and_are_cut_off_after_it():
    cache = layout().new(batch_size=1)
    k, v = torch.randn(1, 3, 4, 8, requires_grad=True), torch.randn(1, 3, 4, 6, requires_grad=True)
    for _ in range(3):
        k.grad = None
        step = cache.begin(cache.next_positions(4), dense=True)
        cache.append(0, k, v, step).k.sum().backward()
        cache.commit(step)
        assert torch.equal(k.grad, torch.ones_like(k))
        assert not cache.read(0).k.requires_grad


def test_a_mapping_is_of_the_size_that_is_asked_for():
    shelf, start = MappedShelf(""), torch.zeros(0, 5)
    first = shelf.resized(start, 3, 0)
    first.fill_(2.0)
    longer = shelf.resized(first, 3000, 3)
    assert longer.shape == (3000, 5)
    assert longer.sum() == 30
    first[1] = 7.0
    assert longer[1].tolist() == [7.0] * 5, "both map one file"
    assert longer.untyped_storage().nbytes() == 3000 * 5 * 4 > mmap.PAGESIZE


# Copies: everything above an accelerator, with streams whose copies come at once or as late as they may


class Prompt:
    """Copies happen as soon as they are given out, so a buffer that is still read would change too early."""

    def copy(self, act):
        act()

    def wait(self, mark):
        pass

    def finish(self):
        pass


class Late:
    """Copies happen when somebody waits for them, in order; what is read before holds something else."""

    def __init__(self):
        self.waiting, self.given, self.done = [], 0, 0

    def copy(self, act):
        self.waiting.append(act)
        self.given += 1
        return self.given

    def wait(self, mark):
        while self.done < mark:
            self.waiting.pop(0)()
            self.done += 1

    def finish(self):
        self.wait(self.given)


class Staged(Offloaded):
    """The layout as on an accelerator, with ordinary memory for its buffers."""

    streams_type = Late

    def shelf(self):
        return PinnedShelf(pinned=False)

    def copies(self):
        return self.streams_type()


class StagedPromptly(Staged):
    streams_type = Prompt


class Provider:
    def __init__(self, layout):
        self.layout = layout

    def pluglm_build_cache(self, request):
        return self.layout("offloaded", request)


class TestStagedLate(CacheContract):
    provider = Provider(Staged)
    facts = provider_facts("pluglm_caches", "cache", "offloaded")
    max_examples = 6
    phases = (Phase.generate,)


class TestStagedPromptly(TestStagedLate):
    provider = Provider(StagedPromptly)


@pytest.mark.parametrize("kind", [Staged, StagedPromptly])
def test_while_a_layer_computes_the_next_one_arrives_in_the_other_buffer(kind):
    cache = kind("offloaded", request((SLOT,) * 5)).new(batch_size=1)
    for _ in range(4):
        advance(cache, 6)
    assert isinstance(cache, OffloadedCache)
    step = cache.begin(cache.next_positions(1), dense=True)
    new = torch.full((1, 3, 1, 8), 24.0), torch.full((1, 3, 1, 6), 24.0)
    before = None
    for slot in range(5):
        view = cache.append(slot, *new, step)
        if slot < 4:
            assert cache.staging.held(slot + 1, 42, step) is not None, "the next slot has not set out"
        assert view.k[0, 1, :, 3].tolist() == [float(i) for i in range(25)]
        if before is not None:  # its layer has computed, its buffer is not yet given to another
            assert before.untyped_storage().data_ptr() != view.k.untyped_storage().data_ptr()
        before = view.k
    cache.commit(step)
    assert len({t.untyped_storage().data_ptr() for t in cache.staging.tensors()}) == 2
    assert cache.nbytes > sum(store.cells.numel() * 4 for store in cache._moved)


@pytest.mark.parametrize("kind", [Staged, StagedPromptly])
def test_a_shared_slot_keeps_its_buffer_until_the_last_layer(kind):
    slots = (SLOT, SLOT, SLOT, SLOT, SharedSlot(0))
    cache = kind("offloaded", request(slots)).new(batch_size=1)
    for _ in range(3):
        first = advance(cache, 6)[0]
    assert first.k[0, 0, :, 0].tolist() == [float(i) for i in range(18)]
    step = cache.begin(cache.next_positions(1), dense=True)
    views = [cache.append(i, torch.ones(1, 3, 1, 8) * i, torch.ones(1, 3, 1, 6), step) for i in range(4)]
    shared = cache.read(4, step)
    assert shared.k.untyped_storage().data_ptr() == views[0].k.untyped_storage().data_ptr()
    assert shared.k[0, 0, -1, 0] == 0.0
    again = cache.read(1, step)  # its buffer belongs to slot 3 by now
    assert again.k[0, 0, -1, 0] == 1.0


def test_gradients_are_refused_where_buffers_are_used_again():
    cache = Staged("offloaded", request()).new(batch_size=1)
    step = cache.begin(cache.next_positions(1), dense=True)
    with pytest.raises(InputError, match="gradients"):
        cache.append(0, torch.ones(1, 3, 1, 8, requires_grad=True), torch.ones(1, 3, 1, 6), step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_gives_back_what_was_appended_from_pinned_memory():
    slots = (KVSlot(4, 64, 64),) * 6
    cache = layout(slots, device="cuda").new(batch_size=2)
    plain = layout(slots, "dynamic", device="cuda").new(batch_size=2)
    generator = torch.Generator("cuda").manual_seed(0)
    for count in (100, 1, 1, 700, 1, 1, 1):
        steps = [each.begin(each.next_positions(count), dense=True) for each in (cache, plain)]
        for slot in range(6):
            k, v = (torch.randn(2, 4, count, 64, device="cuda", generator=generator) for _ in "kv")
            got, wanted = (each.append(slot, k, v, step) for each, step in zip((cache, plain), steps, strict=True))
            assert torch.equal(got.k, wanted.k)
            assert torch.equal(got.v, wanted.v)
        for each, step in zip((cache, plain), steps, strict=True):
            each.commit(step)
    assert cache.store(0).cells.is_pinned()
    assert cache.store(0).cells.device.type == "cpu"
    twin = cache.fork()
    twin.rollback(5)
    twin.select(torch.tensor([1]))
    assert torch.equal(twin.read(3).k, plain.read(3).k[1:, :, :-5])
