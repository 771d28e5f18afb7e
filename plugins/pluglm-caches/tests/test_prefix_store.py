"""Stored prefixes: found by their tokens, whole or in part, by whom they are for, and never wrong."""

import logging
import os
import subprocess
import sys

import pluglm_caches
import pytest
import torch
from pluglm_caches.prefix_files import PrefixFolder
from pluglm_caches.prefix_store import PrefixStore

from pluglm.contracts import CacheRequest, CrossSlot, KVSlot, StateSlot
from pluglm.errors import CacheError, InputError, SaveError

KV = KVSlot(3, 8, 6)
STATE = StateSlot((("ssm", (2, 3), None),))
WINDOW = KVSlot(3, 8, 6, window=5)
TEXT = list(range(100, 120))


def layout(name="dynamic", slots=(KV,), dtype="float32", **options):
    provider = getattr(pluglm_caches, name)
    options = tuple(options.items())
    return provider.pluglm_build_cache(
        CacheRequest(slots=slots, views=("dense",), device="cpu", dtype=dtype, options=options)
    )


def feed(cache, ids):
    """Keys and values that follow from the ids alone, as a model's would."""
    B = cache.batch_size
    step = cache.begin(cache.next_positions(len(ids)), dense=cache.dense)
    rows = torch.tensor([ids], dtype=torch.float32).expand(B, -1)
    for i, slot in enumerate(cache.slots):
        if isinstance(slot, KVSlot):
            k = rows[:, None, :, None] + torch.arange(24.0).view(1, 3, 1, 8)
            cache.append(i, k, -k[..., :6], step)
        elif isinstance(slot, StateSlot):
            cache.state(i)["ssm"].add_(float(sum(ids)))
    cache.commit(step)
    return cache


def filled(ids=TEXT, made=None, **how):
    return feed((made or layout()).new(batch_size=1, **how), ids)


def holds(cache, ids):
    """The cache is the one that feeding these ids makes."""
    k, v = cache.read(0).dense()
    wanted_k, wanted_v = filled(ids).read(0).dense()
    return cache.length == len(ids) and torch.equal(k, wanted_k) and torch.equal(v, wanted_v)


@pytest.fixture
def store(tmp_path):
    return PrefixStore(tmp_path / "store", salt="a")


def stems(store):
    return sorted(path.stem for path in store._files.path.glob("*.safetensors"))


def test_a_stored_text_is_found_and_its_last_token_is_left_to_be_fed(store):
    path = store.put(filled(), TEXT, "model")
    assert path.exists()
    assert store.longest([*TEXT, 7, 8], "model") == (path, 20)
    cache, length = store.load(layout(), [*TEXT, 7, 8], "model")
    assert length == 20 and holds(cache, TEXT)
    feed(cache, [7])
    assert holds(cache, [*TEXT, 7])
    cache, length = store.load(layout(), TEXT, "model")
    assert length == 19 and holds(cache, TEXT[:19])


@pytest.mark.parametrize("shared", [1, 7, 19, 20])
def test_a_longer_stored_text_is_cropped_to_the_tokens_that_are_equal(store, shared):
    store.put(filled(), TEXT, "model")
    text = [*TEXT[:shared], 5, 6]
    assert store.longest(text, "model")[1] == shared
    cache, length = store.load(layout(), text, "model")
    assert length == shared and holds(cache, text[:shared])


def test_the_longest_of_several_is_taken(store):
    for end in (5, 12, 8):
        store.put(filled(TEXT[:end]), TEXT[:end], "model")
    store.put(filled([1, 2, 3]), [1, 2, 3], "model")
    assert store.longest(TEXT, "model")[1] == 12
    assert store.load(layout(), TEXT, "model")[1] == 12
    # Of those that share equally much, the shortest is read.
    newest = store.put(filled(TEXT[:5]), TEXT[:5], "model")
    assert store.longest(TEXT[:4], "model") == (newest, 4)


def test_other_tokens_another_model_and_another_salt_find_nothing(store, tmp_path):
    store.put(filled(), TEXT, "model")
    assert store.longest([1, *TEXT], "model") is None
    assert store.longest(TEXT, "another model") is None
    other = PrefixStore(tmp_path / "store", salt="b")
    assert other.longest(TEXT, "model") is None
    for asked, ids, fingerprint in ((store, [1, *TEXT], "model"), (store, TEXT, "m"), (other, TEXT, "model")):
        cache, length = asked.load(layout(), ids, fingerprint)
        assert length == 0 and cache.length == 0 and cache.batch_size == 1
    assert PrefixStore(tmp_path / "store", salt="a").longest(TEXT, "model") is not None


