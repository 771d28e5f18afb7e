"""What is special about the dense layouts: growth, costs, errors, sharing, files, gradients."""

import json
from pathlib import Path

import pluglm_caches
import pytest
import torch
from pluglm_caches import stores, tokens
from pluglm_caches.tuples import from_tuples, to_tuples

from pluglm.contracts import CacheRequest, CrossSlot, KVSlot, LatentSlot, SharedSlot, StateSlot
from pluglm.errors import CacheError, ContextLengthError, InputError, SaveError, UnsupportedRequestError

KV = KVSlot(3, 8, 6)


def layout(name="dynamic", slots=(KV,), **request):
    provider = getattr(pluglm_caches, name)
    return provider.pluglm_build_cache(
        CacheRequest(**{"slots": slots, "views": ("dense",), "device": "cpu", "dtype": "float32", **request})
    )


def fill(cache, count, **begin):
    """One dense pass of `count` tokens through every kv slot; returns k and v."""
    B = cache.batch_size
    step = cache.begin(cache.next_positions(count), **{"dense": cache.dense, **begin})
    k, v = torch.randn(B, 3, count, 8), torch.randn(B, 3, count, 6)
    views = [cache.append(i, k, v, step) for i, slot in enumerate(cache.slots) if isinstance(slot, KVSlot)]
    cache.commit(step)
    return k, v, views


def test_4096_tokens_one_by_one_copy_each_cell_a_bounded_number_of_times(monkeypatch):
    copied = []
    right = stores.resized

    def counting(old, axis, size, held):
        copied.append(held)
        return right(old, axis, size, held)

    monkeypatch.setattr(tokens, "resized", counting)
    cache = layout().new(batch_size=1)
    addresses = set()
    for _ in range(4096):
        addresses.add(fill(cache, 1)[2][0].k.data_ptr())
    assert cache.length == 4096
    assert len(copied) <= 2 * 12  # k and v, at most log1.5(4096 / 64) + 1 times each
    assert sum(copied) / 2 <= 3 * 4096  # 1 + 1/1.5 + 1/1.5² + … = 3
    assert len(addresses) <= 12


def test_appending_allocates_nothing_that_grows_with_the_history():
    cache = layout().new(batch_size=1)
    fill(cache, 1000)
    before = cache.nbytes
    for _ in range(100):
        fill(cache, 1)
    assert cache.nbytes == before


def test_a_capacity_hint_keeps_a_dynamic_cache_from_spare_room_beyond_it():
    cache = layout().new(batch_size=1, capacity=300)
    fill(cache, 250)
    cells = cache.cells.room
    assert cells == 300
    fill(cache, 100)
    assert cache.length == 350


def test_a_static_cache_keeps_its_addresses_through_every_operation_on_the_same_rows(tmp_path):
    cache = layout("static").new(batch_size=2, capacity=32)
    address = fill(cache, 5)[2][0].k.data_ptr()
    cache.reorder(torch.tensor([1, 1]))
    cache.rollback(torch.tensor([1, 2]))
    cache.save(tmp_path / "c", fingerprint="m")
    cache.load(tmp_path / "c", fingerprint="m")
    cache.reset()
    assert fill(cache, 3)[2][0].k.data_ptr() == address


def test_a_static_cache_without_a_capacity_says_what_to_write():
    with pytest.raises(InputError, match=r"must be told its capacity(.|\n)*capacity=prompt") as caught:
        layout("static").new(batch_size=1)
    assert caught.value.argument == "capacity"


@pytest.mark.parametrize("name", ["dynamic", "static", "paged", "offloaded", "quantized"])
@pytest.mark.parametrize("said", [{"batch_size": "x"}, {"batch_size": 0}, {"batch_size": True}, {"capacity": 0.5}])
def test_sizes_that_are_none_are_refused(name, said):
    with pytest.raises(InputError, match=r"at least one (row|cell)(.|\n)*as an integer") as caught:
        layout(name).new(**{"batch_size": 1, "capacity": 8, **said})
    assert caught.value.argument == next(iter(said))


