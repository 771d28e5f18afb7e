"""What is special about layouts that drop keys: constant memory, views cut to size, and how far one can go back."""

import pluglm_caches
import pytest
import torch
from pluglm_caches.windows import WindowStore

from pluglm.contracts import CacheRequest, KVSlot
from pluglm.errors import CacheError, UnsupportedRequestError

WINDOW, CHUNK, FULL = KVSlot(2, 4, 6, window=16), KVSlot(2, 4, 6, chunk=16), KVSlot(2, 4, 6)


def layout(name="hybrid", slots=(WINDOW,), **request):
    provider = getattr(pluglm_caches, name)
    return provider.pluglm_build_cache(
        CacheRequest(**{"slots": slots, "views": ("dense",), "device": "cpu", "dtype": "float32", **request})
    )


def advance(cache, count=1, *, positions=None, **begin):
    """One pass; keys and values are the positions themselves, so a view tells what it holds. Returns the views."""
    dense = cache.dense and positions is None
    positions = cache.next_positions(count) if positions is None else positions
    step = cache.begin(positions, dense=dense, **begin)
    given = positions.expand(cache.batch_size, -1).float()[:, None, :, None]
    k, v = (given.expand(-1, 2, -1, size).contiguous() for size in (4, 6))
    views = [(cache.append(i, k, v, step), step.keys(i)) for i in range(len(cache.slots))]
    cache.commit(step)
    return views


def held(view):
    return view.dense()[0][0, 0, :, 0].int().tolist()


@pytest.mark.parametrize(("name", "slot"), [("sliding", WINDOW), ("chunked", CHUNK)])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_4096_tokens_take_the_memory_of_a_few_hundred(name, slot, ragged):
    cache = layout(name, (slot, slot)).new(batch_size=2)
    if ragged:
        advance(cache, positions=torch.tensor([[-1, -1, 0], [0, 1, 2]]))
    sizes = set()
    for token in range(4096):
        advance(cache)
        if token >= 300:
            sizes.add(cache.nbytes)
    assert len(sizes) == 1
    store = cache.store(0)
    assert isinstance(store, WindowStore)
    assert store.two.shape[2] <= store.size == (16 + 64) * 3 // 2  # window and slack, and half as much to spare
    # Two layers of keys and values, and books of the same length: a ramp, or positions, and at most half as much again.
    assert sizes.pop() <= 2 * 2 * 2 * 120 * 10 * 4 + 3 * 120 * 8 * 2


def test_a_view_of_dense_cells_is_cut_to_what_is_read_and_says_where_it_starts():
    cache = layout(slots=(WINDOW, CHUNK, FULL)).new(batch_size=1)
    advance(cache, 40)
    (window, at), (chunk, begun), (full, zero) = advance(cache, 3)
    assert held(window) == list(range(25, 43))  # the query at 40 sees 25 … 40
    assert held(chunk) == list(range(32, 43))
    assert held(full) == list(range(43))
    assert [(keys.start, keys.dense, keys.length) for keys in (at, begun, zero)] == [
        (25, False, 18), (32, False, 11), (0, True, 43),
    ]  # fmt: skip


def test_equal_windows_share_one_description_of_their_keys():
    cache = layout(slots=(WINDOW, WINDOW, FULL)).new(batch_size=1)
    step = cache.begin(cache.next_positions(30), dense=True)
    assert step.keys(0) is step.keys(1)
    assert step.keys(2) is step.keys(0)  # nothing dropped yet: everything is seen from cell 0 on


def test_a_long_prompt_takes_room_only_while_it_is_read():
    cache = layout("sliding").new(batch_size=1)
    ((view, _),) = advance(cache, 1000)
    assert held(view) == list(range(1000))
    assert cache.store(0).two.shape[2] == cache.store(0).size == 120
    ((view, _),) = advance(cache)
    assert held(view) == list(range(985, 1001))


def test_as_many_cells_as_the_slack_can_always_be_taken_back():
    cache = layout("sliding", options=(("slack", 8),)).new(batch_size=1)
    for length in range(1, 400):
        advance(cache)
        fork = cache.fork()
        fork.rollback(min(8, length))
        ((view, _),) = advance(fork)
        last = max(0, length - 8)
        assert held(view) == list(range(max(0, last - 15), last + 1))


def test_beyond_the_slack_going_back_is_refused_and_nothing_is_lost():
    cache = layout("sliding", options=(("slack", 0),)).new(batch_size=1)
    for _ in range(300):
        advance(cache)
    for act in (lambda: cache.rollback(200), lambda: cache.crop(10), lambda: cache.rollback(torch.tensor([200]))):
        with pytest.raises(CacheError) as caught:
            act()
        assert "slots [0]" in caught.value.why
        assert "slack" in caught.value.fix
    assert cache.length == 300
    assert held(advance(cache)[0][0]) == list(range(285, 301))


def test_holes_within_the_window_do_not_push_out_what_is_still_seen():
    """Two rows take back different numbers of tokens again and again, so that their cells are mostly holes."""
    cache = layout("sliding", options=(("slack", 4),)).new(batch_size=2)
    advance(cache, 20)
    for _ in range(100):
        advance(cache, 4)
        cache.rollback(torch.tensor([0, 3]))
    ((view, keys),) = advance(cache)
    positions, k = keys.positions, view.k[:, 0, :, 0]
    for row in range(2):
        last = int(positions[row].max())
        seen = (positions[row] >= 0) & (last - positions[row] < 16)
        assert sorted(positions[row][seen].tolist()) == list(range(last - 15, last + 1))
        assert torch.equal(k[row][seen].long(), positions[row][seen])


def test_nothing_is_dropped_from_packed_sequences_whose_positions_go_back():
    cache = layout("sliding").new(batch_size=1)
    first, second = torch.arange(200), torch.arange(3)
    segments = torch.cat((torch.zeros(200, dtype=torch.int64), torch.ones(3, dtype=torch.int64)))[None]
    advance(cache, positions=torch.cat((first, second))[None], segments=segments)
    for _ in range(300):
        ((_, keys),) = advance(cache, positions=torch.tensor([[3]]), segments=torch.tensor([[1]]))
    assert keys.length == 503


def test_windows_survive_files_and_a_dynamic_file_can_be_read(tmp_path):
    sliding, dynamic = layout("sliding").new(batch_size=2), layout("dynamic").new(batch_size=2)
    for cache in (sliding, dynamic):
        advance(cache, 300)
        cache.save(tmp_path / cache.layout, fingerprint="m")
    for name in ("sliding", "dynamic"):
        other = layout("sliding").new(batch_size=1)
        other.load(tmp_path / name, fingerprint="m")
        assert held(advance(other)[0][0]) == list(range(285, 301))
    with pytest.raises(CacheError, match="needs more of them"):
        layout("dynamic").new(batch_size=2).load(tmp_path / "sliding", fingerprint="m")


@pytest.mark.parametrize(
    ("name", "slot", "word"),
    [("sliding", FULL, "'kv'"), ("sliding", CHUNK, "'chunk'"), ("chunked", WINDOW, "'window'")],
)
def test_a_bounded_layout_refuses_layers_that_are_not(name, slot, word):
    with pytest.raises(UnsupportedRequestError) as caught:
        layout(name, (slot,))
    assert any(word in reason for reason in caught.value.reasons)


@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
def test_slack_is_a_whole_number(value):
    with pytest.raises(UnsupportedRequestError, match="slack is a whole number from 0 on"):
        layout(options=(("slack", value),))
