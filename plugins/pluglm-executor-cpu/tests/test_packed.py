"""Packed weights run natively from the layers' own tensors, and compute what the layers compute."""

from __future__ import annotations

import dataclasses
from typing import Any

import pluglm_executor_cpu
import pytest
import torch
from native_models import Blocked, Nearest, Pair, llama, make, with_library, with_table
from pluglm_executor_cpu import native

from pluglm import InputError, UnsupportedRequestError
from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    Embedding,
    FeedForward,
    GroupedWeight,
    Head,
    KVSlot,
    Layer,
    MaskSpec,
    Norm,
    Part,
    Rope,
    RowBlocks,
)

pytestmark = with_library
NORM = Norm("rms", 64, 1e-5)
LIBRARY = native.library()
ISAS = LIBRARY.isas if LIBRARY is not None else []


def packable(*, biased: bool = False, gated: bool = True, activation: str = "silu") -> DecoderProgram:
    """Two layers whose inputs are multiples of 32, and whose outputs are no multiples of 16."""
    spec = AttentionSpec(4, 2, 24, 40, 0.2)
    biases = dict.fromkeys(("q_bias", "k_bias", "v_bias", "o_bias"), biased)

    def layer(slot: int) -> Layer:
        attention = Attention(spec, slot, rope=Rope("default", 100.0, 24), **biases)  # type: ignore[arg-type]
        mlp = FeedForward(64, 96, activation, gated=gated, bias=biased)
        return Layer((Branch((Part("attn", attention, norm_in=NORM),)), Branch((Part("mlp", mlp, norm_in=NORM),))))

    return llama(
        layer(0), layer(1), slots=(KVSlot(2, 24, 40), KVSlot(2, 24, 40)), embedding=Embedding(37, 64),
        final_norm=NORM, head=Head(tied=False, bias=biased),
    )  # fmt: skip


