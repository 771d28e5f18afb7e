"""The state space against a recurrence in float64; against itself in pieces, padded and alone; and what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pluglm_blocks import build_decoder
from pluglm_blocks.ragged import Ragged
from pluglm_blocks.state_space import recurrence, segment_sums, ssd

from pluglm.contracts import (
    Branch,
    DecoderProgram,
    Embedding,
    FeedForward,
    Head,
    KVSlot,
    Layer,
    ModelDescription,
    ModelParts,
    Norm,
    Part,
    StateSlot,
    StateSpace,
    WeightMap,
)
from pluglm.errors import InputError, UnsupportedRequestError

B, T, C, V = 3, 23, 20, 37
OP = StateSpace(
    slot=0, inner_size=30, num_heads=6, head_dim=5, num_groups=3, state_size=7, conv_kernel=4, chunk_size=8,
    norm=Norm("rms", 30, 1e-5, cast_late=True), norm_groups=2, in_bias=True, out_bias=True, dt_min=0.02, dt_max=0.5,
    multipliers=(0.8, 1.4, 0.6, 1.7, 1.2),
)  # fmt: skip


class StateCache:
    """States in place during a pass, as `Cache.state` promises; the least that a state space needs."""

    def __init__(self, program, rows):
        self.length, self.slots = 0, program.slots
        self.states = [
            {name: torch.zeros(rows, *shape, dtype=torch.float32) for name, shape, _ in slot.states}
            for slot in program.slots
            if isinstance(slot, StateSlot)
        ]

    def begin(self, positions, *, dense=False, prefix_lengths=None, segments=None):
        self.count = positions.shape[1]
        return self

    def state(self, slot):
        return self.states[slot]

    def commit(self, step):
        self.length += self.count


def program(op=OP, *, layers=2, **changes):
    made = tuple(
        Layer(
            (
                Branch((Part("ssm", replace(op, slot=i), norm_in=Norm("rms", C, 1e-5)),)),
                Branch((Part("mlp", FeedForward(C, 28, "silu"), norm_in=Norm("rms", C, 1e-5)),)),
            )
        )
        for i in range(layers)
    )
    slots = changes.pop("slots", (op.state_slot,) * layers)
    return DecoderProgram(Embedding(V, C), made, Norm("rms", C, 1e-5), Head(False), slots, max_seq_len=None, **changes)


@pytest.fixture(scope="module")
def module(toy):
    return toy.build(program(), attention=False)


@pytest.fixture(scope="module")
def token_ids():
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(3))


def same(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# The two forms


def inputs(seed=0, tokens=T):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, tokens, 6, 5, generator=g)
    dt = torch.rand(B, tokens, 6, generator=g) * 0.5
    A = -torch.rand(6, generator=g) * 4 - 0.05
    Bm, Cm = torch.randn(2, B, tokens, 3, 7, generator=g)
    return x, dt, A, Bm, Cm, torch.randn(B, 6, 5, 7, generator=g)


def naive(x, dt, A, Bm, Cm, h):
    """Dao & Gu 2024, equation 2, a token, a row and a head at a time in float64."""
    x, dt, A, Bm, Cm, h = (t.double() for t in (x, dt, A, Bm, Cm, h))
    y, h = torch.zeros_like(x), h.clone()
    for b in range(x.shape[0]):
        for head in range(x.shape[2]):
            group = head // (x.shape[2] // Bm.shape[2])
            for t in range(x.shape[1]):
                h[b, head] *= torch.exp(dt[b, t, head] * A[head])
                h[b, head] += dt[b, t, head] * torch.outer(x[b, t, head], Bm[b, t, group])
                y[b, t, head] = h[b, head] @ Cm[b, t, group]
    return y.float(), h.float()


@pytest.mark.parametrize("started", [False, True], ids=["from zero", "from a state"])
def test_the_blocked_form_is_the_recurrence_for_every_chunk_size(started):
    *given, h = inputs()
    h = h if started else torch.zeros_like(h)
    y, end = naive(*given, h)
    for chunk_size in (1, 2, 7, 8, 22, 23, 256):
        found = ssd(*given, h, chunk_size)
        same(found[0], y, 1e-5)
        same(found[1], end, 1e-5)


def test_one_token_after_another_is_the_recurrence():
    x, dt, A, Bm, Cm, h = inputs(1)
    wanted, end = naive(x, dt, A, Bm, Cm, h)
    outputs = []
    for t in range(T):
        y, h = recurrence(x[:, t : t + 1], dt[:, t : t + 1], A, Bm[:, t : t + 1], Cm[:, t : t + 1], h)
        outputs.append(y)
    same(torch.cat(outputs, 1), wanted, 1e-5)
    same(h, end, 1e-5)


def test_a_time_step_of_zero_leaves_the_state_as_it_was_bit_by_bit():
    x, dt, A, Bm, Cm, h = inputs(2)
    assert torch.equal(ssd(x, torch.zeros_like(dt), A, Bm, Cm, h, 5)[1], h)
    assert torch.equal(recurrence(x[:, :1], 0 * dt[:, :1], A, Bm[:, :1], Cm[:, :1], h)[1], h)


def test_decays_stay_exact_where_the_sum_of_all_is_large():
    """Differences of cumulative sums would lose what two neighbours differ by behind a token with a large step."""
    a = torch.full((64,), -1e-3)
    a[0] = -1e5
    found = torch.exp(segment_sums(a))
    wanted = torch.exp(segment_sums(a.double())).float()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert torch.equal(found, found.tril())


# The whole mixer


def formula(op, p, x):
    """Dao & Gu 2024, section 7.1 for one row [T, C], in float64, from the parameters `p` of the mixer."""
    p = {name: tensor.double() for name, tensor in p.items()}
    GN, silu = op.num_groups * op.state_size, F.silu
    projected = x.double() @ p["in_proj.weight"].T + p.get("in_proj.bias", 0.0)
    sizes = (op.inner_size, op.inner_size, GN, GN, op.num_heads)
    z, x, Bm, Cm, dt = (
        part * scale for part, scale in zip(projected.split(sizes, -1), op.multipliers or (1.0,) * 5, strict=True)
    )
    u = torch.cat((x, Bm, Cm), -1)
    u = torch.cat((u.new_zeros(op.conv_kernel - 1, u.shape[1]), u))
    taps = p["conv.weight"][:, 0]  # [channels, kernel]
    u = torch.stack([(u[t : t + op.conv_kernel].T * taps).sum(1) for t in range(len(x))]) + p.get("conv.bias", 0.0)
    u = {"silu": silu, "relu": F.relu}[op.activation](u)
    dt = F.softplus(dt + p["dt_bias"]).clamp(op.dt_min, op.dt_max)
    xs = u[:, : op.inner_size].unflatten(1, (op.num_heads, op.head_dim))
    Bm, Cm = (t.unflatten(1, (op.num_groups, -1)) for t in u[:, op.inner_size :].split(GN, -1))
    y, _ = naive(
        xs[None],
        dt[None],
        -p["A_log"].exp(),
        Bm[None],
        Cm[None],
        xs.new_zeros(1, op.num_heads, op.head_dim, op.state_size),
    )
    y = (y[0].double() + p["D"][:, None] * xs).flatten(1)
    if op.norm is None:
        y = y * silu(z)
    else:
        y = y if op.norm_before_gate else y * silu(z)
        parts = y.unflatten(1, (op.norm_groups, -1))
        if op.norm.kind == "layer":
            parts = parts - parts.mean(-1, keepdim=True)
        parts = parts / (parts.square().mean(-1, keepdim=True) + op.norm.eps).sqrt()
        y = parts.flatten(1)
        y = y * (p["norm.weight"] + op.norm.offset) if op.norm.weight else y
        y = y + p["norm.bias"] if op.norm.bias else y
        y = y * silu(z) if op.norm_before_gate else y
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": None, "norm_groups": 1, "in_bias": False},
        {"norm_before_gate": True, "norm_groups": 1, "out_bias": False},
        {"conv_bias": False, "multipliers": None, "activation": "relu", "conv_kernel": 1, "dt_max": None},
        {"norm": Norm("layer", 30, 1e-5, bias=True, offset=0.5, cast_late=True), "norm_groups": 3},
        {"norm": Norm("rms", 30, 1e-5, weight=False), "num_groups": 1, "conv_kernel": 2},
    ],
)
def test_the_mixer_is_its_formula(toy, token_ids, changes):
    op = replace(OP, **changes)
    module = toy.build(
        replace(program(op, layers=1), final_norm=None, head=Head(tied=True)), attention=False
    )  # fmt: skip
    prefix = "layers.0.ssm."
    p = {name.removeprefix(prefix): t for name, t in module.named_parameters() if name.startswith(prefix)}
    mixer, x = module.layers[0].ssm, module.embed(token_ids)
    seen = []
    handle = mixer.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    toy.run(module, token_ids)
    handle.remove()
    ((given, found),) = seen
    assert given.shape == x.shape == found.shape
    for row in range(B):
        same(found[row], formula(op, p, given[row]).float())


@pytest.mark.parametrize("splits", [(T,), (9, 14), (1,) * T, (5, 1, 1, 16), (2, 21)])
def test_a_pass_with_a_cache_equals_one_without(toy, module, token_ids, splits):
    cache, logits = StateCache(program(), B), []
    for piece in token_ids.split(splits, 1):
        logits.append(toy.run(module, piece, cache=cache).logits)
    same(torch.cat(logits, 1), toy.run(module, token_ids).logits)
    assert cache.length == T


def test_the_chunk_size_changes_no_logits(toy, token_ids):
    results = [
        toy.run(toy.build(program(replace(OP, chunk_size=n)), attention=False), token_ids).logits for n in (3, 64)
    ]
    same(*results)


def test_a_mixer_of_a_convolution_without_a_tail_keeps_none(toy, token_ids):
    op = replace(OP, conv_kernel=1)
    module, cache = toy.build(program(op), attention=False), StateCache(program(op), B)
    assert cache.state(0)["conv"].shape == (B, op.conv_size, 0)
    found = [toy.run(module, piece, cache=cache).logits for piece in token_ids.split((6, 1, 16), 1)]
    same(torch.cat(found, 1), toy.run(module, token_ids).logits)


def test_gradients_flow_through_a_cached_pass(module, token_ids, toy):
    """The pass before it is written over in place, which must not reach into the graph."""
    from pluglm.contracts import ForwardInput

    cache = StateCache(program(), B)
    toy.run(module, token_ids[:, :4], cache=cache)
    before = [{name: t.clone() for name, t in kept.items()} for kept in cache.states]
    module.zero_grad()
    positions = torch.arange(4, T)[None]
    module(ForwardInput(token_ids[:, 4:], positions, cache, dense=True)).logits.square().mean().backward()
    found = module.layers[0].ssm.A_log.grad.clone()
    module.zero_grad()
    cache.states, cache.length = before, 4
    logits = torch.cat(
        [
            module(ForwardInput(token_ids[:, t : t + 1], torch.tensor([[t]]), cache, dense=True)).logits
            for t in range(4, T)
        ],
        1,
    )
    logits.square().mean().backward()
    assert found.abs().min() > 0
    same(found, module.layers[0].ssm.A_log.grad, 1e-4)
    module.zero_grad()


# Padding


@pytest.fixture(scope="module")
def alone(toy, module, token_ids):
    """[B, T, V]: the logits of each row by itself."""
    return torch.cat([toy.run(module, row[None]).logits for row in token_ids])


#: Which cells of a pass are real, row by row; a digit is the row's next token, a dash is padding.
LAYOUTS = {
    "left": ("--xxxxx", "xxxxxxx", "-----xx"),
    "right": ("xxxxx--", "xxxxxxx", "xx-----"),
    "between": ("x-xx--x", "-xx-x-x", "x-----x"),
    "whole rows": ("xxxxxxx", "-------", "---xx--"),
}


def positions(layout, starts):
    """[B, cells] positions of a layout, each row counting from where it was."""
    rows = []
    for row, start in zip(layout, starts, strict=True):
        places = torch.tensor([cell == "x" for cell in row])
        rows.append(torch.where(places, places.cumsum(0) - 1 + start, -1))
    return torch.stack(rows)


def laid_out(token_ids, where):
    """The tokens at these positions, padding filled with a token that must not matter."""
    return torch.where(where < 0, 5, token_ids.gather(1, where.clamp(min=0)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padded_row_is_the_row_alone_without_a_cache(toy, module, token_ids, alone, layout):
    where = positions(LAYOUTS[layout], (0, 0, 0))
    found = toy.run(module, laid_out(token_ids, where), positions=where).logits
    for row in range(B):
        real = where[row] >= 0
        same(found[row][real], alone[row, : int(real.sum())])


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_padding_in_any_pass_leaves_both_states_of_its_row_alone(toy, module, token_ids, alone, first, second):
    """A padded pass, another one, and single tokens with some rows padded: logits and states are each row's own."""
    cache, done = StateCache(program(), B), (0, 0, 0)
    for layout in (LAYOUTS[first], LAYOUTS[second], "xxx", ("x", "-", "x"), ("-", "-", "x"), ("xx", "-x", "--")):
        where = positions(layout, done)
        found = toy.run(module, laid_out(token_ids, where), positions=where, cache=cache).logits
        done = tuple(start + int((row >= 0).sum()) for start, row in zip(done, where, strict=True))
        for row in range(B):
            real = where[row] >= 0
            same(found[row][real], alone[row, where[row][real]])
    for row in range(B):
        own = StateCache(program(), 1)
        toy.run(module, token_ids[row : row + 1, : done[row]], cache=own)
        for padded, plain in zip(cache.states, own.states, strict=True):
            same(padded["conv"][row], plain["conv"][0])
            same(padded["ssm"][row], plain["ssm"][0])


