"""What is special about packed cells: how they are packed, how far off they are, what stays in full precision."""

import sys

import pluglm_caches
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pluglm_caches.affine import below, decode, encode, span
from pluglm_caches.blocks import Codec
from pluglm_caches.packing import WIDTHS, pack, unpack
from pluglm_caches.quantized_store import QuantizedStore
from pluglm_caches.windows import WindowStore

from pluglm.contracts import CacheRequest, CrossSlot, DenseView, KVSlot, LatentSlot, LatentView, QuantizedView
from pluglm.errors import CacheError, InputError, UnsupportedRequestError
from pluglm.testing.cache import CacheContract, provider_facts

FULL, WINDOW, CHUNK = KVSlot(2, 6, 5), KVSlot(2, 6, 5, window=16), KVSlot(2, 6, 5, chunk=16)
SMALL = {"group_size": 4, "residual": 8, "slack": 4}


class TestPackedAtOnce(CacheContract):
    """Two bits, four cells a block and no tail, so that every operation goes through blocks."""

    provider = pluglm_caches.quantized
    facts = provider_facts("pluglm_caches", "cache", "quantized")
    bounded = True
    max_examples = 6
    asked = {"bits": 2, "group_size": 4, "residual": 0, "slack": 0}  # noqa: RUF012 - not changed
    views = ("dense",)

    def build(self, slots, **request):
        request["options"] = (*self.asked.items(), *request.get("options", ()))
        return super().build(slots, **{"views": self.views, **request})


class TestEightBitsWithATail(TestPackedAtOnce):
    """As far off as 8 bits may be: half a step of a group that spans 9, twice for a cell that was packed again."""

    asked = {"bits": 8, "group_size": 4, "residual": 3, "slack": 2}  # noqa: RUF012 - not changed
    views = ("quantized", "dense")
    max_examples = 4

    def same(self, got, wanted):
        return torch.allclose(got.float(), wanted.float(), atol=2 * 9 / 255 / 2, rtol=2**-7)  # rtol: of bfloat16


def layout(slots=(FULL,), *, views=("dense",), dtype="float32", variant=None, **options):
    options = tuple({**SMALL, **options}.items())
    return pluglm_caches.quantized.pluglm_build_cache(
        CacheRequest(slots, views, "cpu", dtype, variant=variant, options=options)
    )


def advance(cache, count=1, *, seed=0, positions=None):
    """One pass of random keys and values. Returns k, v and the views."""
    draw = torch.Generator().manual_seed(cache.length * 31 + seed)
    dense = positions is None and cache.dense
    step = cache.begin(cache.next_positions(count) if positions is None else positions, dense=dense)
    shape = (cache.batch_size, 2, step.count)
    k, v = (torch.randn(*shape, size, generator=draw).to(cache.store(0).dtype) for size in (6, 5))
    views = [cache.append(i, k, v, step) for i, slot in enumerate(cache.slots) if isinstance(slot, KVSlot)]
    keys = [step.keys(i) for i, slot in enumerate(cache.slots) if isinstance(slot, KVSlot)]
    cache.commit(step)
    return k, v, list(zip(views, keys, strict=True))


def filled(cache, *counts):
    """Passes of these lengths; returns all k and v."""
    given = [advance(cache, count)[:2] for count in counts]
    return tuple(torch.cat([pair[i] for pair in given], dim=2) for i in (0, 1))


def held(cache, slot=0):
    return cache.read(slot).dense()


# Packing


@given(
    bits=st.sampled_from(WIDTHS), units=st.integers(1, 5), shape=st.lists(st.integers(1, 4), max_size=2),
    after=st.lists(st.integers(1, 5), max_size=2), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_numbers_come_back_from_their_bytes_in_order(bits, units, shape, after, seed):
    draw = torch.Generator().manual_seed(seed)
    size, axis = units * 8 // bits, len(shape)
    numbers = torch.randint(2**bits, (*shape, size, *after), generator=draw, dtype=torch.uint8)
    packed = pack(numbers, bits, axis)
    assert packed.dtype is torch.uint8
    assert packed.shape == (*shape, units, *after)
    assert torch.equal(unpack(packed, bits, axis), numbers)


def test_two_numbers_of_4_bits_and_four_of_2_fill_a_byte():
    assert pack(torch.tensor([1, 15], dtype=torch.uint8), 4, 0).tolist() == [0xF1]
    assert pack(torch.tensor([3, 0, 1, 2], dtype=torch.uint8), 2, 0).tolist() == [0b10_01_00_11]
    assert pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4, 0).tolist() == [0x31, 0x42]


# Errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_zero_is_rounded_down_to_the_nearest_number_of_16_bits(dtype):
    x = torch.cat((torch.randn(5000) * 10.0 ** torch.randint(-4, 4, (5000,)), torch.tensor([0.0, -0.0, 1.0, -1e-30])))
    low = below(x, dtype)
    above = torch.nextafter(low, torch.tensor(torch.inf, dtype=dtype))
    assert (low.float() <= x).all()
    assert (above.float() > x).all()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTHS)
@given(offset=st.floats(-300, 300), spread=st.sampled_from([0.0, 1e-3, 1.0, 40.0]), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_no_number_is_off_by_more_than_half_a_step(bits, stored, offset, spread, seed):
    levels = 2**bits - 1
    x = (offset + spread * torch.randn(32, 7, generator=torch.Generator().manual_seed(seed))).double()
    scale, zero = span(x, 0, levels, stored)
    got = decode(encode(x, scale, zero, levels), scale, zero, torch.float64)
    assert ((got - x).abs() <= scale.double() / 2 * (1 + 1e-12)).all()
    # And a step is what the group spans, but for what 16 bits lose: of the zero and of the step itself.
    lost, least = torch.finfo(stored).eps, torch.finfo(stored).tiny
    wanted = (x.amax(0) - x.amin(0) + x.amin(0).abs() * lost + 2 * least) / levels * (1 + lost)
    assert (scale[0].double() <= wanted.clamp_min(least)).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_keys_are_off_by_half_a_step_of_their_channel_and_values_of_their_token(bits, dtype):
    cache = layout(bits=bits, residual=0, dtype=dtype).new(batch_size=2)
    k, v = filled(cache, 24)
    store = cache.store(0)
    assert store.base == cache.length == 24
    got, blocks = held(cache), store.blocks.slice(0, store.num)
    rounded = torch.finfo(store.dtype).eps / 2
    for x, y, scale in (
        (k, got[0], blocks.k.scale.expand(-1, -1, -1, 4, -1).flatten(2, 3)),
        (v, got[1], blocks.v.scale.expand(-1, -1, -1, -1, -1, 3).flatten(4).flatten(2, 3)[..., :5]),
    ):
        error = (x.double() - y.double()).abs()
        # The rounding of zero + scale · code to the cache's dtype; in float32 also of the product before.
        assert (error <= scale.double() / 2 + 4 * rounded * (x.double().abs() + scale.double())).all()
        assert y.dtype is x.dtype


def test_a_channel_that_stands_out_does_not_blur_the_others():
    codec = Codec.of(KVSlot(1, 4, 4), torch.float32, bits=4, group_size=4, fit=span)
    k = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0))
    k[..., 2] += 500
    got, _ = codec.decode(codec.encode(k, k))
    others = [0, 1, 3]
    assert (got - k)[..., others].abs().max() < 0.15


def test_groups_that_are_all_one_number_and_padding_of_zeros_stay_finite_and_near():
    for value in (0.0, 3.7, -1e-30, 2000.0):
        cache = layout(residual=0, bits=2).new(batch_size=1)
        step = cache.begin(cache.next_positions(8), dense=True)
        cache.append(0, torch.full((1, 2, 8, 6), value), torch.full((1, 2, 8, 5), value), step)
        cache.commit(step)
        assert cache.store(0).num == 2
        for got in held(cache):
            assert torch.allclose(got, torch.tensor(value), rtol=1e-2, atol=1e-30)