def test_every_wrong_token_is_noticed(store):
    store.put(filled(), TEXT, "model")
    for at in range(len(TEXT)):
        text = [*TEXT, 9]
        text[at] += 2**16
        found = store.longest(text, "model")
        assert (found[1] if found else 0) == at


def test_a_cache_that_was_generated_with_has_one_token_less_and_one_with_more_is_cropped(store):
    cache = filled()
    store.put(cache, [*TEXT, 1], "model")
    store.put(cache, torch.tensor([TEXT]), "model")
    store.put(cache, TEXT[:6], "model")
    assert cache.length == 20, "a fork was cropped"
    assert sorted(kept.length for kept in store._files.kept(store._scope("model"))) == [6, 20]


@pytest.mark.parametrize(("writer", "reader"), [("dynamic", "static"), ("static", "hybrid"), ("paged", "dynamic")])
def test_layouts_of_plain_cells_share_prefixes(store, writer, reader):
    store.put(filled(made=layout(writer), capacity=30), TEXT, "model")
    cache, length = store.load(layout(reader), [*TEXT, 3], "model", capacity=40)
    assert length == 20 and holds(cache, TEXT) and cache.layout == reader


def test_a_fixed_layout_still_says_that_it_needs_a_capacity_and_passes_over_what_is_too_long(store, caplog):
    store.put(filled(), TEXT, "model")
    with pytest.raises(InputError, match="capacity"):
        store.load(layout("static"), TEXT, "model")
    with caplog.at_level(logging.INFO):
        cache, length = store.load(layout("static"), TEXT, "model", capacity=10)
    assert (cache.length, length, cache.capacity) == (0, 0, 10)
    assert "does not serve a static cache" in caplog.text and "room for 10" in caplog.text


def test_a_layout_that_cannot_go_back_takes_the_longest_that_fits_whole(store):
    recurrent = layout(slots=(KV, STATE))
    for end in (4, 9, 20):
        store.put(filled(TEXT[:end], made=recurrent), TEXT[:end], "model")
    cache, length = store.load(recurrent, TEXT[:15], "model")
    assert length == cache.length == 9
    assert cache.state(1)["ssm"].eq(float(sum(TEXT[:9]))).all()


def test_a_window_that_moved_on_is_passed_over_for_a_shorter_text(store):
    windowed = layout("hybrid", slots=(WINDOW,), slack=0)
    long = list(range(300))
    store.put(filled(long, made=windowed), long, "model")
    store.put(filled(long[:6], made=windowed), long[:6], "model")
    assert store.longest(long[:200], "model")[1] == 200
    cache, length = store.load(windowed, long[:200], "model")
    assert length == cache.length == 6
    # What a window dropped is not enough for a layout that keeps all; it is never taken for more than it is.
    assert store.load(layout(slots=(WINDOW,)), [*long, 1], "model")[1] == 6
    assert store.load(windowed, [*long, 1], "model")[1] == 300


def test_other_slots_and_another_dtype_are_passed_over(store):
    store.put(filled(), TEXT, "model")
    assert store.load(layout(slots=(KV, KV)), [*TEXT, 1], "model")[1] == 0
    assert store.load(layout(dtype="bfloat16"), [*TEXT, 1], "model")[1] == 0


def test_a_rounding_layout_does_not_hand_its_cells_to_an_exact_one(store):
    ids = list(range(400))
    store.put(filled(ids, made=layout("quantized")), ids, "model")
    assert store.load(layout(), [*ids, 1], "model")[1] == 0
    assert store.load(layout("quantized"), [*ids, 1], "model")[1] == 400
    store.put(filled(ids), ids, "model")
    cache, length = store.load(layout(), [*ids, 1], "model")
    assert length == 400 and holds(cache, ids)


def test_what_is_not_one_plain_text_is_refused(store):
    two = feed(layout().new(batch_size=2), TEXT)
    padded = layout().new(batch_size=1)
    padded.commit(padded.begin(torch.tensor([[-1, 0, 1]])))
    for cache, ids in ((two, TEXT), (padded, [1, 2, 3]), (layout().new(batch_size=1), TEXT)):
        with pytest.raises(InputError, match="not the prefix of one text") as caught:
            store.put(cache, ids, "model")
        assert caught.value.fix
    two.select(torch.tensor([0]))
    store.put(two, TEXT, "model")