def test_a_pass_beyond_the_capacity_names_the_numbers_and_the_remedy():
    cache = layout("static").new(batch_size=1, capacity=8)
    fill(cache, 6)
    with pytest.raises(
        ContextLengthError, match=r"room for 8 cells, and 9 are needed(.|\n)*6 are taken(.|\n)*capacity=9"
    ) as caught:
        cache.begin(cache.next_positions(3), dense=True)
    assert (caught.value.tokens, caught.value.limit, cache.length) == (9, 8, 6)


@pytest.mark.parametrize("wrong", ("heads", "tokens", "dtype"))
def test_a_tensor_that_would_be_broadcast_or_cast_is_refused_before_anything_is_written(wrong):
    cache = layout().new(batch_size=2)
    step = cache.begin(cache.next_positions(4), dense=True)
    good = torch.randn(2, 3, 4, 8)
    v = {
        "heads": torch.randn(2, 1, 4, 6),
        "tokens": torch.randn(2, 3, 1, 6),
        "dtype": torch.randn(2, 3, 4, 6).double(),
    }[wrong]
    with pytest.raises(InputError, match="does not fit the cache"):
        cache.append(0, good, v, step)
    assert not cache.read(0, step).k.any()


def test_a_step_that_was_discarded_or_committed_is_refused():
    cache = layout().new(batch_size=1)
    old = cache.begin(cache.next_positions(1), dense=True)
    new = cache.begin(cache.next_positions(1), dense=True)
    with pytest.raises(CacheError, match="commit was called with a step that is not under way"):
        cache.commit(old)
    cache.commit(new)
    with pytest.raises(CacheError, match="not under way"):
        cache.commit(new)
    with pytest.raises(CacheError, match="append was called"):
        cache.append(0, torch.randn(1, 3, 1, 8), torch.randn(1, 3, 1, 6), new)


@pytest.mark.parametrize(
    ("operate", "says"),
    (
        (lambda c: c.crop(6), "the cache holds 5 cells"),
        (lambda c: c.rollback(-1), "makes no sense"),
        (lambda c: c.rollback(torch.tensor([1])), "5 cells in each of 2 rows"),
        (lambda c: c.reorder(torch.tensor([0])), "Use `select`"),
        (lambda c: c.select(torch.tensor([2])), "cache with 2"),
        (lambda c: c.repeat(0), "once or more"),
        (lambda c: c.begin(torch.zeros(3, 1, dtype=torch.int64)), r"they must be \[2, T\]"),
        (lambda c: c.set_cross(0, None, None, None), "not a cross slot"),
        (lambda c: c.state(0), "not a state slot"),
    ),
)
def test_a_senseless_argument_changes_nothing_and_is_named(operate, says):
    cache = layout().new(batch_size=2)
    fill(cache, 5)
    with pytest.raises(InputError, match=says):
        operate(cache)
    assert (cache.length, cache.batch_size) == (5, 2)


def test_a_recurrent_state_takes_no_token_back_and_the_error_says_why():
    made = layout(slots=(KV, StateSlot((("h", (4,), None),))))
    assert not {"crop", "rollback"} & made.operations
    cache = made.new(batch_size=1)
    fill(cache, 3)
    with pytest.raises(CacheError, match=r"cannot crop(.|\n)*recurrent states(.|\n)*Fork"):
        cache.crop(2)
    cache.crop(3)
    cache.rollback(0)
    with pytest.raises(UnsupportedRequestError, match="crop, rollback"):
        layout(slots=made.slots, operations=("crop", "rollback", "fork"))


def test_a_shared_slot_reads_what_its_source_holds():
    cache = layout(slots=(KV, SharedSlot(0))).new(batch_size=1)
    step = cache.begin(cache.next_positions(2), dense=True)
    k, v = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 6)
    cache.append(0, k, v, step)
    assert torch.equal(cache.read(1, step).k, k)
    assert step.keys(1) is step.keys(0)
    with pytest.raises(InputError, match="Use `read` for a shared slot"):
        cache.append(1, k, v, step)
    with pytest.raises(UnsupportedRequestError, match="slot 0 shares slot 1, which keeps no keys"):
        layout(slots=(SharedSlot(1), SharedSlot(0)))