@pytest.mark.parametrize(("v_head_dim", "groups", "channels"), [(64, 2, 32), (80, 3, 27), (7, 1, 7), (33, 2, 17)])
def test_values_have_groups_of_equal_size_whatever_the_head(v_head_dim, groups, channels):
    codec = Codec.of(KVSlot(1, 8, v_head_dim), torch.float32, bits=4, group_size=32, fit=span)
    k, v = torch.randn(1, 1, 32, 8), torch.randn(1, 1, 32, v_head_dim)
    blocks = codec.encode(k, v)
    assert blocks.v.codes.shape == (1, 1, 1, 16, groups, channels)
    got = codec.decode(blocks)[1]
    assert got.shape == v.shape
    assert (got - v).abs().max() < 9 / 15 / 2


# Which cells are packed


def test_the_last_cells_are_exactly_what_was_appended_and_older_ones_are_packed():
    cache = layout(residual=8).new(batch_size=2)
    ks, vs = [], []
    for count in (1, 5, 1, 1, 30, *[1] * 50):
        k, v, [(view, keys)] = advance(cache, count)
        ks.append(k)
        vs.append(v)
        for got, wanted in zip(view.dense(), (torch.cat(ks, dim=2), torch.cat(vs, dim=2)), strict=True):
            assert got.shape == wanted.shape
            last = min(cache.length, 8 + count)
            assert torch.equal(got[:, :, -last:], wanted[:, :, -last:])
            assert (got - wanted).abs().max() < 9 / 15 / 2
        assert keys.dense
    store = cache.store(0)
    assert cache.length - 8 - 4 < store.base + 4 <= cache.length
    assert store.one.shape[2] == 8 + 4


def test_what_a_block_holds_does_not_depend_on_the_passes():
    one, other = (layout(residual=0).new(batch_size=1) for _ in range(2))
    k, v = torch.randn(1, 2, 20, 6), torch.randn(1, 2, 20, 5)
    for cache, sizes in ((one, [20]), (other, [1, 3, 9, 2, 1, 1, 3])):
        for a, b in zip(k.split(sizes, dim=2), v.split(sizes, dim=2), strict=True):
            step = cache.begin(cache.next_positions(a.shape[2]), dense=True)
            cache.append(0, a, b, step)
            cache.commit(step)
    num = min(one.store(0).num, other.store(0).num)
    assert num == 4
    for name, tensor in one.store(0).blocks.slice(0, num).named().items():
        assert torch.equal(tensor, other.store(0).blocks.slice(0, num).named()[name]), name


def test_stored_blocks_are_never_written_again_while_the_text_goes_on():
    cache = layout().new(batch_size=1)
    filled(cache, 40)
    num = cache.store(0).num
    before = {name: t.clone() for name, t in cache.store(0).blocks.slice(0, num).named().items()}
    filled(cache, *[1] * 40, 9)
    cache.rollback(6)
    cache.fork()
    filled(cache, 3)
    assert cache.store(0).num > num
    for name, tensor in cache.store(0).blocks.slice(0, num).named().items():
        assert torch.equal(tensor, before[name]), name


def test_blocks_grow_geometrically(monkeypatch):
    from pluglm_caches import quantized_store

    sizes, right = [], quantized_store.moved
    monkeypatch.setattr(quantized_store, "moved", lambda old, axis, start, count, size: (
        sizes.append(size) if old.dtype is torch.uint8 else None, right(old, axis, start, count, size)
    )[1])  # fmt: skip
    cache = layout(bits=4).new(batch_size=1)
    filled(cache, *[1] * 500)
    assert cache.length == 500
    assert len(sizes) <= 2 * 13  # codes of keys and of values, at most log1.5(125) + 1 times each
    assert len(set(sizes)) == len(sizes) // 2


