"""Attention sinks: what is evicted, where the sinks stand then, and that a text of any length goes on."""

import random

import pluglm_caches
import pytest
import torch
from pluglm_blocks import build_decoder
from pluglm_blocks.ops import rope as rotate
from pluglm_blocks.rope import RotaryTable
from pluglm_caches.sink_layout import SinkCache
from pluglm_caches.sinks import SinkStore

from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    CacheRequest,
    DecoderProgram,
    DenseView,
    Embedding,
    FeedForward,
    ForwardInput,
    Head,
    KeyInfo,
    KVSlot,
    LatentSlot,
    Layer,
    ModelDescription,
    ModelParts,
    Norm,
    Part,
    Rope,
    WeightMap,
)
from pluglm.errors import CacheError, ContextLengthError, InputError, UnsupportedRequestError

SINKS, WINDOW, SLACK = 3, 10, 5
SLOT, ROPE = KVSlot(3, 8, 6), Rope("default", 100.0, 8)
OPTIONS = (("sinks", SINKS), ("window", WINDOW), ("slack", SLACK))


def layout(slots=(SLOT,), *, name="sink", rotations=(None,), options=OPTIONS, **request):
    provider = getattr(pluglm_caches, name)
    return provider.pluglm_build_cache(
        CacheRequest(
            slots, ("dense",), "cpu", request.pop("dtype", "float32"), rotations=rotations, options=options, **request
        )
    )


# Against the paper: unrotated keys are kept, and keys and queries are rotated by their positions within the cache

H, K, D, C, F, V = 6, 3, 8, 20, 28, 37

ROPES = {
    "default": Rope("default", 100.0, D),
    "interleaved": Rope("default", 50.0, D, interleaved=True),
    "partial": Rope("default", 100.0, 4),
    "linear": Rope("linear", 100.0, D, parameters=(("factor", 4.0),)),
    "proportional": Rope("proportional", 100.0, D, parameters=(("partial_rotary_factor", 0.5),)),
    "yarn": Rope("yarn", 100.0, D, parameters=(("factor", 4.0), ("original_max_position_embeddings", 16))),
    "llama3": Rope("llama3", 100.0, D, parameters=(
        ("factor", 8.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0), ("original_max_position_embeddings", 16),
    )),
}  # fmt: skip