def test_a_row_of_padding_keeps_its_states_bit_by_bit(toy, module, token_ids):
    cache = StateCache(program(), B)
    toy.run(module, token_ids[:, :9], cache=cache)
    before = [{name: t.clone() for name, t in kept.items()} for kept in cache.states]
    for width in (1, 5):
        where = positions(("x" * width, "-" * width, "x" * width), (9, 9, 9))
        toy.run(module, laid_out(token_ids, where), positions=where, cache=cache)
        for then, now in zip(before, cache.states, strict=True):
            for name in ("conv", "ssm"):
                assert torch.equal(then[name][1], now[name][1])
                assert not torch.equal(then[name][0], now[name][0])


def test_positions_of_one_row_serve_the_whole_batch(toy, module, token_ids):
    where = positions(("-xx-x",), (0,))
    found = toy.run(module, laid_out(token_ids, where.expand(B, 5)), positions=where).logits
    same(found[:, where[0] >= 0], toy.run(module, token_ids[:, :3]).logits)


def test_ragged_moves_real_tokens_to_the_front_and_back():
    where = torch.tensor([[-1, 4, -1, 5, 6], [-1, -1, -1, -1, -1]])
    ragged = Ragged.of(where)
    moved = ragged.to_front(where[:, :, None])
    assert moved[:, :, 0].tolist() == [[4, 5, 6, -1, -1], [-1] * 5]
    assert ragged.real.tolist() == [[True] * 3 + [False] * 2, [False] * 5]
    assert ragged.counts.tolist() == [[3], [0]]
    assert torch.equal(ragged.to_places(moved)[:, :, 0], where)