def apart(pair: Pair, got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    assert got.shape == want.shape
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def furthest(pair: Pair) -> float:
    """`apart` over passes of 1 to 16 tokens in one to five rows, in which the same cells are attended to."""
    worst = 0.0
    for rows, counts in ((1, (1, 3, 16, 1)), (2, (7, 8, 1)), (5, (2, 3, 1)), (13, (1, 1))):
        one, two = pair.cache(rows), pair.cache(rows)
        before = pair.executor.native_passes
        for i, count in enumerate(counts):
            ids = [[(7 * i + 5 * r + 3 * t) % 37 for t in range(count)] for r in range(rows)]
            worst = max(worst, apart(pair, pair.feed("cpu", one, ids), pair.feed("torch", two, ids)))
        assert pair.executor.native_passes == before + len(counts)
    return worst


#: A bound on `furthest`, of which the tests see a tenth.
EXACT = 2e-5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_logits_are_those_of_the_packed_layers(bits: int, offsets: bool, isa: str) -> None:
    pair = make(packable(), quantizer=Nearest(bits, offsets=offsets), threads=2, isa=isa)
    assert isinstance(pair.module.layers[0].attn.q, Blocked)
    assert furthest(pair) < EXACT


@pytest.mark.parametrize("bits", [{"head": 4, "gate": 4, "attn.k": 0, "": 8}, {"0.mlp": 0, "attn.q": 8, "": 4}])
@pytest.mark.parametrize("biased", [False, True])
def test_layers_of_any_bits_and_plain_ones_stand_side_by_side(bits: dict[str, int], biased: bool) -> None:
    assert furthest(make(packable(biased=biased), quantizer=Nearest(bits), threads=3)) < EXACT


def test_an_ungated_feed_forward_and_a_tied_head() -> None:
    program = dataclasses.replace(packable(gated=False, activation="gelu"), head=Head(tied=True))
    assert furthest(make(program, quantizer=Nearest(4), threads=1)) < EXACT


def test_in_bfloat16_what_is_rounded_is_what_is_cached() -> None:
    assert furthest(make(packable(biased=True), dtype="bfloat16", quantizer=Nearest(8), threads=1)) < 0.03


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_rounded_to_8_bits_differ_by_their_rounding_alone(bits: int, offsets: bool, isa: str) -> None:
    """Not 0, or nothing is rounded; every instruction set rounds alike."""
    quantizer = Nearest(bits, offsets=offsets)
    pair = make(packable(), quantizer=quantizer, threads=2, isa=isa, activations="int8")
    assert 1e-4 < furthest(pair) < 0.06
    plain = make(packable(), quantizer=quantizer, threads=1, isa="portable", activations="int8")
    ids = [[3, 1, 4, 1, 5, 9, 2]]
    got, want = (each.feed("cpu", each.cache(), ids) for each in (pair, plain))
    assert apart(pair, got, want) < 0.01  # a sum on the edge rounds to either side


def one_product(weight: GroupedWeight, x: torch.Tensor, isa: str, activations: str) -> torch.Tensor:
    """x [M, in] times a weight, by a model that is one matrix: its head, of token vectors that are the rows of x."""
    rows, columns = weight.codes.shape
    count = len(x)
    spec = AttentionSpec(1, 1, 8, 8, 1.0)
    silent = Layer((Branch((Part("attn", Attention(spec, 0)),)),))
    program = llama(
        silent, slots=(KVSlot(1, 8, 8),), embedding=Embedding(rows, columns), final_norm=None, head=Head(tied=False)
    )
    pair = make(program, quantizer=Nearest({"head": 8}), threads=1, isa=isa)
    with torch.no_grad():
        pair.module.embed.weight.zero_()[:count] = x
        pair.module.layers[0].attn.o.weight.zero_()
    pair.module.head = Blocked(RowBlocks.of(weight), None)
    options = (("threads", 1), ("isa", isa), ("activations", activations))
    executor = pluglm_executor_cpu.pluglm_build_executor(request=dataclasses.replace(pair.request, options=options))
    return dataclasses.replace(pair, executor=executor).feed("cpu", pair.cache(count), [[i] for i in range(count)])[
        :, 0
    ]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_and_rows_do_not_overflow(bits: int, activations: str, isa: str) -> None:
    """Every code at either end, x at both ends of its range: sums of 16 bits are at their widest. Also -128."""
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    codes = torch.full((40, 64), high, dtype=torch.int8)
    codes[1::2] = low
    codes[2::3, ::2] = low
    weight = GroupedWeight(bits, 32, codes, torch.full((40, 2), 0.5))
    x = torch.full((5, 64), 127.0)
    x[1] = -127.0
    x[2, ::2] = -127.0
    x[3, :32] = 0.0
    x[4] = torch.arange(64) - 32.0
    want = x.double() @ weight.dense().double().T
    got = one_product(weight, x, isa, activations)
    exact = slice(0, 4) if activations == "int8" else slice(0, 5)  # whole numbers of steps of 1
    assert torch.equal(got[exact].double(), want[exact])
    assert (got - want).abs().max() < 1e-2 * want.abs().max()


@pytest.mark.parametrize("isa", ISAS)
def test_scales_of_every_size_are_read_as_float16(isa: str) -> None:
    """Subnormal ones included; a NaN or infinity in x reaches the logits."""
    draw = torch.Generator().manual_seed(3)
    scale = torch.tensor([6e-8, 1e-6, 6.1e-5, 0.3, 60000.0]).repeat_interleave(8)[:, None].half().float()
    codes = torch.randint(-128, 128, (40, 32), generator=draw).to(torch.int8)
    weight, x = GroupedWeight(8, 32, codes, scale), torch.randn(4, 32, generator=draw)
    want = x.double() @ weight.dense().double().T
    got = one_product(weight, x, isa, "float32")
    assert ((got - want).abs() <= 1e-5 * want.abs().amax(dim=0)).all()
    x[1, 3], x[2, 30] = torch.nan, torch.inf
    for activations in ("float32", "int8"):
        got = one_product(weight, x, isa, activations)
        assert not got[1:3].isfinite().any()
        assert got[0].isfinite().all()
        assert got[3].isfinite().all()


# Token tables


def tied(**changed: Any) -> DecoderProgram:
    """101 tokens, which do not fill blocks of 16; all that a table goes through."""
    embedding = Embedding(101, 64, scale=8.0, learned_positions=310, position_offset=2)
    head = Head(tied=True, bias=True, scale=0.5, softcap=3.0)
    return dataclasses.replace(packable(), **{"embedding": embedding, "head": head, **changed})


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_token_of_a_packed_table_is_read_and_scored(bits: int, offsets: bool, isa: str) -> None:
    plain = make(tied(), quantizer=Nearest({"0.": 4, "": 8}), threads=1)
    pair = with_table(plain, bits, offsets=offsets, threads=2, isa=isa)
    one, two = pair.cache(), pair.cache()
    for first in range(0, 101, 13):
        ids = [list(range(first, min(first + 13, 101)))]
        assert apart(pair, pair.feed("cpu", one, ids), pair.feed("torch", two, ids)) < EXACT
    ids = [[100 - r - 7 * t for t in range(9)] for r in range(3)]
    assert apart(pair, pair.feed("cpu", pair.cache(3), ids), pair.feed("torch", pair.cache(3), ids)) < EXACT
    assert (pair.executor.native_passes, pair.executor.torch_passes) == (9, 0)
    with pytest.raises(InputError, match="run from 3 to 101"):
        pair.feed("cpu", one, [[3, 101]])


def test_a_packed_table_beside_plain_layers_in_bfloat16_and_with_rounded_activations() -> None:
    for dtype, options, low, high in (
        ("bfloat16", {}, 0.0, 0.03), ("float32", {}, 0.0, EXACT), ("float32", {"activations": "int8"}, 1e-4, 0.06),
    ):  # fmt: skip
        pair = with_table(make(tied(), dtype=dtype, threads=1), 8, threads=1, **options)
        ids = [[3, 1, 4, 100]]
        got, want = pair.feed("cpu", pair.cache(), ids), pair.feed("torch", pair.cache(), ids)
        assert low <= apart(pair, got, want) < high


def test_a_table_of_a_head_that_has_its_own_is_only_looked_up() -> None:
    plain = make(tied(head=Head(tied=False)), quantizer=Nearest({"head": 4, "": 8}), threads=1)
    pair = with_table(plain, 4, threads=1)
    ids = [[3, 1, 4, 100]]
    assert apart(pair, pair.feed("cpu", pair.cache(), ids), pair.feed("torch", pair.cache(), ids)) < EXACT


def test_a_table_is_read_where_it_lies() -> None:
    pair = with_table(make(tied(), quantizer=Nearest(8), threads=1), 8, threads=1)
    assert pair.executor._lowered.nbytes == 0
    before = pair.feed("cpu", pair.cache(), [[100]])
    pair.module.embed.codes[6, :, 4] = 0  # of token 100 = 6 * 16 + 4
    after = pair.feed("cpu", pair.cache(), [[100]])
    assert apart(pair, after, pair.feed("torch", pair.cache(), [[100]])) < EXACT
    assert not torch.equal(before, after)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_of_any_size_are_met_as_float32_whatever_the_count_of_rows(bits: int, isa: str) -> None:
    """What is met as whole numbers is not rounded more than float32's sums are; and tiles of rows end anywhere."""
    draw = torch.Generator().manual_seed(5)
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    codes = torch.randint(low, high, (24, 96), generator=draw).to(torch.int8)
    weight = GroupedWeight(bits, 32, codes, (torch.rand(24, 3, generator=draw) + 0.5).half().float())
    x = torch.randn(15, 96, generator=draw) * torch.logspace(-20, 15, 15)[:, None]
    x[:, 1::2] *= 1e-3
    x[3, :32], x[4, 32:64], x[5, 5] = 0.0, 1e-40, 8388607.0  # nothing, subnormal, and all 24 bits
    x[6, 0] = 16777215.0  # rounded up, and a step more
    dense = weight.dense().double()
    for rows in (x[:1], x[:3], x[3:8], x):
        got, want = one_product(weight, rows, isa, "float32"), rows.double() @ dense.T
        largest = rows.double().abs().view(-1, 3, 32).amax(dim=2)  # [rows, groups]
        bound = largest @ dense.abs().view(24, 3, 32).sum(dim=2).T
        assert ((got - want).abs() <= 3e-7 * bound + 1e-37).all()


# Whose memory


def test_blocks_are_read_where_the_layer_keeps_them() -> None:
    pair = make(packable(), quantizer=Nearest(4), threads=1)
    assert pair.executor._lowered.nbytes == 0
    before = pair.feed("cpu", pair.cache(), [[3]])
    pair.module.layers[1].mlp.down.codes.fill_(0x88)  # code 8 means 0
    after = pair.feed("cpu", pair.cache(), [[3]])
    assert apart(pair, after, pair.feed("torch", pair.cache(), [[3]])) < EXACT
    assert not torch.equal(before, after)


def test_a_layer_that_only_shows_its_weight_is_laid_out_once() -> None:
    pair = make(packable(biased=True), quantizer=Nearest(8, blocked=False), threads=1)
    assert furthest(pair) < EXACT
    assert pair.executor._lowered.nbytes > 8 * 64 * 64
    grouped = make(packable(), quantizer=Nearest({"o": 4, "down": 4}, group=32, offsets=True, blocked=False), threads=1)
    assert furthest(grouped) < EXACT


def test_new_tensors_of_a_layer_are_found_by_the_next_prompt() -> None:
    pair = make(packable(), quantizer=Nearest(8), threads=1)
    layer = pair.module.layers[0].attn.o
    layer.codes = layer.codes // 2
    one, two = pair.cache(), pair.cache()
    prompt = [list(range(20))]
    pair.feed("cpu", one, prompt)
    pair.feed("torch", two, prompt)
    assert apart(pair, pair.feed("cpu", one, [[5]]), pair.feed("torch", two, [[5]])) < EXACT


# Refusals


def refused(pair: Pair, **changed: Any) -> str:
    with pytest.raises(UnsupportedRequestError, match="cannot run this model") as caught:
        pluglm_executor_cpu.pluglm_build_executor(request=dataclasses.replace(pair.request, **changed))
    return "\n".join(caught.value.reasons)


def test_weights_that_do_not_fit_blocks_are_refused_with_the_reason() -> None:
    pair = make(packable(), quantizer=Nearest(8, blocked=False), threads=1)
    layer = pair.module.layers[1].mlp.down
    given = layer.grouped()
    layer._weight = GroupedWeight(8, 48, given.codes, given.scale[:, :2])
    assert refused(pair) == "layers.1.mlp.down is a Grouped: groups of 48 columns are not made of groups of 32"
    layer._weight = GroupedWeight(8, 32, given.codes[:50], given.scale[:50])
    assert refused(pair) == "layers.1.mlp.down is a Grouped: its blocks say [50, 96], the program [64, 96]"


def test_blocks_that_are_not_what_they_say_are_refused() -> None:
    pair = make(packable(), quantizer=Nearest(8), threads=1)
    layer = pair.module.layers[1].mlp.down
    layer.codes, layer.scale = layer.codes[1:], layer.scale.transpose(0, 1).contiguous().transpose(0, 1)
    said = refused(pair)
    assert "its codes is torch.int8 [3, 24, 16, 4] on cpu, not torch.int8 [4, 24, 16, 4]" in said
    assert "its scale is not contiguous" in said
    layer._sizes = (6, 64, 96)
    assert "its blocks are of 6 bits and 96 columns" in refused(pair)


def test_a_table_that_is_not_the_programs_or_shows_no_blocks_is_refused() -> None:
    pair = with_table(make(tied(), quantizer=Nearest(8), threads=1), 8, threads=1)
    blocks = pair.module.embed.blocks
    pair.module.embed._sizes = (8, 99, 64)
    assert refused(pair) == "embed is a BlockedTable: its blocks say [99, 64], the program [101, 64]"
    pair.module.embed = Blocked(blocks, None)  # has blocks, but cannot be looked up
    assert "1 layers are Blocked (the first is embed)" in refused(pair)
    assert "the token table's as a BlockedEmbedding" in refused(pair)


def test_rounding_is_an_option_of_packed_weights_alone() -> None:
    plain = make(packable(), threads=1)
    assert "the model has none" in refused(plain, options=(("activations", "int8"),))
    assert "one of float32, int8, not 'int4'" in refused(plain, options=(("activations", "int4"),))


# Prompts


@pytest.mark.parametrize("layout", ["dynamic", "static", "hybrid"])
def test_prompts_run_natively_in_slices_of_one_pass(layout: str) -> None:
    """Also ragged ones, with a window, and whichever logits are kept; then decoding goes on."""
    program = packable()
    windowed = program.layers[1]
    part = windowed.branches[0].parts[0]
    assert isinstance(part.op, Attention)
    op = dataclasses.replace(part.op, spec=dataclasses.replace(part.op.spec, mask=MaskSpec(window=9)))
    layer = Layer((Branch((dataclasses.replace(part, op=op),)), windowed.branches[1]))
    program = dataclasses.replace(
        program, layers=(program.layers[0], layer), slots=(KVSlot(2, 24, 40), KVSlot(2, 24, 40, window=9))
    )
    pair = make(program, quantizer=Nearest({"0.": 4, "": 8}), layout=layout, threads=2)
    for rows, count, keep in ((1, 17, 1), (1, 70, 0), (3, 23, 7), (2, 40, 20), (5, 4, 0)):
        one, two = pair.cache(rows, 150), pair.cache(rows, 150)
        before = pair.executor.native_passes
        for again in range(2):
            ids = [[(again + 5 * r + 3 * t) % 37 for t in range(count)] for r in range(rows)]
            first = 0 if again == 0 else count
            positions = [[first + t - 3 * r * (first == 0) for t in range(count)] for r in range(rows)]
            positions = [[max(p, -1) for p in row] for row in positions]
            got = pair.feed("cpu", one, ids, positions, logits_to_keep=keep)
            want = pair.feed("torch", two, ids, positions, logits_to_keep=keep)
            real = torch.tensor(positions)[:, count - want.shape[1] :] >= 0
            assert got.shape == want.shape
            assert apart(pair, got[real], want[real]) < EXACT
        last = [[r] for r in range(rows)]
        assert apart(pair, pair.feed("cpu", one, last), pair.feed("torch", two, last)) < EXACT
        assert pair.executor.native_passes == before + 3


def test_a_prompt_that_fails_leaves_the_cache_as_it_was() -> None:
    pair = make(packable(), quantizer=Nearest(8), threads=1)
    cache = pair.cache()
    pair.feed("cpu", cache, [[1, 2]])
    with pytest.raises(InputError, match="run from 1 to 99"):
        pair.feed("cpu", cache, [[1] * 30 + [99]])
    assert cache.length == 2
    twin = pair.cache()
    pair.feed("cpu", twin, [[1, 2]])
    assert torch.equal(pair.feed("cpu", cache, [[3]]), pair.feed("cpu", twin, [[3]]))


def test_prompts_that_may_not_be_cut_go_through_torch() -> None:
    """A token that sees later ones; angles that depend on how long a pass is; and texts that torch reads faster."""
    both_ways = packable()
    part = both_ways.layers[0].branches[0].parts[0]
    assert isinstance(part.op, Attention)
    spec = dataclasses.replace(part.op.spec, mask=MaskSpec(causal=False, chunk=8))
    rope = Rope("dynamic", 100.0, 24, parameters=(("factor", 3.0),), max_seq_len=23)
    for op in (dataclasses.replace(part.op, spec=spec), dataclasses.replace(part.op, rope=rope)):
        layer = Layer((Branch((dataclasses.replace(part, op=op),)), both_ways.layers[0].branches[1]))
        program = dataclasses.replace(both_ways, layers=(layer,), slots=both_ways.slots[:1])
        pair = make(program, quantizer=Nearest(8), threads=1)
        pair.feed("cpu", pair.cache(), [[1] * 17])
        assert (pair.executor.native_passes, pair.executor.torch_passes) == (0, 1)
    pair = make(packable(), quantizer=Nearest(8), threads=1)
    pair.feed("cpu", pair.cache(capacity=pair.executor._longest + 1), [[1] * (pair.executor._longest + 1)])
    assert (pair.executor.native_passes, pair.executor.torch_passes) == (0, 1)