@pytest.mark.parametrize(("bits", "wanted"), [(8, 1 / 4), (4, 1 / 8), (2, 1 / 16)])
def test_nbytes_shows_the_bits(bits, wanted):
    """Of 4096 cells of float32, 64 channels: packed codes, and 16-bit scales and zeros for 32 numbers each."""
    slot, made = KVSlot(2, 64, 64), {}
    for name, options in (("dynamic", ()), ("quantized", (("bits", bits), ("residual", 0)))):
        provider = getattr(pluglm_caches, name)
        cache = provider.pluglm_build_cache(CacheRequest((slot,), ("dense",), "cpu", "float32", options=options)).new(
            batch_size=1, capacity=4096
        )
        step = cache.begin(cache.next_positions(4096), dense=True)
        cache.append(0, torch.zeros(1, 2, 4096, 64), torch.zeros(1, 2, 4096, 64), step)
        cache.commit(step)
        made[name] = sum(tensor.untyped_storage().nbytes() for tensor in cache.store(0).tensors())
    tail = 2 * 2 * 64 * 32 * 4
    assert made["quantized"] - tail == made["dynamic"] * (wanted + 2 * 2 / 32 / 4)


# Going back


def test_going_back_within_the_tail_touches_no_block():
    cache = layout(residual=8).new(batch_size=1)
    k, _ = filled(cache, 30)
    num = cache.store(0).num
    cache.crop(23)
    assert cache.store(0).num == num == 5
    assert torch.equal(held(cache)[0][:, :, 20:], k[:, :, 20:23])


def test_going_back_into_a_block_takes_its_first_cells_out_as_they_read():
    cache = layout(residual=8).new(batch_size=2)
    filled(cache, 41)
    before = [x.clone() for x in held(cache)]
    cache.crop(14)
    store = cache.store(0)
    assert (store.num, store.base, cache.length) == (3, 12, 14)
    for got, wanted in zip(held(cache), before, strict=True):
        assert torch.equal(got, wanted[:, :, :14])
    new = advance(cache, 1)[0]
    assert torch.equal(held(cache)[0], torch.cat((before[0][:, :, :14], new), dim=2))


def test_a_cell_that_is_packed_again_is_off_by_two_roundings_at_most():
    cache = layout(residual=0, bits=2).new(batch_size=1)
    k, _ = filled(cache, 12)
    first = cache.store(0).blocks.k.scale[:, :, 2].float()
    cache.crop(10)
    filled(cache, 6)
    second = cache.store(0).blocks.k.scale[:, :, 2].float()
    assert not torch.equal(first, second)
    error = (held(cache)[0][:, :, 8:10] - k[:, :, 8:10]).abs()
    assert (error <= (first + second) / 2 + 1e-6).all()


def test_forks_go_their_own_ways():
    cache = layout(residual=0).new(batch_size=2)
    filled(cache, 20)
    before = [x.clone() for x in held(cache)]
    fork = cache.fork()
    fork.crop(9)
    filled(fork, 5, 1, 1, 1, 20)
    fork.select(torch.tensor([1, 1]))
    for got, wanted in zip(held(cache), before, strict=True):
        assert torch.equal(got, wanted)
    after = [x.clone() for x in held(fork)]
    filled(cache, 30)
    cache.reset()
    for got, wanted in zip(held(fork), after, strict=True):
        assert torch.equal(got, wanted)


def test_rows_move_as_they_are_stored():
    cache = layout(residual=4).new(batch_size=3)
    filled(cache, 21)
    before = held(cache)[0].clone()
    cache.reorder(torch.tensor([2, 0, 0]))
    assert torch.equal(held(cache)[0], before[[2, 0, 0]])
    cache.repeat(2)
    cache.select(torch.tensor([0, 5]))
    assert torch.equal(held(cache)[0], before[[2, 0]])


def test_a_pass_that_fails_leaves_what_was_committed():
    cache = layout(residual=0).new(batch_size=1)
    filled(cache, 8)
    before = [x.clone() for x in held(cache)]
    for count in (1, 40):
        step = cache.begin(cache.next_positions(count), dense=True)
        cache.append(0, torch.randn(1, 2, count, 6), torch.randn(1, 2, count, 5), step)
    with pytest.raises(InputError, match="does not fit the cache"):
        cache.append(0, torch.randn(1, 2, 1, 6), torch.randn(1, 2, 1, 5), step)
    cache.crop(8)
    for got, wanted in zip(held(cache), before, strict=True):
        assert torch.equal(got, wanted)