def test_keys_that_follow_from_more_than_the_tokens_are_refused(store):
    segmented, prefixed = (layout().new(batch_size=1) for _ in range(2))
    step = segmented.begin(segmented.next_positions(1), dense=True, segments=torch.zeros(1, 1, dtype=torch.int64))
    segmented.append(0, torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 6), step)
    segmented.commit(step)
    step = prefixed.begin(prefixed.next_positions(1), dense=True, prefix_lengths=torch.ones(1, dtype=torch.int64))
    prefixed.append(0, torch.ones(1, 3, 1, 8), torch.ones(1, 3, 1, 6), step)
    prefixed.commit(step)
    crossed = filled(made=layout(slots=(KV, CrossSlot(3, 8, 6))))
    for cache in (segmented, prefixed, crossed):
        with pytest.raises(CacheError, match="follow from more than its tokens"):
            store.put(cache, TEXT, "model")
    assert stems(store) == []


@pytest.mark.parametrize("ids", [[], [1.5], [-1], ["a"], [[1], [2]], [True], [2**32]])
def test_token_ids_that_are_none_are_refused(store, ids):
    with pytest.raises(InputError, match="ids of one text"):
        store.longest(ids, "model")


def test_an_empty_fingerprint_and_a_senseless_limit_are_refused(store, tmp_path):
    with pytest.raises(InputError, match=r"lm\.fingerprint\(\)"):
        store.longest(TEXT, "")
    for limit in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="max_bytes"):
            PrefixStore(tmp_path, max_bytes=limit)
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="could not be written"):
        PrefixStore(tmp_path / "file")


# Files


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_files_and_folder_are_for_their_owner_alone(store):
    store.put(filled(), TEXT, "model")
    assert store._files.path.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in store._files.path.iterdir()} == {0o600}
    assert len(list(store._files.path.iterdir())) == 2


def test_names_follow_from_salt_model_and_text(store, tmp_path):
    def name(salt="a", fingerprint="model", ids=TEXT):
        path = PrefixStore(tmp_path / "other", salt=salt).put(filled(ids), ids, fingerprint)
        return path.name.split("-")[:2]

    first = store.put(filled(), TEXT, "model").name.split("-")[:2]
    assert name() == first
    for other in (name(salt="b"), name(fingerprint="m"), name(salt="am", fingerprint="odel")):
        assert not set(other) & set(first), "without the salt nobody can tell whether a text is there"
    scope, text = name(ids=TEXT[1:])
    assert scope == first[0] and text != first[1]


def test_damage_anywhere_in_a_file_is_a_miss_that_is_reported(store, caplog):
    for damage in ("numbers", "header", "end"):
        path = store.put(filled(), TEXT, "model")
        data = bytearray(path.read_bytes())
        if damage == "end":
            del data[-5:]
        else:
            data[{"numbers": -5, "header": 20}[damage]] ^= 1
        path.write_bytes(data)
        caplog.clear()
        assert store.load(layout(), [*TEXT, 1], "model")[1] == 0
        assert str(path) in caplog.text and "damaged and was removed" in caplog.text
        assert stems(store) == [] and store.longest(TEXT, "model") is None
    store.put(filled(), TEXT, "model")
    assert store.load(layout(), [*TEXT, 1], "model")[1] == 20


def test_a_label_with_other_tokens_is_left_out(store, tmp_path, caplog):
    path = store.put(filled(), TEXT, "model").with_suffix(".label")
    path.write_bytes(path.read_bytes()[:-4] + (99).to_bytes(4, "little"))
    fresh = PrefixStore(tmp_path / "store", salt="a")
    assert fresh.longest([*TEXT[:-1], 99], "model") is None
    assert "damaged and was left out" in caplog.text


def test_a_file_under_the_name_of_another_text_is_not_loaded(store, caplog):
    """Its bytes match its name, and its label does, too; but it says itself which text it belongs to."""
    path, other = store.put(filled(), TEXT, "model"), [5, *TEXT[1:]]
    label = path.with_suffix(".label").read_bytes()
    false = store.put(filled(other), other, "model")
    content = path.stem.split("-")[2]
    moved = path.with_name("-".join([*false.stem.split("-")[:2], content]) + ".safetensors")
    false.with_suffix(".label").rename(moved.with_suffix(".label"))
    path.rename(moved)
    false.unlink()
    assert label != moved.with_suffix(".label").read_bytes()
    with caplog.at_level(logging.INFO):
        assert store.load(layout(), [*other, 1], "model")[1] == 0
    assert "was made with the model" in caplog.text