def test_every_reason_for_a_refusal_is_given_at_once():
    with pytest.raises(UnsupportedRequestError) as caught:
        layout(views=("paged",), dtype="int8", variant="x", options=(("a", 1), ("b", 2)))
    assert len(caught.value.reasons) == 5


def test_a_dense_pass_costs_no_position_tensor_and_a_padded_one_brings_it():
    cache = layout().new(batch_size=2)
    fill(cache, 4)
    assert cache.dense
    assert cache.cells.positions is None
    step = cache.begin(torch.tensor([[4], [-1]]))
    assert not step.keys(0).dense
    assert step.keys(0).positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, -1]]
    assert cache.dense  # not committed
    cache.commit(step)
    assert not cache.dense
    assert cache.next_positions(2).tolist() == [[5, 6], [4, 5]]
    cache.crop(4)
    assert cache.dense


def test_a_cache_filled_in_inference_mode_goes_on_outside_it():
    cache = layout().new(batch_size=1)
    with torch.inference_mode():
        k1, _, _ = fill(cache, 70)
        cache.repeat(2)
        cache.rollback(torch.tensor([0, 1]))
    k2, _, views = fill(cache, 60)
    assert torch.equal(views[0].k[:, :, 70:], k2)
    assert torch.equal(views[0].k[0, :, :70], k1[0])


def test_gradients_flow_within_a_pass_and_not_across_passes():
    cache = layout().new(batch_size=1)
    first = torch.randn(1, 3, 2, 8, requires_grad=True)
    second = torch.randn(1, 3, 1, 8, requires_grad=True)
    for k in (first, second):
        step = cache.begin(cache.next_positions(k.shape[2]), dense=True)
        view = cache.append(0, k, torch.zeros(1, 3, k.shape[2], 6), step)
        cache.commit(step)
        view.k.sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first))
    assert torch.equal(second.grad, torch.ones_like(second))
    assert not cache.read(0).k.requires_grad


@pytest.mark.parametrize("names", (("dynamic", "static"), ("static", "dynamic")))
def test_a_saved_cache_loads_into_the_other_layout(names, tmp_path):
    slots = (KV, KVSlot(2, 4, 4, window=3), LatentSlot(5, 2), StateSlot((("h", (4,), "float64"),)), CrossSlot(1, 4, 4))
    writer, reader = (layout(name, slots).new(batch_size=2, capacity=16) for name in names)
    step = writer.begin(
        torch.tensor([[-1, 0, 1], [0, 1, 2]]),
        segments=torch.tensor([[0, 0, 0], [0, 1, 1]]),
        prefix_lengths=torch.tensor([1, 2]),
    )
    writer.append(0, torch.randn(2, 3, 3, 8), torch.randn(2, 3, 3, 6), step)
    writer.append(1, torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4), step)
    writer.append(2, torch.randn(2, 3, 2), torch.randn(2, 3, 5), step)
    writer.state(3)["h"].add_(1)
    writer.set_cross(4, torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 4), torch.arange(5).repeat(2, 1))
    writer.commit(step)
    writer.save(tmp_path / "cache.safetensors", fingerprint="m")
    reader.load(tmp_path / "cache.safetensors", fingerprint="m")
    for slot in range(3):
        for a, b in zip(writer.read(slot).dense(), reader.read(slot).dense(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(reader.state(3)["h"], torch.ones(2, 4, dtype=torch.float64))
    assert torch.equal(reader.cross(4)[0].k, writer.cross(4)[0].k)
    step = reader.begin(torch.tensor([[2], [3]]), segments=torch.tensor([[0], [1]]))
    assert step.keys(0).positions.tolist() == [[-1, 0, 1, 2], [0, 1, 2, 3]]
    assert step.keys(0).segments.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert step.keys(0).prefix_lengths.tolist() == [1, 2]
    with pytest.raises(InputError, match="This pass has no segments"):
        reader.begin(torch.tensor([[2], [3]]))
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


def test_a_saved_cache_too_long_for_a_static_one_is_refused_before_anything_changes(tmp_path):
    writer, reader = layout().new(batch_size=1), layout("static").new(batch_size=1, capacity=4)
    fill(writer, 5)
    k, _, _ = fill(reader, 2)
    writer.save(tmp_path / "c", fingerprint="m")
    with pytest.raises(ContextLengthError, match="room for 4 cells, and 5 are needed"):
        reader.load(tmp_path / "c", fingerprint="m")
    assert torch.equal(reader.read(0).k, k)


def test_a_saved_cache_of_another_dtype_or_with_tampered_books_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    cache = layout().new(batch_size=1)
    fill(cache, 3)
    path = tmp_path / "c"
    cache.save(path, fingerprint="m")
    with pytest.raises(CacheError, match="dtype of the saved one"):
        layout(dtype="float16").new(batch_size=1).load(path, fingerprint="m")
    head = path.read_bytes()
    metadata = json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])["__metadata__"]
    for change, says in (
        ({"length": "4", "dense_length": "4"}, "slot 0: it holds 3 of 4 cells"),
        ({"rows": "0"}, "make no sense"),
        ({"length": "x"}, "damaged"),
        ({"dense_length": "2"}, "contradict"),
    ):
        save_file(load_file(path), tmp_path / "bad", {**metadata, **change})
        with pytest.raises(CacheError, match=says):
            cache.load(tmp_path / "bad", fingerprint="m")
    assert cache.length == 3