def test_gradients_flow_within_a_pass_and_not_across_passes():
    cache = layout(residual=0).new(batch_size=1)
    first, second = (torch.randn(1, 2, count, 6, requires_grad=True) for count in (9, 1))
    for k in (first, second):
        step = cache.begin(cache.next_positions(k.shape[2]), dense=True)
        view = cache.append(0, k, torch.zeros(1, 2, k.shape[2], 5), step)
        cache.commit(step)
        view.dense()[0].sum().backward()
    assert torch.equal(first.grad, torch.ones_like(first))
    assert torch.equal(second.grad, torch.ones_like(second))


# Windows


@pytest.mark.parametrize("slot", [WINDOW, CHUNK])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
def test_windows_drop_whole_blocks_and_memory_stays_constant(slot, ragged):
    cache = layout((slot,), residual=4).new(batch_size=2)
    assert isinstance(cache.store(0), QuantizedStore)
    if ragged:
        advance(cache, positions=torch.tensor([[-1, -1, 0], [0, 1, 2]]))
    sizes = []
    for _ in range(250):
        advance(cache)
        sizes.append(cache.nbytes)
    assert set(sizes[90:170]) == set(sizes[170:])  # positions of ragged cells follow the blocks, by a few cells
    assert max(sizes[90:]) - min(sizes[90:]) <= (16 if ragged else 0) * 8 * 2
    store = cache.store(0)
    assert store.first >= cache.length - (16 + 16 + 4) - store.size
    assert store.first % 4 == 0


def test_a_view_of_a_window_begins_with_a_block_and_says_where():
    cache = layout((WINDOW, FULL), residual=4, views=("quantized",)).new(batch_size=1)
    k = torch.cat([advance(cache)[0] for _ in range(50)], dim=2)
    k2, _, [(view, keys), (_, full)] = advance(cache)
    assert isinstance(view, QuantizedView)
    assert keys.start is not None
    assert keys.start % 4 == 0
    assert 50 - 15 - 4 < keys.start <= 50 - 15
    got = view.dense()[0]
    assert got.shape[2] == keys.length == 51 - keys.start
    assert (got - torch.cat((k, k2), dim=2)[:, :, keys.start :]).abs().max() < 0.3
    assert (full.start, full.length) == (0, 51)


def test_a_window_no_longer_than_the_tail_is_kept_unpacked():
    cache = layout((WINDOW, CHUNK, FULL), residual=20, slack=4).new(batch_size=1)
    assert [type(cache.store(i)) for i in range(3)] == [WindowStore, WindowStore, QuantizedStore]


def test_as_many_cells_as_the_slack_can_be_taken_back_and_more_is_refused():
    cache = layout((WINDOW,), residual=4, slack=4).new(batch_size=1)
    for length in range(1, 120):
        advance(cache)
        fork = cache.fork()
        fork.rollback(min(4, length))
        _, _, [(_, keys)] = advance(fork)
        assert keys.positions[0].tolist()[-min(16, fork.length) :] == list(range(max(0, fork.length - 16), fork.length))
    with pytest.raises(CacheError, match=r"cannot go back to 60 cells[\s\S]*slack"):
        cache.crop(60)
    assert cache.length == 119


def test_a_long_prompt_of_a_windowed_model_leaves_only_its_window():
    cache = layout((WINDOW,), residual=4).new(batch_size=1)
    k, _, [(view, keys)] = advance(cache, 900)
    assert torch.equal(view.dense()[0], k)
    assert keys.length == 900
    store = cache.store(0)
    assert store.first > 900 - 40
    assert store.blocks.num <= 16


# Views, other slots


def test_the_view_is_decided_when_the_layout_is_built():
    made = layout(views=("dense", "quantized"))
    assert made.view == "quantized"
    cache = made.new(batch_size=1)
    assert isinstance(advance(cache, 30)[2][0][0], QuantizedView)
    dense = layout(views=("dense", "paged"))
    assert dense.view == "dense"
    other = dense.new(batch_size=1)
    assert isinstance(advance(other, 30)[2][0][0], DenseView)
    for got, wanted in zip(held(other), held(cache), strict=True):
        assert torch.equal(got, wanted)


