"""Experts against a loop over tokens in float64; what is read, what rows may hold, what is refused."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pluglm_blocks import OPS, BuildContext
from pluglm_blocks.experts import MixtureOfExperts, Weights, clamped_gate
from pluglm_blocks.pass_state import PassPlan
from torch import nn

from pluglm.contracts import Branch, Experts, FeedForward, Layer, ModelDescription, ModelParts, Part, WeightMap
from pluglm.errors import UnsupportedRequestError

C, F = 20, 28
EXPERT = FeedForward(C, F, "silu")


def silu(v):
    return v / (1 + math.exp(-v))


ACT = {"silu": silu, "relu": lambda v: max(v, 0.0), "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2}


def build(toy, op, dtype=torch.float32, kernels=None, seed=3):
    program = toy.program(slots=())
    description = ModelDescription("toy", program, WeightMap(()), toy.V, C, 0, 64, (), ())
    parts = ModelParts(description, None, kernels or {}, "cpu", "float32")
    context = BuildContext(program, parts, PassPlan((), toy.PlainAttention()), dtype, OPS)
    assert OPS["experts"].refusals(op, context) == []
    module = OPS["experts"].build(op, context)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.requires_grad_(False)


def tokens(n, seed=5):
    return torch.randn(n, C, generator=torch.Generator().manual_seed(seed))


def one(ff, w, x):
    """One feed-forward of one token, in float64. w: name -> (weight, bias or None)."""

    def linear(name, v):
        weight, bias = w[name]
        return weight @ v if bias is None else weight @ v + bias

    up = linear("up", x)
    if not ff.gated:
        act = torch.tensor([ACT[ff.activation](v) for v in up.tolist()], dtype=torch.float64)
        return ff.down_scale * linear("down", act)
    gate = [ACT[ff.activation](ff.gate_scale * v) for v in linear("gate", x).tolist()]
    return ff.down_scale * linear("down", torch.tensor(gate, dtype=torch.float64) * up)


def clamped(op, w, x):
    """gpt-oss's expert, element by element."""
    gate, up = (w[n][0] @ x + (0 if w[n][1] is None else w[n][1]) for n in ("gate", "up"))
    h = []
    for g, u in zip(gate.tolist(), up.tolist(), strict=True):
        g, u = min(op.expert.gate_scale * g, op.clamp), max(-op.clamp, min(u, op.clamp))
        h.append(g / (1 + math.exp(-op.alpha * g)) * (u + 1))
    y = w["down"][0] @ torch.tensor(h, dtype=torch.float64)
    return op.expert.down_scale * (y if w["down"][1] is None else y + w["down"][1])


def routed(op, logits, correction):
    """[(expert, weight)] of one token: plain Python over a list of E logits."""
    E = op.num_experts
    if op.scoring == "sigmoid":
        scores = [1 / (1 + math.exp(-v)) for v in logits]
    else:
        total = sum(math.exp(v) for v in logits)
        scores = [math.exp(v) / total for v in logits]
    rank = [s + c for s, c in zip(scores, correction, strict=True)]
    size = E // op.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(op.num_groups)]
    best = 2 if op.correction_bias else 1
    groups.sort(key=lambda members: -sum(sorted((rank[e] for e in members), reverse=True)[:best]))
    allowed = [e for members in groups[: op.top_k_groups] for e in members]
    chosen = sorted(allowed, key=lambda e: -rank[e])[: op.top_k]
    weights = [scores[e] for e in chosen]
    if op.normalise or op.scoring == "softmax_topk":  # a softmax over the chosen is the softmax over all, divided
        weights = [w / sum(weights) for w in weights]
    return [(e, w * op.scale) for e, w in zip(chosen, weights, strict=True)]


