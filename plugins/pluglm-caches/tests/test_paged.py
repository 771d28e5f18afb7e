"""What is special about pages: who shares which, when one is copied, when it is given back, and how it is found again."""

import contextlib
import gc
import itertools
import random
from collections import Counter

import pluglm_caches
import pytest
import torch
from hypothesis import Phase

from pluglm.contracts import CacheRequest, CrossSlot, KVSlot, LatentSlot, SharedSlot, StateSlot
from pluglm.errors import CacheError, InputError, UnsupportedRequestError
from pluglm.testing.cache import CacheContract, provider_facts

FULL, WINDOW, CHUNK = KVSlot(2, 4, 6), KVSlot(2, 4, 6, window=6), KVSlot(2, 4, 6, chunk=8)
SALT = b"tenant"


class TestPaged(CacheContract):
    provider = pluglm_caches.paged
    facts = provider_facts("pluglm_caches", "cache", "paged")
    bounded = True
    max_examples = 6
    phases = (Phase.generate,)


class TestPagedGathered(TestPaged):
    """For a backend that reads no pages; and with pages so small that every operation crosses some."""

    def build(self, slots, **request):
        options = (*request.pop("options", ()), ("page_size", 3), ("slack", 0))
        return super().build(slots, **{"views": ("dense",), "options": options, **request})


class TestPagedTightly(TestPaged):
    """With pages of two cells and no slack."""

    def build(self, slots, **request):
        options = (*request.pop("options", ()), ("page_size", 2), ("slack", 0))
        return super().build(slots, options=options, **request)


def layout(slots=(FULL,), *, page_size=4, views=("paged",), **options):
    options = (("page_size", page_size), *options.items())
    return pluglm_caches.paged.pluglm_build_cache(CacheRequest(slots, views, "cpu", "float32", options=options))


def advance(cache, count=1, *, tokens=None, **begin):
    """One dense pass in which a cell's keys and values are its token; by default its position. Returns the views."""
    step = cache.begin(cache.next_positions(count), dense=cache.dense, **begin)
    given = torch.as_tensor(cache.next_positions(count) if tokens is None else tokens)
    given = given.expand(cache.batch_size, -1).float()[:, None, :, None]
    k, v = (given.expand(-1, 2, -1, size).contiguous() for size in (4, 6))
    keyed = [i for i, slot in enumerate(cache.slots) if isinstance(slot, KVSlot)]
    views = [(cache.append(i, k, v, step), step.keys(i)) for i in keyed]
    cache.commit(step)
    return views


def held(view, row=0):
    return view.dense()[0][row, 0, :, 0].int().tolist()


def pool_of(made):
    (pool,) = made.pools.values()
    return pool


def used(made):
    return sum(pool.num_pages - pool.num_free for pool in made.pools.values())


# Pages and their owners


def test_a_view_names_pages_and_hands_out_no_copy_of_the_history():
    made = layout((FULL, FULL))
    cache = made.new(batch_size=2)
    advance(cache, 10)
    (first, keys), (second, _) = advance(cache)
    pool = pool_of(made)
    assert (first.kind, first.length, keys.length) == ("paged", 11, 11)
    assert first.k_pages.data_ptr() == pool.k[0].data_ptr()
    assert second.v_pages.data_ptr() == pool.v[1].data_ptr()
    assert first.block_table is second.block_table
    assert first.block_table.dtype is torch.int32
    assert first.block_table.shape == (2, 3)
    assert first.lengths.tolist() == [11, 11]
    assert held(first) == list(range(11))


def test_repeated_rows_share_pages_and_copy_only_the_begun_one_when_they_write():
    made = layout()
    cache = made.new(batch_size=1)
    advance(cache, 10)  # two full pages and a begun one
    cache.repeat(3)
    assert (used(made), pool_of(made).num_copied) == (3, 0)
    advance(cache, tokens=[[100], [200], [300]])
    assert (used(made), pool_of(made).num_copied) == (5, 2)  # the last of three owners writes in place
    view = cache.read(0)
    assert [held(view, row) for row in range(3)] == [[*range(10), token] for token in (100, 200, 300)]
    advance(cache, 5)
    assert pool_of(made).num_copied == 2