def test_latents_and_the_encoders_keys_stay_in_full_precision():
    slots = (FULL, LatentSlot(5, 2), CrossSlot(1, 4, 4))
    cache = layout(slots, residual=0, views=("quantized", "dense")).new(batch_size=1)
    step = cache.begin(cache.next_positions(9), dense=True)
    rope, latent, encoded = torch.randn(1, 9, 2), torch.randn(1, 9, 5), torch.randn(1, 1, 3, 4)
    view = cache.append(1, rope, latent, step)
    cache.append(0, torch.randn(1, 2, 9, 6), torch.randn(1, 2, 9, 5), step)
    cache.set_cross(2, encoded, encoded, torch.arange(3)[None])
    cache.commit(step)
    assert isinstance(view, LatentView)
    assert torch.equal(cache.read(1).latent, latent)
    assert torch.equal(cache.cross(2)[0].dense()[0], encoded)


# Files


@pytest.mark.parametrize("slot", [FULL, WINDOW])
def test_a_file_holds_the_blocks_as_they_are(slot, tmp_path):
    cache = layout((slot,), residual=4).new(batch_size=2)
    filled(cache, 50, *[1] * 9)
    cache.save(tmp_path / "c", fingerprint="m")
    other = layout((slot,), residual=4).new(batch_size=1)
    filled(other, 7)
    other.load(tmp_path / "c", fingerprint="m")
    assert (other.length, other.batch_size) == (59, 2)
    for got, wanted in zip(held(other), held(cache), strict=True):
        assert torch.equal(got, wanted)
    one, two = advance(other)[2][0], advance(cache)[2][0]
    assert torch.equal(one[0].dense()[0], two[0].dense()[0])


@pytest.mark.parametrize("change", [{"bits": 8}, {"group_size": 8}])
def test_a_file_of_other_bits_or_blocks_is_refused(change, tmp_path):
    cache = layout(residual=0).new(batch_size=1)
    filled(cache, 24)
    cache.save(tmp_path / "c", fingerprint="m")
    other = layout(**{"residual": 0, **change}).new(batch_size=1)
    filled(other, 5)
    with pytest.raises(CacheError, match="bits and group_size must be those it was made with"):
        other.load(tmp_path / "c", fingerprint="m")
    assert other.length == 5


def test_a_file_with_a_block_less_than_it_says_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    cache = layout(residual=0).new(batch_size=1)
    filled(cache, 24)
    cache.save(tmp_path / "c", fingerprint="m")
    with safe_open(str(tmp_path / "c"), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "c")
    cut = {n: t[:, :, :-1].contiguous() if n.count(".") == 3 else t for n, t in tensors.items()}
    save_file(cut, tmp_path / "cut", metadata)
    with pytest.raises(CacheError, match="are not the 24 cells it says"):
        cache.load(tmp_path / "cut", fingerprint="m")
    del tensors["slots.0.v.zero"]
    save_file(tensors, tmp_path / "lacking", metadata)
    with pytest.raises(CacheError, match=r"it has \['k', 'k.codes'"):
        cache.load(tmp_path / "lacking", fingerprint="m")


def test_a_file_of_plain_cells_is_packed_and_a_packed_one_no_plain_layout_takes(tmp_path):
    dynamic = pluglm_caches.dynamic.pluglm_build_cache(CacheRequest((FULL,), ("dense",), "cpu", "float32"))
    plain = dynamic.new(batch_size=1)
    step = plain.begin(plain.next_positions(50), dense=True)
    k, v = torch.randn(1, 2, 50, 6), torch.randn(1, 2, 50, 5)
    plain.append(0, k, v, step)
    plain.commit(step)
    plain.save(tmp_path / "plain", fingerprint="m")
    cache = layout(residual=8).new(batch_size=1)
    cache.load(tmp_path / "plain", fingerprint="m")
    assert cache.store(0).num == 10
    got = held(cache)
    assert torch.equal(got[0][:, :, -8:], k[:, :, -8:])
    assert (got[0] - k).abs().max() < 0.3
    cache.save(tmp_path / "packed", fingerprint="m")
    with pytest.raises(CacheError, match="slot 0: it has .*k.codes.* and needs"):
        plain.load(tmp_path / "packed", fingerprint="m")
    assert plain.length == 50