# dtypes


@pytest.mark.parametrize("kept", [False, True], ids=["in bfloat16", "in float32"])
def test_the_residual_stream_is_kept_in_float32_if_the_program_says_so(toy, token_ids, kept):
    module = toy.build(program(float32_residual=kept), attention=False, dtype="bfloat16")
    out = toy.run(module, token_ids, output_hidden_states=True)
    assert out.logits.dtype is torch.bfloat16
    assert {h.dtype for h in out.hidden_states[:-1]} == {torch.float32 if kept else torch.bfloat16}
    x = out.hidden_states[1]
    assert bool((x == x.bfloat16()).all()) is not kept  # float32 holds what bfloat16 would have rounded away
    exact = toy.build(program(), attention=False)
    assert (out.logits.float() - toy.run(exact, token_ids).logits).abs().max() < 0.3


def test_bfloat16_in_pieces_is_bfloat16_at_once(toy, token_ids):
    module, cache = toy.build(program(), attention=False, dtype="bfloat16"), StateCache(program(), B)
    found = [toy.run(module, piece, cache=cache).logits for piece in token_ids.split((6, 1, 1, 15), 1)]
    same(torch.cat(found, 1).float(), toy.run(module, token_ids).logits.float(), 0.1)


# Refusals


def refused(op=OP, **changes):
    made = program(op, layers=1, **changes)
    description = ModelDescription("toy", made, WeightMap(()), V, C, 1, None, (), made.slots)
    with pytest.raises(UnsupportedRequestError) as caught:
        build_decoder(made, ModelParts(description, None, {}, "cpu", "float32"))
    return caught.value.reasons


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state_size": 0}, "state_size is 0; it must be above zero"),
        ({"chunk_size": -1}, "chunk_size is -1; it must be above zero"),
        ({"head_dim": 4}, "6 heads of 4 dimensions do not make an inner_size of 30"),
        ({"num_groups": 4}, "4 groups do not divide 6 heads"),
        ({"activation": "gelo"}, "activation 'gelo' is not one of silu, gelu"),
        ({"dt_min": -1.0}, "a time step between -1.0 and 0.5 is none at all, or runs backwards"),
        ({"dt_min": 0.6}, "a time step between 0.6 and 0.5 is none at all, or runs backwards"),
        ({"multipliers": (1.0, 2.0)}, "2 multipliers for z, x, B, C and dt, which are five"),
        ({"norm": None}, "norm_groups and norm_before_gate are of a norm, and there is none"),
        ({"norm": Norm("rms", 29, 1e-5)}, "the gated norm has size 29, the inner_size is 30"),
        ({"norm": Norm("rms", 30, 1e-5, bias=True)}, "an rms norm has no bias"),
        ({"norm_groups": 4}, "4 groups of the norm do not divide an inner_size of 30"),
    ],
)
def test_a_state_space_that_cannot_be_built_is_refused(changes, reason):
    assert any(found.startswith(f"layers.0.ssm: {reason}") for found in refused(replace(OP, **changes)))


def test_every_reason_is_told_at_once():
    assert len(refused(replace(OP, num_groups=4, activation="gelo", dt_min=-1.0))) == 3


@pytest.mark.parametrize("slot", [KVSlot(3, 8, 8), StateSlot((("conv", (72, 3), None),))])
def test_a_slot_that_holds_something_else_is_refused(slot):
    (reason,) = refused(slots=(slot,))
    assert reason.startswith("layers.0.ssm: slot 0 is ")
    assert "the layer needs StateSlot(states=(('conv', (72, 3), None), ('ssm', (6, 5, 7), 'float32'))" in reason


def test_packed_sequences_are_refused_before_anything_is_written(toy, module, token_ids):
    cache = StateCache(program(), B)
    with pytest.raises(InputError) as caught:
        toy.run(module, token_ids, cache=cache, segments=torch.zeros(B, T, dtype=torch.int64))
    for words in ("cannot take packed sequences", "run on from one segment", "a row of its own"):
        assert words in str(caught.value)
    assert not hasattr(cache, "count")
