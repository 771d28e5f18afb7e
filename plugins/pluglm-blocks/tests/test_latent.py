"""Latent attention against its formula in float64, its two ways against each other, and cached against uncached."""

from dataclasses import replace

import pytest
import torch
from pluglm_blocks import latent

from pluglm.contracts import (
    AttentionSpec,
    Branch,
    CacheRequest,
    FeedForward,
    KVSlot,
    LatentAttention,
    LatentSlot,
    Layer,
    MaskSpec,
    Part,
    Rope,
    SharedSlot,
)
from pluglm.errors import UnsupportedRequestError

H, N, DR, DV, R, Q_RANK, EPS = 6, 5, 4, 7, 12, 9, 1e-3
T = 11
ROPE = Rope("default", 30.0, DR, interleaved=True)


def op(slot=0, *, window=None, **changes):
    spec = AttentionSpec(H, H, N + DR, DV, 0.4, MaskSpec(window=window))
    return replace(LatentAttention(spec, slot, N, ROPE, Q_RANK, R, EPS), **changes)


def program(toy, *ops):
    layers = tuple(
        Layer(
            (
                Branch((Part("attn", o, norm_in=toy.norm()),)),
                Branch((Part("mlp", FeedForward(toy.C, toy.F, "silu"), norm_in=toy.norm()),)),
            )
        )
        for o in ops
    )
    return toy.program(*layers, slots=tuple(LatentSlot(R, DR) for _ in ops))


@pytest.fixture
def plain(toy):
    """A backend that reads latents too."""

    class ReadsLatents(toy.PlainAttention):
        views = ("dense", "latent")

    return ReadsLatents


@pytest.fixture
def build(toy, plain):
    """Layers of these ops, with random weights and a backend that keeps what it was given."""

    def make(*ops, backend=None):
        module = toy.build(program(toy, *ops), backend=backend or plain())
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "norm" in name:  # or all scores would be about equal
                    parameter += 1
        return module

    return make


def cache(layout, rows, count=1):
    import pluglm_caches

    request = CacheRequest(tuple(LatentSlot(R, DR) for _ in range(count)), ("dense", "latent"), "cpu", "float32")
    return getattr(pluglm_caches, layout).pluglm_build_cache(request=request).new(batch_size=rows, capacity=T)