# What it refuses


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bits": 3}, "its option bits is 8, 4 or 2, not 3"),
        ({"bits": 16}, "8, 4 or 2, not 16"),
        ({"bits": "4"}, "its option bits is a whole number from 2 on, not '4'"),
        ({"bits": True}, "whole number from 2 on, not True"),
        ({"group_size": 6}, "its option group_size is a multiple of 4, which fills bytes at every width, not 6"),
        ({"group_size": 0}, "its option group_size is a whole number from 4 on, not 0"),
        ({"residual": -1}, "its option residual is a whole number from 0 on, not -1"),
        ({"residual_length": 64}, "it has no option 'residual_length'"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(options, says):
    with pytest.raises(UnsupportedRequestError) as caught:
        layout(**options)
    assert any(says in reason for reason in caught.value.reasons), caught.value.reasons


def test_an_unknown_variant_and_a_backend_that_reads_neither_view_are_refused():
    with pytest.raises(UnsupportedRequestError, match="it has only hqq, so not 'quanto'"):
        layout(variant="quanto")
    with pytest.raises(UnsupportedRequestError, match="it gives the view 'dense', and the attention backend reads"):
        layout(views=("paged",))
    with pytest.raises(UnsupportedRequestError, match="it keeps the encoder's keys dense"):
        layout((FULL, CrossSlot(1, 4, 4)), views=("quantized",))


# The variant hqq


def test_without_its_package_hqq_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq", None)
    monkeypatch.setitem(sys.modules, "hqq.core.optimize", None)
    with pytest.raises(
        UnsupportedRequestError, match=r'needs the package hqq [\s\S]*pip install "pluglm-caches\[hqq\]"'
    ):
        layout(variant="hqq")
    assert layout().view == "dense"


@pytest.mark.parametrize("bits", [4, 2])
def test_hqq_makes_the_norm_of_no_group_larger_and_that_of_most_smaller(bits):
    pytest.importorskip("hqq.core.optimize")
    from pluglm_caches.hqq_backend import half_quadratic

    x, levels = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)).pow(3), 2**bits - 1
    errors = []
    for fit in (span, half_quadratic):
        scale, zero = fit(x, 1, levels, torch.bfloat16)
        errors.append((decode(encode(x, scale, zero, levels), scale, zero, x.dtype) - x).abs().pow(0.7).sum(1))
    plain, moved = errors
    assert (moved <= plain * (1 + 1e-5)).all()
    assert (moved < plain).float().mean() > 0.5


def test_a_cache_of_the_variant_packs_with_moved_zeros():
    pytest.importorskip("hqq.core.optimize")
    plain, moved = (
        layout(variant=variant, bits=2, residual=0, group_size=16).new(batch_size=2) for variant in (None, "hqq")
    )
    for cache in (plain, moved):
        filled(cache, 64)
    assert torch.equal(plain.store(0).blocks.k.scale, moved.store(0).blocks.k.scale)
    assert not torch.equal(plain.store(0).blocks.k.zero, moved.store(0).blocks.k.zero)


def test_hqq_stores_the_same_of_a_row_whatever_is_beside_it():
    pytest.importorskip("hqq.core.optimize")
    rows = torch.randn(2, 2, 16, 6) * torch.tensor([1.0, 30.0])[:, None, None, None]
    stored = []
    for batch in (rows, rows[:1]):
        cache = layout(variant="hqq", bits=2, residual=0).new(batch_size=len(batch))
        step = cache.begin(cache.next_positions(16), dense=True)
        cache.append(0, batch, batch[..., :5], step)
        cache.commit(step)
        stored.append(held(cache)[0][:1])
    assert torch.equal(*stored)