def test_a_fork_copies_a_page_on_the_side_that_writes_first_and_only_there():
    made = layout((FULL, FULL))
    cache = made.new(batch_size=1)
    advance(cache, 6)
    twin = cache.fork()
    assert used(made) == 2
    advance(twin, tokens=[[100]])
    advance(cache, tokens=[[200]])
    assert pool_of(made).num_copied == 1
    assert used(made) == 3
    assert held(twin.read(1)) == [*range(6), 100]
    assert held(cache.read(1)) == [*range(6), 200]


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    made = layout()
    cache = made.new(batch_size=2)
    advance(cache, 8)
    twin = cache.fork()
    advance(cache, 3)
    advance(twin, 3)
    assert pool_of(made).num_copied == 0
    assert used(made) == 2 * (2 + 2)


def test_beam_search_copies_at_most_a_page_a_row_and_step():
    made = layout((FULL, WINDOW))
    cache = made.new(batch_size=4)
    rows = [[] for _ in range(4)]
    draw = random.Random(0)
    for step in range(40):
        tokens = [[step * 10 + row] for row in range(4)]
        advance(cache, tokens=tokens)
        rows = [row + token for row, token in zip(rows, tokens, strict=True)]
        index = [draw.randrange(4) for _ in range(4)]
        cache.reorder(torch.tensor(index))
        rows = [rows[i] for i in index]
        assert [held(cache.read(0), row) for row in range(4)] == rows
    assert all(pool.num_copied <= 4 * 40 for pool in made.pools.values())


def test_a_crop_into_a_shared_page_copies_it_before_it_is_written():
    made = layout()
    cache = made.new(batch_size=1)
    advance(cache, 12)
    twin = cache.fork()
    cache.crop(5)
    advance(cache, 2, tokens=[[70, 71]])
    assert held(cache.read(0)) == [0, 1, 2, 3, 4, 70, 71]
    assert held(twin.read(0)) == list(range(12))
    assert pool_of(made).num_copied == 1


def test_a_pass_that_is_discarded_leaves_the_twin_alone():
    cache = layout().new(batch_size=1)
    advance(cache, 6)
    twin = cache.fork()
    step = cache.begin(cache.next_positions(1), dense=True)
    cache.append(0, torch.full((1, 2, 1, 4), 9.0), torch.full((1, 2, 1, 6), 9.0), step)
    assert held(advance(twin)[0][0]) == list(range(7))
    assert held(cache.read(0)) == list(range(6))