class PlainAttention:
    """softmax in float32, the mask from positions alone."""

    name, views = "plain", ("dense",)

    def refusals(self, spec):
        return []

    def prepare(self, spec, q_positions, keys):
        return spec.mask.visible(q_positions, keys)[:, None]

    def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
        k, v = (t.repeat_interleave(H // K, 1).float() for t in view.dense())
        s = (q.float() @ k.transpose(-1, -2) * spec.scale).masked_fill(~mask, -torch.inf)
        return torch.nan_to_num(s.softmax(-1)) @ v


class ByCachePositions(PlainAttention):
    """Rotates the keys of a view by 0, 1, 2, … and the one query by the last of these."""

    def __init__(self, rope):
        self.rope, self.table = rope, RotaryTable(rope)

    def prepare(self, spec, q_positions, keys):
        return torch.ones(1, 1, 1, keys.length, dtype=torch.bool)

    def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
        k, v = view.dense()
        cos, sin = self.table.cos_sin(torch.arange(k.shape[2])[None])
        k = rotate(k, cos, sin, self.rope.interleaved)
        q = rotate(q, cos[:, -1:], sin[:, -1:], self.rope.interleaved)
        return super().attend(q, DenseView(k, v), spec, mask)


class NaiveCache:
    """Unrotated keys in lists, token by token: the first ones, the last ones before the new token, and the new one."""

    def __init__(self):
        self.kept = {}

    def begin(self, positions, *, dense, prefix_lengths, segments):
        assert positions.shape == (1, 1)
        self.length = min(int(positions) + 1, SINKS + WINDOW)
        return self

    def keys(self, slot):
        return KeyInfo(torch.arange(self.length)[None], self.length, False)

    def append(self, slot, k, v, step):
        held = [*self.kept.get(slot, []), (k, v)]
        self.kept[slot] = held if len(held) <= SINKS + WINDOW else [*held[:SINKS], *held[SINKS + 1 :]]
        return DenseView(*(torch.cat(tensors, 2) for tensors in zip(*self.kept[slot], strict=True)))

    def commit(self, step):
        pass


def decoder(rope, backend, *, layers=2):
    """A tiny model; equal weights whatever the rotation and the backend."""
    op = AttentionSpec(H, K, D, D, D**-0.5)
    norm = Norm("rms", C, 1e-5)

    def layer(slot):
        mlp = Branch((Part("mlp", FeedForward(C, F, "silu"), norm_in=norm),))
        return Layer((Branch((Part("attn", Attention(op, slot, rope), norm_in=norm),)), mlp))

    made = DecoderProgram(
        Embedding(V, C), tuple(map(layer, range(layers))), norm, Head(tied=False), (KVSlot(K, D, D),) * layers, 64
    )
    description = ModelDescription("toy", made, WeightMap(()), V, C, layers, 64, (), made.slots)
    module = build_decoder(made, ModelParts(description, backend, {}, "cpu", "float32"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval(), made


def logits(module, cache, ids, *, position=None):
    """Logits of a text fed token by token, [T, V]."""
    found = []
    with torch.no_grad():
        for t in range(ids.shape[1]):
            inputs = ForwardInput(ids[:, t : t + 1], torch.tensor([[t]]), cache, dense=True)
            found.append(module(inputs).logits[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("kind", ROPES)
def test_logits_are_those_of_positions_within_the_cache(kind):
    rope, ids = ROPES[kind], torch.randint(V, (1, 90), generator=torch.Generator().manual_seed(7))
    module, made = decoder(rope, PlainAttention())
    cache = layout(made.slots, rotations=made.rotations(), max_seq_len=64).new(batch_size=1)
    naive, _ = decoder(None, ByCachePositions(rope))
    got, wanted = logits(module, cache, ids), logits(naive, NaiveCache(), ids)
    assert float((got - wanted).abs().max()) <= 1e-5
    assert float(wanted.abs().max()) > 0.5
    everything = layout(made.slots, name="dynamic", options=()).new(batch_size=1)
    assert float((logits(module, everything, ids) - wanted)[40:].abs().max()) > 1e-2, "nothing was evicted"


def test_a_sink_that_stays_where_it_was_is_told(monkeypatch):
    """The comparison above has teeth."""
    rope, ids = ROPES["default"], torch.randint(V, (1, 90), generator=torch.Generator().manual_seed(7))
    module, made = decoder(rope, PlainAttention())
    naive, _ = decoder(None, ByCachePositions(rope))
    monkeypatch.setattr("pluglm_caches.sinks.rope", lambda x, cos, sin, interleaved: x)
    cache = layout(made.slots, rotations=made.rotations()).new(batch_size=1)
    assert float((logits(module, cache, ids) - logits(naive, NaiveCache(), ids)).abs().max()) > 1e-3


# Against a list of tokens: any passes, padded, failed or taken back


class Rows:
    """What each row's text is: token p has the position p. k and v [K, D] and [K, Dv] of every slot, k not rotated."""

    def __init__(self, slots, rows):
        self.slots, self.rows = slots, [[] for _ in range(rows)]
        self.generator = torch.Generator().manual_seed(1)

    def feed(self, cache, positions, *, dense=False, commit=True):
        """One pass through both, every view compared."""
        B, T = len(self.rows), positions.shape[1]
        step = cache.begin(positions, dense=dense)
        positions = positions.expand(B, T)
        texts = [list(row) for row in self.rows]
        raw = [
            (torch.randn(B, s.num_kv_heads, T, s.head_dim, generator=self.generator),
             torch.randn(B, s.num_kv_heads, T, s.v_head_dim, generator=self.generator))
            for s in self.slots
        ]  # fmt: skip
        for b, row in enumerate(positions.tolist()):
            texts[b] += [[(k[b, :, t], v[b, :, t]) for k, v in raw] for t, p in enumerate(row) if p >= 0]
        for i, (k, v) in enumerate(raw):
            if TABLES[i] is not None:
                k = rotate(k, *TABLES[i].cos_sin(positions.clamp(min=0)), False)
            view = cache.append(i, k, v, step)
            again = cache.read(i, step)
            assert torch.equal(view.k, again.k)
            self.check(i, view, step.keys(i), texts, [sum(p >= 0 for p in row) for row in positions.tolist()])
        if commit:
            cache.commit(step)
            self.rows = texts

    def check(self, i, view, keys, texts, counts):
        """Exactly the sinks and the window are there, in every row, where the paper puts them."""
        table = TABLES[i]
        B, S = len(texts), keys.length
        assert view.k.shape[2] == view.v.shape[2] == S
        assert view.k.isfinite().all()
        for b, (text, count) in enumerate(zip(texts, counts, strict=True)):
            before = len(text) - count
            start = min(before, len(text) - WINDOW)
            moved = max(0, start - SINKS)
            wanted = {p: p for p in range(max(0, start if moved else 0), len(text))}
            if moved:
                wanted |= {p + moved: p for p in range(SINKS)}
            places = keys.positions.expand(B, S)[b].tolist()
            got = {p: j for j, p in enumerate(places) if p >= 0}
            assert len(got) == sum(p >= 0 for p in places), "a position comes twice"
            assert got.keys() == wanted.keys(), (b, start, sorted(got), sorted(wanted))
            for place, token in wanted.items():
                k, v = text[token][i]
                if table is not None:
                    k = rotate(k[None, :, None], *table.cos_sin(torch.tensor([[place]])), False)[0, :, 0]
                assert torch.allclose(view.k[b, :, got[place]], k, rtol=0, atol=2e-5)
                assert torch.equal(view.v[b, :, got[place]], v)

    def take_back(self, counts):
        self.rows = [row[: len(row) - count] for row, count in zip(self.rows, counts, strict=True)]


SLOTS, ROTATIONS = (KVSlot(3, 8, 6), KVSlot(2, 12, 5)), (ROPE, None)

TABLES = (RotaryTable(ROPE), None)


def new(rows=1, **changes):
    return layout(SLOTS, rotations=ROTATIONS, **changes).new(batch_size=rows), Rows(SLOTS, rows)


def padded(model, rng, most=4):
    """Positions of a pass with padding on both sides; some rows have none but padding."""
    rows = []
    for text in model.rows:
        left, right, n = rng.randint(0, most), rng.randint(0, most), len(text)
        rows.append([n + t - left if left <= t < 6 - right else -1 for t in range(6)])
    return torch.tensor(rows)


@pytest.mark.parametrize("passes", [[1] * 60, [40, 1, 1, 30, 1], [5, 7, 2] * 9, [2, 50, 3, 3], [9, 20, 1, 1]])
def test_passes_of_any_length_see_the_sinks_the_window_and_themselves(passes):
    cache, model = new(2)
    for count in passes:
        model.feed(cache, cache.next_positions(count), dense=True)
    assert cache.dense
    assert cache.length == sum(passes)


@pytest.mark.parametrize("seed", range(7))
def test_random_operations_equal_a_plain_list_of_tokens(seed, tmp_path):
    rng = random.Random(seed)
    pairs = [new(rng.randint(1, 3))]
    refused = 0
    for number in range(50):
        at = rng.randrange(len(pairs))
        cache, model = pairs[at]
        act = rng.choice(
            ["feed"] * 8 + ["pad", "pad", "fail", "fail", "roll", "holes", "crop", "select", "fork", "file"]
        )
        if seed < 3 and act in ("pad", "holes"):
            act = "feed"  # dense texts are kept by other means
        if act in ("feed", "fail"):
            count = rng.choice([1, 1, 1, 2, 4, 17])
            model.feed(
                cache, cache.next_positions(count), dense=cache.dense and rng.random() < 0.7, commit=act == "feed"
            )
        elif act == "pad":
            model.feed(cache, padded(model, rng), commit=rng.random() < 0.7)
        elif act in ("roll", "holes"):
            low = min(cache.length, min(map(len, model.rows)))
            own = [rng.randint(0, min(SLACK, low)) for _ in model.rows]
            own = own if act == "holes" else own[:1] * len(own)
            # Holes from before, and padding, are taken back first: only rows whose last cells are tokens are simple.
            probe = cache.fork()
            try:
                cache.rollback(torch.tensor(own) if act == "holes" else own[0])
            except CacheError:
                refused += 1
                assert probe.length == cache.length
                continue
            lost = taken_back(probe, own)
            model.take_back(lost)
        elif act == "crop" and cache.length:
            length = rng.randint(max(0, cache.length - SLACK), cache.length)
            probe = cache.fork()
            try:
                cache.crop(length)
            except CacheError:
                refused += 1
                continue
            model.take_back(taken_back(probe, [probe.length - length] * len(model.rows)))
        elif act == "select":
            index = [rng.randrange(len(model.rows)) for _ in range(rng.randint(1, 3))]
            cache.select(torch.tensor(index))
            model.rows = [model.rows[i] for i in index]
        elif act == "fork":
            twin = Rows(SLOTS, 1)
            twin.rows, twin.generator = list(model.rows), model.generator
            pairs = [*pairs[-2:], (cache.fork(), twin)]
        elif act == "file":
            cache.save(tmp_path / f"{number}", fingerprint="m")
            other = layout(SLOTS, rotations=ROTATIONS).new(batch_size=rng.randint(1, 3))
            other.load(tmp_path / f"{number}", fingerprint="m")
            pairs[at % len(pairs)] = (other, model)
    assert refused < 20


def taken_back(cache, counts):
    """How many real tokens the last counts[b] cells of each row are."""
    if cache.dense:
        return counts
    books = cache.cells
    held = books.positions[:, : books.length - books.first]
    return [int((row[len(row) - n :] >= 0).sum()) if n else 0 for row, n in zip(held, counts, strict=True)]


def test_padding_wastes_no_sinks_and_a_row_of_a_batch_equals_the_row_alone():
    cache, model = new(3)
    model.feed(cache, torch.tensor([[-1] * 6 + [0, 1], [-1, -1, *range(6)], list(range(8))]))
    for _ in range(40):
        model.feed(cache, cache.next_positions(1))
    alone, single = new(1)
    single.rows = [[]]
    single.feed(alone, torch.arange(2)[None], dense=True)
    for _ in range(40):
        single.feed(alone, alone.next_positions(1), dense=True)
    step, other = cache.begin(cache.next_positions(1)), alone.begin(alone.next_positions(1), dense=True)
    places = [set(p[p >= 0].tolist()) for p in (step.keys(0).positions[0], other.keys(0).positions[0])]
    assert places[0] == places[1]


def test_a_row_whose_tokens_come_late_gets_its_sinks_late():
    cache, model = new(2)
    model.feed(cache, torch.tensor([[0, 1, 2, 3], [-1, -1, -1, 0]]))
    for _ in range(30):
        n = len(model.rows[0])
        model.feed(cache, torch.tensor([[n], [-1]]))
    assert not cache.sinks.complete
    for _ in range(40):
        model.feed(cache, cache.next_positions(1))
    assert cache.sinks.complete
    assert cache.sinks.positions.tolist() == [[0, 1, 2]] * 2


def test_memory_is_constant_over_4096_tokens_and_as_small_as_said():
    cache, _ = new(2)
    sizes = set()
    k = [torch.zeros(2, s.num_kv_heads, 1, s.head_dim) for s in SLOTS]
    v = [torch.zeros(2, s.num_kv_heads, 1, s.v_head_dim) for s in SLOTS]
    for token in range(4096):
        step = cache.begin(cache.next_positions(1), dense=True)
        for i in range(2):
            view = cache.append(i, k[i], v[i], step)
        cache.commit(step)
        if token > 200:
            sizes.add(cache.nbytes)
            assert view.k.shape[2] == SINKS + WINDOW
    assert len(sizes) == 1
    store = cache.store(0)
    assert isinstance(store, SinkStore)
    assert store.one.shape[2] == store.size == 64  # the least; half as much again as sinks, window and slack is less
    cells = 2 * (3 * (8 + 6) + 2 * (12 + 5)) * 4
    assert sizes.pop() <= cells * (64 + SINKS) + 128 * 8 + 2 * SINKS * 8


def test_a_long_prompt_takes_room_only_while_it_is_read():
    cache, model = new(1)
    model.feed(cache, cache.next_positions(500), dense=True)
    assert cache.store(0).one.shape[2] == 64
    model.feed(cache, cache.next_positions(1), dense=True)


def test_as_many_cells_as_the_slack_can_always_be_taken_back_and_no_more_than_are_held():
    cache, model = new(1)
    for number in range(110):
        model.feed(cache, cache.next_positions(1), dense=True)
        if number % 3:
            continue
        fork, twin = cache.fork(), Rows(SLOTS, 1)
        twin.rows = list(model.rows)
        fork.rollback(min(SLACK, fork.length))
        twin.take_back([min(SLACK, cache.length)])
        twin.feed(fork, fork.next_positions(2), dense=True)
    for act in (lambda: cache.crop(20), lambda: cache.rollback(80), lambda: cache.rollback(torch.tensor([80]))):
        with pytest.raises(CacheError) as caught:
            act()
        assert "slack" in caught.value.fix
    model.feed(cache, cache.next_positions(1), dense=True)
    cache.crop(0)
    model.take_back([111])
    for _ in range(40):
        model.feed(cache, cache.next_positions(1), dense=True)


def test_files_carry_the_sinks_and_one_of_another_layout_can_be_read_if_it_is_whole(tmp_path):
    cache, model = new(2)
    for _ in range(100):
        model.feed(cache, cache.next_positions(1), dense=True)
    cache.save(tmp_path / "sink", fingerprint="m")
    other = layout(SLOTS, rotations=ROTATIONS).new(batch_size=1)
    other.load(tmp_path / "sink", fingerprint="m")
    model.feed(other, other.next_positions(2), dense=True)
    for name, options in (("dynamic", ()), ("sink", (("sinks", 2), *OPTIONS[1:]))):
        with pytest.raises(CacheError) as caught:
            layout(SLOTS, name=name, rotations=ROTATIONS, options=options).new(batch_size=2).load(
                tmp_path / "sink", fingerprint="m"
            )
        assert "sinks." in caught.value.why
    whole = layout(SLOTS, name="dynamic", options=()).new(batch_size=1)
    for i, count in enumerate((3, 50, 30)):
        step = whole.begin(whole.next_positions(count), dense=True)
        for slot, s in enumerate(SLOTS):
            whole.append(slot, torch.full((1, s.num_kv_heads, count, s.head_dim), i + 1.0),
                         torch.full((1, s.num_kv_heads, count, s.v_head_dim), i + 1.0), step)  # fmt: skip
        whole.commit(step)
    whole.save(tmp_path / "dynamic", fingerprint="m")
    other.load(tmp_path / "dynamic", fingerprint="m")
    assert other.length == 83
    step = other.begin(other.next_positions(1), dense=True)
    view = other.append(1, torch.zeros(1, 2, 1, 12), torch.zeros(1, 2, 1, 5), step)
    assert view.k[0, 0, :, 0].tolist() == [3.0] * 9 + [0.0] + [1.0] * 3
    assert other.read(1).k[0, 0, :, 0].tolist() == [1.0] * 3 + [3.0] * 14  # what slack and window need is still held


def test_after_cells_were_dropped_what_is_committed_begins_with_the_sinks():
    cache, model = new(1)
    for _ in range(100):
        model.feed(cache, cache.next_positions(1), dense=True)
    k, v = cache.read(1).dense()
    assert torch.equal(k[0, :, 0], model.rows[0][0][1][0])
    assert torch.equal(v[0, :, -1], model.rows[0][-1][1][1])
    assert k.shape[2] < 100


def test_sinks_are_turned_from_the_original_so_that_rounding_does_not_add_up():
    """After hundreds of tokens in bfloat16 a sink is still within one rounding of where it should be."""
    cache = layout((SLOT,), rotations=(ROPE,), dtype="bfloat16").new(batch_size=1)
    raw = torch.randn(1, 3, 3, 8, generator=torch.Generator().manual_seed(3))
    table = RotaryTable(ROPE)
    first = rotate(raw, *table.cos_sin(torch.arange(3)[None]), False).bfloat16()
    for token in range(600):
        step = cache.begin(cache.next_positions(1), dense=True)
        k = first[:, :, token : token + 1] if token < 3 else torch.zeros(1, 3, 1, 8, dtype=torch.bfloat16)
        view = cache.append(0, k, torch.zeros(1, 3, 1, 6, dtype=torch.bfloat16), step)
        cache.commit(step)
    moved = torch.tensor([[600 - WINDOW - SINKS + p for p in range(3)]])
    assert step.keys(0).positions[0, -3:].tolist() == moved[0].tolist()
    wanted = rotate(raw, *table.cos_sin(moved), False)
    assert float((view.k[:, :, -3:].float() - wanted).abs().max()) <= 2 * 2**-8 * float(wanted.abs().max())


def test_a_window_of_the_model_keeps_what_it_reads_and_no_sinks():
    window = KVSlot(2, 12, 5, window=6)
    cache = layout((SLOT, window), rotations=(ROPE, Rope("dynamic", 9.0, 12, max_seq_len=9))).new(batch_size=1)
    for _ in range(50):
        step = cache.begin(cache.next_positions(1), dense=True)
        cache.append(0, torch.zeros(1, 3, 1, 8), torch.zeros(1, 3, 1, 6), step)
        cache.append(1, torch.zeros(1, 2, 1, 12), torch.zeros(1, 2, 1, 5), step)
        full, own = step.keys(0), step.keys(1)
        cache.commit(step)
    assert own.positions.tolist() == [list(range(44, 50))]
    assert full.positions.tolist() == [[*range(40, 50), 37, 38, 39]]


# Limits and refusals


def test_a_pass_that_reaches_beyond_the_context_is_refused_before_anything_is_written():
    cache = layout((SLOT,), max_seq_len=20).new(batch_size=1)
    with pytest.raises(ContextLengthError) as caught:
        cache.begin(cache.next_positions(21), dense=True)
    assert (caught.value.tokens, caught.value.limit) == (21, 20)
    assert "at most 17 tokens" in caught.value.fix
    for _ in range(5):
        step = cache.begin(cache.next_positions(17), dense=True)
        cache.append(0, torch.zeros(1, 3, 17, 8), torch.zeros(1, 3, 17, 6), step)
        cache.commit(step)
    assert cache.length == 85
    with pytest.raises(ContextLengthError, match="reaches over 21"):
        cache.begin(cache.next_positions(18), dense=True)


def test_packed_sequences_are_refused_once_something_would_be_evicted():
    cache, model = new(1)
    model.feed(cache, cache.next_positions(10), dense=True)
    segments = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="Packed sequences"):
        cache.begin(torch.arange(4)[None], segments=segments)
    model.feed(cache, cache.next_positions(1), dense=True)


def test_without_an_option_the_window_is_what_the_context_leaves():
    assert layout(options=(), max_seq_len=64).settings["window"] == 60
    assert layout(options=(), max_seq_len=4096).settings["window"] == 1020
    assert layout(options=()).settings == {"sinks": 4, "window": 1020, "slack": 64}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rotations": None}, "no program"),
        ({"learned_positions": True}, "learned positions"),
        ({"rotations": (Rope("dynamic", 100.0, 8, parameters=(("factor", 2.0),), max_seq_len=32),)}, "'dynamic'"),
        ({"rotations": (Rope("longrope", 100.0, 4, parameters=(
            ("factor", 2.0), ("long_factor", (2.0, 3.0)), ("original_max_position_embeddings", 8),
            ("short_factor", (1.0, 1.0)),
        )),)}, "'longrope'"),
        ({"rotations": (Rope("no-such-rope", 100.0, 8),)}, "no-such-rope"),
        ({"slots": (KVSlot(3, 8, 6, chunk=4),)}, "'chunk'"),
        ({"slots": (LatentSlot(8, 4),)}, "'latent'"),
        ({"max_seq_len": 12}, "context of 12"),
        ({"max_seq_len": 5, "options": ()}, "context of 5"),
        ({"options": (("window", 1),)}, "whole number from 2 on"),
        ({"options": (("sinks", 0),)}, "whole number from 1 on"),
    ],
)  # fmt: skip
def test_what_cannot_be_moved_is_refused_when_the_plan_is_made(changes, word):
    with pytest.raises(UnsupportedRequestError) as caught:
        layout(**changes)
    assert any(word in reason for reason in caught.value.reasons), caught.value.reasons


def test_it_says_that_texts_may_outgrow_the_context():
    made = layout()
    assert made.streams
    assert made.new(batch_size=1).streams
    assert isinstance(made.new(batch_size=1), SinkCache)
    assert not layout(name="dynamic", options=()).streams