def reference(op, module, x):
    """[N, C] -> [N, C], token by token, expert by expert, in float64."""
    p = {name: tensor.double() for name, tensor in module.named_parameters()}
    x, out = x.double(), []

    def weights(prefix, e=None):
        found = {}
        for name in ("gate", "up", "down"):
            if f"{prefix}{name}.weight" in p:
                weight, bias = p[f"{prefix}{name}.weight"], p.get(f"{prefix}{name}.bias")
                found[name] = (weight, bias) if e is None else (weight[e], None if bias is None else bias[e])
        return found

    for row in x:
        logits = p["router.weight"] @ row + p.get("router.bias", 0)
        correction = p.get("router.correction_bias", torch.zeros(op.num_experts)).tolist()
        y = torch.zeros(C, dtype=torch.float64)
        for e, weight in routed(op, logits.tolist(), correction):
            y += weight * (clamped(op, weights("", e), row) if op.clamp else one(op.expert, weights("", e), row))
        if op.shared is not None:
            shared = one(op.shared, weights("shared."), row)
            y += torch.sigmoid(p["shared_gate.weight"][0] @ row) * shared if op.shared_gate else shared
        out.append(y)
    return torch.stack(out)


@st.composite
def mixtures(draw):
    groups = draw(st.integers(1, 3))
    per_group = draw(st.integers(2 if groups > 1 else 1, 4))
    scoring = draw(st.sampled_from(["softmax", "sigmoid"] + ["softmax_topk"] * (groups == 1)))
    top_k_groups = draw(st.integers(1, groups))
    clamp = draw(st.sampled_from([None, 0.8]))
    gated = clamp is not None or draw(st.booleans())
    shared = draw(st.sampled_from([None, replace(EXPERT, intermediate_size=12), replace(EXPERT, bias=True)]))
    return Experts(
        replace(
            EXPERT, gated=gated, bias=draw(st.booleans()),
            activation="silu" if clamp else draw(st.sampled_from(sorted(ACT))),
            gate_scale=draw(st.sampled_from([1.0, 0.6])) if gated else 1.0,
            down_scale=draw(st.sampled_from([1.0, 1.7])),
        ),
        num_experts=groups * per_group,
        top_k=draw(st.integers(1, top_k_groups * per_group)),
        scoring=scoring,
        normalise=scoring == "softmax_topk" or draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
        router_bias=draw(st.booleans()),
        correction_bias=scoring != "softmax_topk" and draw(st.booleans()),
        num_groups=groups,
        top_k_groups=top_k_groups,
        shared=shared,
        shared_gate=shared is not None and draw(st.booleans()),
        clamp=clamp,
        alpha=1.702 if clamp else 1.0,
    )  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(op=mixtures(), n=st.sampled_from([1, 2, 7]))
def test_experts_are_what_a_loop_over_tokens_computes(toy, op, n):
    module, x = build(toy, op), tokens(n)
    found = module(x[None], None)
    assert found.shape == (1, n, C)
    torch.testing.assert_close(found[0].double(), reference(op, module, x), atol=3e-5, rtol=3e-5)


OPS_TO_TRY = {
    "mixtral": Experts(EXPERT, 8, 2, "softmax"),
    "qwen": Experts(EXPERT, 8, 3, "softmax", normalise=False, shared=EXPERT, shared_gate=True),
    "gpt-oss": Experts(replace(EXPERT, bias=True), 8, 3, "softmax_topk", router_bias=True, clamp=7.0, alpha=1.702),
    "deepseek": Experts(
        EXPERT, 8, 3, "sigmoid", scale=2.5, correction_bias=True, num_groups=4, top_k_groups=2, shared=EXPERT
    ),
}
named = pytest.mark.parametrize("op", OPS_TO_TRY.values(), ids=OPS_TO_TRY)


@named
def test_a_token_does_not_depend_on_the_rest_of_the_batch(toy, op):
    module, x = build(toy, op), tokens(12)
    together = module(x.view(3, 4, C), None).view(12, C)
    alone = torch.cat([module(row[None, None], None)[0] for row in x])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@named