def test_the_pool_grows_by_half_and_reuses_what_was_given_back():
    made = layout()
    cache = made.new(batch_size=1)
    sizes = []
    for _ in range(1024):
        advance(cache)
        if pool_of(made).num_pages not in sizes:
            sizes.append(pool_of(made).num_pages)
    assert all(after >= before * 3 // 2 for before, after in itertools.pairwise(sizes))
    cache.reset()
    pages = pool_of(made).num_pages
    assert pool_of(made).num_free == pages
    other = made.new(batch_size=1)
    advance(other, 1024)
    assert pool_of(made).num_pages == pages


@pytest.mark.parametrize("seed", range(4))
def test_after_random_operations_every_page_comes_back_when_the_caches_are_gone(seed):
    made = layout((FULL, WINDOW, CHUNK), page_size=3, slack=4, shared_pages=0)
    draw = random.Random(seed)
    caches = [made.new(batch_size=2)]
    for _ in range(120):
        cache = draw.choice(caches)
        act = draw.randrange(8)
        if act == 0:
            caches.append(cache.fork())
        elif act == 1:
            cache.select(torch.tensor([draw.randrange(cache.batch_size) for _ in range(draw.randint(1, 4))]))
        elif act == 2:
            with contextlib.suppress(CacheError):  # beyond the slack
                cache.rollback(min(cache.length, draw.randint(0, 4)))
        elif act == 3:
            with contextlib.suppress(CacheError):
                cache.rollback(torch.tensor([draw.randint(0, min(2, cache.length)) for _ in range(cache.batch_size)]))
        elif act == 4 and len(caches) > 1:
            caches.remove(cache)
            cache = caches[0]
        elif act == 5 and draw.random() < 0.2:
            cache.reset()
        else:
            advance(cache, draw.randint(1, 7))
        for pool in made.pools.values():
            assert pool.num_free == pool.owners.count(0)
            owned = Counter(p for c in caches for t in c.tables if t.pool is pool for row in t.rows for p in row)
            assert [owned[page] for page in range(pool.num_pages)] == pool.owners
    assert used(made) > 0
    del cache
    caches.clear()
    gc.collect()
    for pool in made.pools.values():
        assert pool.num_free == pool.num_pages
        assert set(pool.owners) == {0}


def test_a_cache_that_becomes_garbage_while_pages_are_taken_does_not_disturb_it():
    made = layout()
    cache, other = made.new(batch_size=1), made.new(batch_size=1)
    advance(cache, 8)
    pool, cycle = pool_of(made), [cache]
    cycle.append(cycle)
    del cache, cycle
    right = pool._free

    class Collecting(list):
        def pop(self, *at):
            gc.collect()
            return list.pop(self, *at)

    pool._free = Collecting(right)
    advance(other, 12)
    pages = other.tables[0].rows[0]
    assert len(set(pages)) == len(pages)
    assert pool.num_free + len(pages) == pool.num_pages


# Windows and chunks


@pytest.mark.parametrize("slot", [WINDOW, CHUNK], ids=["window", "chunk"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_pages_out_of_reach_are_given_back(slot, ragged):
    made = layout((slot, FULL), slack=0)
    cache = made.new(batch_size=2)
    if ragged:
        step = cache.begin(torch.tensor([[-1, -1, 0], [0, 1, 2]]))
        k, v = torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 6)
        for i in range(2):
            cache.append(i, k, v, step)
        cache.commit(step)
    for _ in range(200):
        advance(cache)
    near, far = (table for table in cache.tables)
    assert len(near.rows[0]) <= 4
    assert len(far.rows[0]) == -(-cache.length // 4)


def test_a_long_prompt_gives_its_pages_back_when_it_was_read():
    made = layout((WINDOW,), slack=0)
    cache = made.new(batch_size=1)
    ((view, _),) = advance(cache, 400)
    assert held(view) == list(range(400))
    assert used(made) <= 3
    ((view, keys),) = advance(cache)
    assert keys.start == 392  # the page with the first key that is read, 395
    assert held(view) == list(range(392, 401))


def test_beyond_the_slack_going_back_is_refused_and_nothing_is_lost():
    cache = layout((WINDOW,), slack=8).new(batch_size=1)
    for length in range(1, 120):
        advance(cache)
        fork = cache.fork()
        fork.rollback(min(8, length))
        advance(fork)
    with pytest.raises(CacheError, match=r"slots \[0\] keep what a window"):
        cache.crop(40)
    assert cache.length == 119


# Views, slots, files


def test_a_backend_that_reads_no_pages_gets_gathered_tensors():
    made = layout((FULL, WINDOW), views=("dense",))
    assert made.view == "dense"
    cache = made.new(batch_size=2)
    ((view, _), _) = advance(cache, 9)
    assert view.kind == "dense"
    assert held(view) == list(range(9))
    assert layout(views=("dense", "paged")).view == "dense"
    assert layout(views=("quantized", "paged")).view == "paged"


def test_a_shared_slot_reads_the_pages_of_its_source():
    cache = layout((FULL, SharedSlot(0))).new(batch_size=1)
    advance(cache, 5)
    assert held(cache.read(1)) == list(range(5))


def test_an_encoder_s_keys_stay_dense_and_a_backend_of_pages_alone_is_refused():
    with pytest.raises(UnsupportedRequestError, match="reads only pages"):
        layout((FULL, CrossSlot(1, 4, 4)))
    assert layout((FULL, CrossSlot(1, 4, 4)), views=("paged", "dense")).view == "paged"


@pytest.mark.parametrize(("option", "value"), [("page_size", 0), ("shared_pages", -1), ("slack", "4")])
def test_a_senseless_option_is_refused(option, value):
    with pytest.raises(UnsupportedRequestError, match=f"{option} is a whole number"):
        layout(**{option: value})


@pytest.mark.parametrize(
    "names", [("paged", "dynamic"), ("dynamic", "paged"), ("hybrid", "paged"), ("paged", "hybrid")]
)
def test_files_are_exchanged_with_other_layouts(names, tmp_path):
    slots = (KVSlot(2, 4, 6, window=6),) if "hybrid" in names else (FULL, FULL)
    request = CacheRequest(slots, ("dense",), "cpu", "float32")
    writer, reader = (getattr(pluglm_caches, name).pluglm_build_cache(request).new(batch_size=2) for name in names)
    for count in (150, 1, 1):
        advance(writer, count)
    writer.save(tmp_path / "c", fingerprint="m")
    reader.load(tmp_path / "c", fingerprint="m")
    assert reader.length == 152
    ((view, keys), *_) = advance(reader)
    assert held(view) == keys.positions[0].tolist()
    assert held(view)[-6:] == list(range(147, 153))


def test_a_file_whose_slots_hold_different_cells_is_read_as_far_as_all_of_them_go(tmp_path):
    request = CacheRequest((WINDOW, WINDOW), ("dense",), "cpu", "float32")
    writer = pluglm_caches.dynamic.pluglm_build_cache(request).new(batch_size=1)
    advance(writer, 50)
    writer.save(tmp_path / "c", fingerprint="m")
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(str(tmp_path / "c"), "pt") as file:
        metadata = file.metadata()
    for starts in ((13, 30), (30, 13)):
        tensors = {name: t[:, :, starts[int(name[6])] :].contiguous() for name, t in load_file(tmp_path / "c").items()}
        save_file(tensors, tmp_path / "cut", {**metadata, "first": "13"})
        cache = layout((WINDOW, WINDOW), slack=0).new(batch_size=1)
        cache.load(tmp_path / "cut", fingerprint="m")
        with pytest.raises(CacheError):
            cache.crop(33)
        cache.crop(40)
        for view, keys in advance(cache):
            assert held(view)[-6:] == keys.positions[0].tolist()[-6:] == list(range(35, 41))


def test_gradients_flow_within_a_pass_and_not_across_passes():
    cache = layout().new(batch_size=1)
    first, second = (torch.randn(1, 2, count, 4, requires_grad=True) for count in (6, 1))
    for k in (first, second):
        step = cache.begin(cache.next_positions(k.shape[2]), dense=True)
        view = cache.append(0, k, torch.zeros(1, 2, k.shape[2], 6), step)
        cache.commit(step)
        view.dense()[0].sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first))
    assert torch.equal(second.grad, torch.ones_like(second))


def test_a_cache_filled_in_inference_mode_goes_on_outside_it():
    cache = layout().new(batch_size=1)
    with torch.inference_mode():
        advance(cache, 7)
        cache.repeat(2)
    assert held(advance(cache)[0][0]) == list(range(8))


def test_a_tensor_of_another_shape_is_refused_before_anything_is_written():
    cache = layout().new(batch_size=2)
    step = cache.begin(cache.next_positions(3), dense=True)
    with pytest.raises(InputError, match="v of shape"):
        cache.append(0, torch.ones(2, 2, 3, 4), torch.ones(2, 2, 1, 6), step)
    assert not cache.read(0, step).dense()[0].any()


# Prefixes


def prefilled(made, tokens, *, salt=SALT):
    cache = made.new(batch_size=1)
    advance(cache, len(tokens), tokens=[tokens])
    cache.publish([tokens], salt=salt)
    return cache


def test_a_published_prefix_is_found_again_without_computing_or_copying():
    made = layout((FULL, FULL))
    tokens = list(range(50, 61))
    prefilled(made, tokens)
    gc.collect()
    assert used(made) == 2  # the begun page went with its cache
    cache = made.new(batch_size=2)
    assert cache.adopt_prefix(torch.tensor([tokens, tokens]), salt=SALT) == 8
    assert (cache.length, cache.dense, used(made)) == (8, True, 2)
    ((view, keys), _) = advance(cache, 3, tokens=[[1, 2, 3], [4, 5, 6]])
    assert keys.dense
    assert [held(view, row) for row in range(2)] == [[*range(50, 58), 1, 2, 3], [*range(50, 58), 4, 5, 6]]
    assert pool_of(made).num_copied == 0


def test_what_is_adopted_ends_where_the_text_or_the_published_pages_do():
    made = layout()
    prefilled(made, list(range(12)))
    for tokens, found in (
        ([*range(12), 99], 12), (list(range(11)), 8), ([*range(7), 99, *range(8, 12)], 4), ([99, *range(11)], 0),
        ([], 0), (list(range(4, 12)), 0),
    ):  # fmt: skip
        assert made.new(batch_size=1).adopt_prefix([tokens], salt=SALT) == found
    rows = [[*range(12)], [*range(4), *range(8)]]
    assert made.new(batch_size=2).adopt_prefix(rows, salt=SALT) == 4  # the least of both rows


def test_a_prefix_under_another_salt_is_never_found():
    made = layout()
    tokens = list(range(8))
    prefilled(made, tokens)
    for salt in (b"tenan", b"tenant\0", b"other"):
        assert made.new(batch_size=1).adopt_prefix([tokens], salt=salt) == 0
    with pytest.raises(InputError, match="does not keep one tenant's text from another"):
        made.new(batch_size=1).adopt_prefix([tokens], salt=b"")


def test_a_digest_tells_salt_slots_dtype_page_size_and_every_token_before():
    def last(made, tokens, salt=SALT):
        return made.prefixes.digests(tokens, salt)[-1]

    double = CacheRequest((FULL,), ("paged",), "cpu", "float64", options=(("page_size", 4),))
    other = pluglm_caches.paged.pluglm_build_cache(double)
    tokens = list(range(8))
    digests = [
        last(layout(), tokens), last(layout(), tokens, b"x"), last(layout((FULL, FULL)), tokens),
        last(layout(page_size=8), tokens), last(layout(page_size=2), tokens), last(other, tokens),
        last(layout(), [9, *tokens[1:]]), last(layout(), [*tokens[:7], 9]), last(layout(), tokens[:4]),
    ]  # fmt: skip
    assert len(set(digests)) == len(digests)
    assert last(layout(), tokens) == digests[0]


def test_who_adopts_and_goes_back_into_a_published_page_writes_into_a_copy():
    made = layout()
    tokens = list(range(8))
    owner = prefilled(made, tokens)
    cache = made.new(batch_size=1)
    cache.adopt_prefix([tokens], salt=SALT)
    for some in (cache, owner):
        some.rollback(2)
        advance(some, 2, tokens=[[70, 71]])
    assert pool_of(made).num_copied == 2
    fresh = made.new(batch_size=1)
    assert fresh.adopt_prefix([tokens], salt=SALT) == 8
    assert held(fresh.read(0)) == tokens


def test_the_least_recently_found_pages_make_room_the_end_of_a_text_first():
    made = layout(shared_pages=3)
    one, two = list(range(8)), list(range(100, 108))
    prefilled(made, one)
    assert prefilled(made, two).publish([two], salt=SALT) == 8
    gc.collect()
    assert (len(made.prefixes), used(made)) == (3, 3)
    assert made.new(batch_size=1).adopt_prefix([one], salt=SALT) == 4
    prefilled(made, list(range(200, 204)))
    assert made.new(batch_size=1).adopt_prefix([one], salt=SALT) == 4  # found before: two's end went
    assert made.new(batch_size=1).adopt_prefix([two], salt=SALT) == 4
    made.prefixes.clear()
    gc.collect()
    assert used(made) == 0


def test_with_no_room_for_shared_pages_nothing_is_kept():
    made = layout(shared_pages=0)
    tokens = list(range(8))
    cache = made.new(batch_size=1)
    advance(cache, 8, tokens=[tokens])
    assert cache.publish([tokens], salt=SALT) == 0
    assert len(made.prefixes) == 0


def test_a_prefix_of_a_windowed_model_needs_only_the_pages_that_are_read():
    made = layout((FULL, WINDOW), slack=0)
    tokens = list(range(40))
    cache = prefilled(made, tokens)  # published after its window moved on
    assert cache.tables[1].first > 0
    adopter = made.new(batch_size=1)
    assert adopter.adopt_prefix([tokens], salt=SALT) == 40
    (_, (view, keys)) = advance(adopter, tokens=[[77]])
    assert held(view) == [*keys.positions[0].tolist()[:-1], 77]
    assert held(view)[-6:] == [35, 36, 37, 38, 39, 77]
    assert made.new(batch_size=1).adopt_prefix([tokens[:20]], salt=SALT) == 0  # its window would need what is gone
    early = made.new(batch_size=1)
    for start in range(0, 20, 4):
        advance(early, 4, tokens=[tokens[start : start + 4]])
        early.publish([tokens[: start + 4]], salt=SALT)
    assert made.new(batch_size=1).adopt_prefix([tokens[:20]], salt=SALT) == 20


def test_ragged_rows_publish_nothing_and_packed_or_prefixed_texts_are_refused():
    made = layout()
    cache = made.new(batch_size=2)
    step = cache.begin(torch.tensor([[-1, 0, 1, 2], [0, 1, 2, 3]]))
    cache.append(0, torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 6), step)
    cache.commit(step)
    assert cache.publish([[0] * 4] * 2, salt=SALT) == 0
    for more in ({"segments": torch.zeros(1, 4, dtype=torch.int64)}, {"prefix_lengths": torch.tensor([2])}):
        cache = made.new(batch_size=1)
        advance(cache, 4, **more)
        with pytest.raises(CacheError, match="segments or prefix lengths"):
            cache.publish([[0] * 4], salt=SALT)