def test_a_save_that_fails_midway_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    cache = layout().new(batch_size=1)
    fill(cache, 3)
    cache.save(tmp_path / "c", fingerprint="m")
    before = (tmp_path / "c").read_bytes()

    def full(path, tensors, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("pluglm_caches.saving._write", full)
    with pytest.raises(SaveError, match="no space left"):
        cache.save(tmp_path / "c", fingerprint="m")
    assert (tmp_path / "c").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("dtype", ("float64", "float32", "float16", "bfloat16"))
def test_a_saved_file_is_read_by_safetensors_and_by_us_in_every_dtype(dtype, tmp_path):
    from safetensors.torch import load_file

    cache = layout(dtype=dtype).new(batch_size=2)
    cache.save(tmp_path / "empty", fingerprint="m")
    step = cache.begin(torch.tensor([[0, 1, 2], [-1, 0, 1]]))
    k, v = torch.randn(2, 3, 3, 8).to(cache.read(0).k.dtype), torch.randn(2, 3, 3, 6).to(cache.read(0).k.dtype)
    cache.append(0, k, v, step)
    cache.commit(step)
    cache.save(tmp_path / "c", fingerprint="m")
    found = load_file(tmp_path / "c")
    assert torch.equal(found["slots.0.k"], k)
    assert torch.equal(found["slots.0.v"], v)
    assert found["positions"].tolist() == [[0, 1, 2], [-1, 0, 1]]
    cache.load(tmp_path / "empty", fingerprint="m")
    assert (cache.length, cache.dense) == (0, True)
    cache.load(tmp_path / "c", fingerprint="m")
    assert torch.equal(cache.read(0).v, v)


def test_pairs_of_keys_and_values_become_a_cache_and_come_back():
    pairs = [(torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 6)) for _ in range(2)]
    for name in ("dynamic", "static"):
        cache = from_tuples(layout(name, (KV, KV)), pairs, capacity=9)
        assert cache.length == 5
        assert cache.dense
        for pair, wanted in zip(to_tuples(cache), pairs, strict=True):
            assert torch.equal(pair[0], wanted[0])
            assert torch.equal(pair[1], wanted[1])
    padded = from_tuples(layout(slots=(KV, KV)), pairs, positions=torch.tensor([[-1, 0, 1, 2, 3], [0, 1, 2, 3, 4]]))
    assert padded.next_positions(1).tolist() == [[4], [5]]
    with pytest.raises(InputError, match="1 pairs of keys and values are not a cache"):
        from_tuples(layout(slots=(KV, KV)), pairs[:1])
    with pytest.raises(InputError, match="slot 1: shared"):
        to_tuples(layout(slots=(KV, SharedSlot(0))).new(batch_size=1))