def test_what_a_padding_row_holds_reaches_no_other_row(toy, op):
    module, x = build(toy, op), tokens(10).view(2, 5, C)
    plain = module(x, None)
    for padding in (0.0, 1e30, float("inf"), float("nan")):
        spoilt = x.clone()
        spoilt[0, :2] = padding
        found = module(spoilt, None)
        torch.testing.assert_close(found[0, 2:], plain[0, 2:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[1], plain[1], atol=1e-5, rtol=1e-5)


@named
@pytest.mark.parametrize("n", [1, 4])
def test_only_the_chosen_experts_are_read_each_once_and_nothing_is_copied(toy, op, n, monkeypatch):
    module, x, read = build(toy, op), tokens(n), []
    whole = Weights.of

    def of(self, expert, rows):
        if self is module.up:
            read.append((expert, len(rows)))
        return whole(self, expert, rows)

    monkeypatch.setattr(Weights, "of", of)
    chosen = module.router(x)[1]
    module(x[None], None)
    assert sorted(e for e, _ in read) == sorted(set(chosen.flatten().tolist()))
    assert sum(rows for _, rows in read) == n * op.top_k
    # An expert that is not chosen may hold anything: its weights take no part in any product.
    unchosen = [e for e in range(op.num_experts) if e not in set(chosen.flatten().tolist())]
    before = module(x[None], None)
    for weights in (module.gate, module.up, module.down):
        weights.weight[unchosen] = float("nan")
    torch.testing.assert_close(module(x[None], None), before, rtol=0, atol=0)
    assert module.up.weight[0].data_ptr() == module.up.weight.data_ptr()  # an expert's matrix is a view


@named
def test_in_16_bits_the_choice_is_that_of_the_scores_in_float32(toy, op):
    module = build(toy, op, dtype=torch.bfloat16)
    x = tokens(64).bfloat16()
    weights, chosen = module.router(x)
    wide = build(toy, op, dtype=torch.float32)
    for name, parameter in wide.named_parameters():
        parameter.data.copy_(module.get_parameter(name))
    expected, also = wide.router(x.float())
    assert weights.dtype == torch.float32
    assert torch.equal(chosen, also)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    found = module(x[None], None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wide(x.float()[None], None), atol=0.15, rtol=0.05)


def test_the_correction_bias_is_float32_in_any_model(toy):
    module = build(toy, OPS_TO_TRY["deepseek"], dtype=torch.bfloat16)
    assert {n: p.dtype for n, p in module.named_parameters() if p.dtype != torch.bfloat16} == {
        "router.correction_bias": torch.float32
    }


def test_scores_that_are_all_zero_give_weights_of_zero(toy):
    op = Experts(EXPERT, 4, 2, "sigmoid", router_bias=True)
    module = build(toy, op)
    module.router.bias.fill_(-1e4)
    assert torch.equal(module(tokens(3)[None], None), torch.zeros(1, 3, C))


def test_a_kernel_for_the_gated_activation_is_used(toy):
    seen = []

    def kernel(gate, up, activation):
        seen.append(activation)
        return 2 * gate * up

    module = build(toy, OPS_TO_TRY["mixtral"], kernels={"gated_act": kernel})
    found = module(tokens(1)[None], None)
    w, chosen = module.router(tokens(1))
    parts = [(module.gate.weight[e], module.up.weight[e], module.down.weight[e]) for e in chosen[0]]
    x = tokens(1)[0]
    expected = sum(s * (d @ (2 * (g @ x) * (u @ x))) for s, (g, u, d) in zip(w[0], parts, strict=True))
    torch.testing.assert_close(found[0, 0], expected, atol=1e-5, rtol=1e-5)
    assert seen == ["silu", "silu"]


def test_the_clamped_activation_limits_gate_above_only_and_up_on_both_sides():
    gate, up = torch.tensor([-9.0, 9.0, 1.0, 1.0]), torch.tensor([0.5, 0.5, 9.0, -9.0])
    found = clamped_gate(gate, up, 7.0, 1.702)
    expected = [g / (1 + math.exp(-1.702 * g)) * (u + 1) for g, u in ((-9.0, 0.5), (7.0, 0.5), (1.0, 7.0), (1.0, -7.0))]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_quantizers_find_the_shared_expert_alone(toy):
    module = build(toy, OPS_TO_TRY["qwen"])
    assert [name for name, m in module.named_modules() if isinstance(m, nn.Linear)] == [
        "shared.gate", "shared.up", "shared.down",
    ]  # fmt: skip


def test_parameters_have_the_documented_names_and_shapes(toy):
    op = Experts(
        replace(EXPERT, bias=True), 6, 2, "sigmoid", router_bias=True, correction_bias=True,
        shared=replace(EXPERT, intermediate_size=12), shared_gate=True,
    )  # fmt: skip
    assert {name: tuple(p.shape) for name, p in build(toy, op).named_parameters()} == {
        "router.weight": (6, C), "router.bias": (6,), "router.correction_bias": (6,),
        "gate.weight": (6, F, C), "gate.bias": (6, F), "up.weight": (6, F, C), "up.bias": (6, F),
        "down.weight": (6, C, F), "down.bias": (6, C),
        "shared.gate.weight": (12, C), "shared.up.weight": (12, C), "shared.down.weight": (C, 12),
        "shared_gate.weight": (1, C),
    }  # fmt: skip


def test_a_decoder_is_built_with_experts(toy, ids):
    made = toy.program(Layer((Branch((Part("mlp", OPS_TO_TRY["mixtral"], norm_in=toy.norm()),)),)), slots=())
    module = toy.build(made, attention=False)
    assert isinstance(module.layers[0].mlp, MixtureOfExperts)
    assert module.layers[0].mlp.gate.weight.shape == (8, F, C)
    assert toy.run(module, ids).logits.shape == (*ids.shape, toy.V)


REFUSED = {
    "expert: its hidden_size is 21, the model's 20": {"expert": replace(EXPERT, hidden_size=21)},
    "shared expert: its hidden_size is 21, the model's 20": {"shared": replace(EXPERT, hidden_size=21)},
    "scoring 'tanh' is not one of softmax, softmax_topk, sigmoid": {"scoring": "tanh"},
    "9 experts cannot be chosen among 8": {"top_k": 9},
    "0 experts cannot be chosen among 8": {"top_k": 0},
    "a softmax over the chosen experts is normalised, it cannot be otherwise":
        {"scoring": "softmax_topk", "normalise": False},
    "a correction_bias needs scores of all experts, softmax_topk has those of the chosen ones":
        {"scoring": "softmax_topk", "correction_bias": True},
    "shared_gate is for a shared expert, and there is none": {"shared_gate": True},
    "alpha 1.702 belongs to a clamp, and there is none": {"alpha": 1.702},
    "a clamp of -1.0 leaves nothing of the gate": {"clamp": -1.0},
    "a clamp is defined for gated experts with silu (gate * sigmoid(alpha * gate))":
        {"clamp": 7.0, "expert": replace(EXPERT, activation="gelu")},
    "2 groups cannot be chosen among 1": {"top_k_groups": 2},
    "8 experts cannot be dealt into 3 groups": {"num_groups": 3},
    "8 experts cannot be dealt into 0 groups": {"num_groups": 0},
    "5 groups cannot be chosen among 4": {"num_groups": 4, "top_k_groups": 5},
    "groups are chosen by scores of all experts, softmax_topk has those of the chosen ones":
        {"scoring": "softmax_topk", "num_groups": 4},
    "a group's score is the sum of its best two experts, and a group has one":
        {"num_groups": 8, "top_k_groups": 2, "correction_bias": True},
    "3 experts cannot be chosen from 1 groups of 2": {"top_k": 3, "num_groups": 4},
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_experts_that_cannot_be_built_are_refused(toy, reason):
    op = replace(Experts(EXPERT, 8, 2), **REFUSED[reason])
    with pytest.raises(UnsupportedRequestError) as caught:
        toy.build(toy.program(Layer((Branch((Part("mlp", op),)),)), slots=()), attention=False)
    assert caught.value.reasons == (f"layers.0.mlp: {reason}",)