def test_prefixes_that_make_no_sense_are_refused():
    made = layout()
    cache = made.new(batch_size=2)
    for wrong in ([[1, 2]], [[1, 2], [3]], [[1.5], [2]], torch.ones(2, 3), torch.ones(2, dtype=torch.int64)):
        with pytest.raises(InputError, match="as many in every row"):
            cache.adopt_prefix(wrong, salt=SALT)
    advance(cache, 4)
    with pytest.raises(CacheError, match=r"holds 4 cells cannot adopt(.|\n)*after `reset`"):
        cache.adopt_prefix([[1] * 4] * 2, salt=SALT)
    with pytest.raises(InputError, match="more tokens than the 4 cells"):
        cache.publish([[1] * 5] * 2, salt=SALT)


@pytest.mark.parametrize("slot", [LatentSlot(4, 2), StateSlot((("h", (4,), None),)), CrossSlot(1, 4, 4)])
def test_a_model_that_keeps_more_than_pages_shares_no_prefix(slot):
    cache = layout((FULL, slot), views=("paged", "dense")).new(batch_size=1)
    for act in (cache.adopt_prefix, cache.publish):
        with pytest.raises(CacheError, match=rf"not in pages \(slot 1: {slot.kind}\)(.|\n)*Fork"):
            act([[1]], salt=SALT)