def test_a_file_that_vanishes_under_a_reader_is_a_miss(store, monkeypatch):
    path = store.put(filled(), TEXT, "model")
    store.put(filled(TEXT[:7]), TEXT[:7], "model")
    right = PrefixFolder.intact

    def late(self, kept):
        found = right(self, kept)
        path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(PrefixFolder, "intact", late)
    cache, length = store.load(layout(), [*TEXT, 1], "model")
    assert length == 7 and holds(cache, TEXT[:7])


def test_a_write_that_fails_leaves_nothing(store, monkeypatch):
    cache = filled()
    monkeypatch.setattr(type(cache), "save", lambda *_, **__: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(SaveError, match="no space"):
        store.put(cache, TEXT, "model")
    assert list(store._files.path.iterdir()) == []


# Room


def test_the_least_recently_used_make_room(tmp_path):
    one = PrefixStore(tmp_path / "one")
    one.put(filled([0, *TEXT]), [0, *TEXT], "model")
    size = sum(path.stat().st_size for path in (tmp_path / "one").iterdir())
    store = PrefixStore(tmp_path / "many", max_bytes=3 * size)
    for first in range(3):
        store.put(filled([first, *TEXT]), [first, *TEXT], "model")
    assert store.load(layout(), [0, *TEXT, 1], "model")[1] == 21  # now 1 is the oldest
    store.put(filled([3, *TEXT]), [3, *TEXT], "model")
    found = [store.longest([first, *TEXT], "model") is not None for first in range(4)]
    assert found == [True, False, True, True]
    assert sum(path.stat().st_size for path in (tmp_path / "many").iterdir()) <= 3 * size
    assert len(stems(store)) == 3


def test_a_prefix_that_is_too_large_removes_nothing(tmp_path):
    PrefixStore(tmp_path).put(filled([1, 2]), [1, 2], "model")
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    store = PrefixStore(tmp_path, max_bytes=size + 10)
    with pytest.raises(SaveError, match="takes [0-9,]+ bytes"):
        store.put(filled(), TEXT, "model")
    assert store.longest([1, 2], "model") is not None
    assert len(list(tmp_path.iterdir())) == 2


def test_what_killed_processes_left_makes_room_too(store):
    store._files.max_bytes = 10**6
    orphan, begun, fresh = (store._files.path / name for name in ("a-b-c.safetensors", ".old.part", ".new.part"))
    for path in (orphan, begun, fresh):
        path.write_bytes(bytes(10**6))
    os.utime(orphan, (1, 1))
    os.utime(begun, (1, 1))
    store.put(filled(), TEXT, "model")
    assert not orphan.exists() and not begun.exists() and fresh.exists()
    assert len(stems(store)) == 1


def test_the_same_text_again_takes_no_more_room(store):
    cache = filled()
    first = store.put(cache, TEXT, "model")
    cache.read(0).k.add_(1e-6)  # another machine's rounding
    second = store.put(cache, TEXT, "model")
    assert first != second and not first.exists()
    assert stems(store) == [second.stem]


WORKER = """
import random, sys
sys.path.insert(0, {tests!r})
from test_prefix_store import PrefixStore, filled, holds, layout
store = PrefixStore({folder!r}, max_bytes={limit})
draw, found = random.Random({seed}), 0
for _ in range(40):
    ids = [draw.randrange(3) for _ in range(draw.randrange(1, 6))]
    if draw.random() < 0.5:
        store.put(filled(ids), ids, "model")
    cache, length = store.load(layout(), [*ids, 9], "model")
    assert length == cache.length and (not length or holds(cache, ids[:length]))
    found += bool(length)
print(found)
"""


def test_processes_that_write_read_and_evict_at_once_never_read_wrong(tmp_path):
    program = {"tests": os.path.dirname(__file__), "folder": str(tmp_path / "store"), "limit": 12_000}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER.format(**program, seed=seed)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for seed in range(2)
    ]  # fmt: skip
    for worker in workers:
        out, err = worker.communicate(timeout=100)
        assert worker.returncode == 0 and "damaged" not in err, err
        assert int(out) > 20
    assert not list((tmp_path / "store").glob(".*")), "no part is left"