def same(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def naive(p, x, positions, *, bias=False, low_rank=True, interleaved=True, scale=0.4):
    """[T, C] of one row through the attention of layer 0 in float64, one head and one query at a time."""
    w = {key.removeprefix("layers.0.attn."): value.double() for key, value in p.items() if ".attn." in key}

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + (w[f"{name}.bias"] if bias and f"{name}.bias" in w else 0)

    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w[f"{name}.weight"]

    def rotated(x):
        speeds = 30.0 ** (-torch.arange(0, DR, 2, dtype=torch.float64) / DR)
        turn = torch.polar(torch.ones(len(positions), DR // 2, dtype=torch.float64), positions[:, None] * speeds)
        if interleaved:
            return torch.view_as_real(torch.complex(x[:, ::2], x[:, 1::2]) * turn).flatten(1)
        half = torch.complex(x[:, : DR // 2], x[:, DR // 2 :]) * turn
        return torch.cat((half.real, half.imag), -1)

    q = linear("q_up", norm("q_norm", linear("q_down", x))) if low_rank else linear("q", x)
    down = linear("kv_down", x)
    c, k_rope = norm("kv_norm", down[:, :R]), rotated(down[:, R:])
    heads = []
    for h in range(H):
        of_head = q[:, h * (N + DR) : (h + 1) * (N + DR)]
        k, v = c @ w["k_up"][h].T, c @ w["v_up"][h].T  # [T, N], [T, Dv]
        q_rope = rotated(of_head[:, N:])
        rows = []
        for t in range(len(x)):
            scores = torch.stack([of_head[t, :N] @ k[s] + q_rope[t] @ k_rope[s] for s in range(t + 1)]) * scale
            rows.append(scores.softmax(0) @ v[: t + 1])
        heads.append(torch.stack(rows))
    return linear("o", torch.cat(heads, -1))


@pytest.mark.parametrize("expanded", [True, False], ids=["expanded", "absorbed"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, {}),
        ({"bias": True}, {"bias": True}),
        ({"q_rank": None}, {"low_rank": False}),
        ({"rope": replace(ROPE, interleaved=False)}, {"interleaved": False}),
        ({"q_rank": None, "bias": True}, {"bias": True, "low_rank": False}),
    ],
    ids=["low-rank", "biases", "full-queries", "halves", "full-queries-biases"],
)
def test_a_layer_is_its_formula(build, ids, changes, said, expanded, toy, monkeypatch):
    monkeypatch.setattr(latent.Way, "__call__", lambda way, T, S: way.expanded is expanded)
    module = build(op(**changes))
    hidden = toy.run(module, ids, output_hidden_states=True).hidden_states
    p = {key: value.detach() for key, value in module.named_parameters()}
    seen = []
    module.layers[0].attn.register_forward_hook(lambda _, given, result: seen.append((given[0], result)))
    toy.run(module, ids)
    ((given, result),) = seen
    same(given, module.layers[0].attn_norm_in(hidden[0]))
    for row, wanted in zip(result, given, strict=True):
        same(row.double(), naive(p, wanted.double(), torch.arange(T), **said), 1e-5)


def test_parameters_are_those_that_the_program_names(build):
    names = {key.removeprefix("layers.0.attn."): tuple(value.shape) for key, value in
             build(op(bias=True)).named_parameters() if ".attn." in key}  # fmt: skip
    assert names == {
        "q_down.weight": (Q_RANK, 20), "q_down.bias": (Q_RANK,), "q_norm.weight": (Q_RANK,),
        "q_up.weight": (H * (N + DR), Q_RANK), "kv_down.weight": (R + DR, 20), "kv_down.bias": (R + DR,),
        "kv_norm.weight": (R,), "k_up": (H, N, R), "v_up": (H, DV, R), "o.weight": (20, H * DV), "o.bias": (20,),
    }  # fmt: skip
    full = {key.removeprefix("layers.0.attn.") for key, _ in build(op(q_rank=None)).named_parameters()}
    assert "q.weight" in full
    assert not {"q_down.weight", "q_norm.weight", "q_up.weight", "q.bias"} & full


@pytest.mark.parametrize("window", [None, 3])
def test_the_two_ways_agree(build, ids, toy, monkeypatch, window):
    logits = {}
    for expanded in (True, False):
        with monkeypatch.context() as m:
            m.setattr(latent.Way, "__call__", lambda way, T, S, wanted=expanded: way.expanded is wanted)
            module = build(op(0, window=window), op(1))
            past = cache("dynamic", toy.B, 2)
            logits[expanded] = [toy.run(module, piece, cache=past).logits for piece in ids.split((5, 1, 5), 1)]
    for one, other in zip(logits[True], logits[False], strict=True):
        same(one, other)
        assert not torch.equal(one, other), "they are computed in different orders"


@pytest.mark.parametrize("layout", ["dynamic", "static"])
@pytest.mark.parametrize("splits", [(T,), (4, 7), (1,) * T, (5, 1, 1, 4)])
def test_a_pass_with_a_cache_equals_one_without(build, ids, toy, layout, splits):
    module, past = build(op(0), op(1, window=3)), cache(layout, toy.B, 2)
    found = [toy.run(module, piece, cache=past).logits for piece in ids.split(splits, 1)]
    same(torch.cat(found, 1), toy.run(module, ids).logits)
    assert past.length == T


def test_the_cache_holds_a_latent_and_a_rotary_key_a_token(build, ids, toy):
    module, past = build(op()), cache("dynamic", toy.B)
    toy.run(module, ids, cache=past)
    view = past.read(0)
    assert view.kind == "latent"
    assert (tuple(view.latent.shape), tuple(view.rope.shape)) == ((toy.B, T, R), (toy.B, T, DR))


@pytest.mark.parametrize("layout", [None, "dynamic", "static"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_row_equals_the_row_alone(build, ids, toy, layout, side):
    module = build(op(0), op(1, window=3))
    alone = toy.run(module, ids[1:, :7]).logits[0]
    left = {"left": 4, "right": 0, "both": 3}[side]
    batch, positions = ids.clone(), torch.arange(T).repeat(2, 1)
    batch[1, left : left + 7] = ids[1, :7]
    positions[1] = -1
    positions[1, left : left + 7] = torch.arange(7)
    if layout is None:
        found = toy.run(module, batch, positions=positions).logits
    else:
        past = cache(layout, 2, 2)
        pieces = zip(batch.split((6, 1, 4), 1), positions.split((6, 1, 4), 1), strict=True)
        found = torch.cat([toy.run(module, x, positions=at, cache=past).logits for x, at in pieces], 1)
    same(found[1, left : left + 7], alone)
    same(found[:1], toy.run(module, ids[:1]).logits)
    assert found.isfinite().all()


def test_packed_segments_equal_the_sequences_apart(build, ids, toy):
    module = build(op())
    packed = torch.cat((ids[0, :4], ids[1, :7]))[None]
    positions = torch.cat((torch.arange(4), torch.arange(7)))[None]
    found = toy.run(module, packed, positions=positions, segments=torch.tensor([[0] * 4 + [1] * 7])).logits
    same(found[:, :4], toy.run(module, ids[:1, :4]).logits)
    same(found[:, 4:], toy.run(module, ids[1:, :7]).logits)


def test_a_backend_is_given_only_specs_that_the_program_announces_and_one_mask_a_pass(build, ids, toy, plain):
    backend, announced = plain(), program(toy, op(0), op(1)).attention_specs()
    module, past = build(op(0), op(1), backend=backend), cache("dynamic", toy.B, 2)
    for piece in ids.split((6, 5), 1):
        toy.run(module, piece, cache=past)
    assert announced == (op().spec, op().absorbed)
    assert [spec for spec, _ in backend.prepared] == list(announced)
    assert (op().absorbed.num_kv_heads, op().absorbed.head_dim, op().absorbed.v_head_dim) == (1, R + DR, R)


@pytest.mark.parametrize(
    ("new", "keys", "expanded"),
    [(1, 1, True), (9, 9, True), (1, 2, False), (1, 9000, False), (170, 10**6, False), (172, 10**6, True)],
)
def test_a_pass_goes_the_way_that_multiplies_less(new, keys, expanded):
    """DeepSeek-V3's sizes."""
    spec = AttentionSpec(128, 128, 192, 128, 192**-0.5)
    v3 = LatentAttention(spec, 0, 128, replace(ROPE, dim=64), 1536, 512, 1e-6)
    assert latent.way_of(v3, expanded=True)(new, keys) is expanded
    assert latent.way_of(v3, expanded=False)(new, keys) is not expanded


def test_latents_that_are_smaller_than_keys_and_values_are_never_expanded():
    assert not latent.way_of(op(kv_rank=5), expanded=True)(9, 9)


REFUSED = {
    "6 heads have 3 keys; expanded latents give each its own": {"spec": {"num_kv_heads": 3}},
    "head_dim 8 is not nope_dim 5 + rope dim 4": {"spec": {"head_dim": 8}},
    "2 ALiBi slopes for 6 heads": {"spec": {"alibi_slopes": (0.5, 0.25)}},
    "sinks and a bias on scores are parameters that latent attention does not have": {"spec": {"sinks": True}},
    "q_rank is 0, not a positive number": {"q_rank": 0},
    "rope 'linear' needs the parameters ['factor']": {"rope": replace(ROPE, kind="linear")},
    "slot 0 holds (latent, rotary) sizes (12, 4), the layer needs (13, 4)": {"kv_rank": 13},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_an_op_that_cannot_be_built_is_refused(build, reason):
    changes = dict(REFUSED[reason])
    spec = replace(op().spec, **changes.pop("spec", {}))
    with pytest.raises(UnsupportedRequestError) as caught:
        build(op(spec=spec, **changes))
    assert f"layers.0.attn: {reason}" in caught.value.reasons


def test_a_slot_of_another_kind_is_refused(toy, plain):
    made = program(toy, op(0), op(1))
    for slot, kind in ((KVSlot(H, N + DR, DV), "kv"), (SharedSlot(0), "shared")):
        with pytest.raises(UnsupportedRequestError) as caught:
            toy.build(replace(made, slots=(made.slots[0], slot)), backend=plain())
        assert caught.value.reasons == (
            f"layers.1.attn: slot 1 is a {kind} slot; latent attention needs one of its own for latents",
        )


def test_a_backend_that_does_not_read_latents_is_refused(toy):
    with pytest.raises(UnsupportedRequestError) as caught:
        toy.build(program(toy, op()))
    assert caught.value.reasons == ("layers.0.attn: attention backend plain does not read latent views",)


def test_latent_attention_without_a_backend_is_refused(toy):
    with pytest.raises(UnsupportedRequestError, match=r"layers\.0\.attn: no attention backend was given"):
        toy.build(program(toy, op()), attention=False)


def test_a_backend_may_refuse_the_absorbed_spec(toy, plain):
    class Small(plain):
        def refusals(self, spec):
            return [f"heads of {spec.head_dim} are too large"] if spec.head_dim > 10 else []

    with pytest.raises(UnsupportedRequestError) as caught:
        toy.build(program(toy, op()), backend=Small())
    assert caught.value.reasons == ("attention backend plain: heads of 16 are too large",)
