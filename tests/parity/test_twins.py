"""Each knob of each program matters: with that one broken, on the same weights, the logits are clearly others.

Without these twins the parity tests could pass on checkpoints that do not use what they seem to test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import kit
import knobs
import pytest
import torch
from checkpoints import VARIANTS
from rewriting import Weights, nodes
from torch import Tensor

from pluglm.contracts import DecoderProgram, Experts, Rope, StateSpace
from pluglm.lm import LanguageModel

Loaded = Callable[..., LanguageModel]

#: A broken twin is at least this far from the model, ten times what parity allows.
CLEARLY = 1e-3
#: Of twins with experts: the products of an expert's few rows may add the same numbers in another order.
ROUNDING = 1e-5
#: A text beyond every stretched length and window, and one below.
TEXTS = (kit.prompt(90)[None], kit.prompt(20)[None])


@pytest.fixture(scope="module")
def sound(loaded: Loaded) -> Callable[[str], tuple[DecoderProgram, Weights, list[Tensor]]]:
    """Variant -> its program, its weights, and the logits of `TEXTS`."""

    @cache
    def model(name: str) -> tuple[DecoderProgram, Weights, list[Tensor]]:
        lm = loaded(name)
        program = lm.model.description.program
        assert program is not None
        return program, dict(lm.model.module.state_dict()), [kit.run(lm.model.module, text) for text in TEXTS]

    return model


def distance(lm: LanguageModel, program: DecoderProgram, weights: Weights, logits: list[Tensor]) -> float:
    """How far the logits of a twin are from `logits` at most; infinitely, where they are no numbers any more."""
    module = kit.build(program, lm)
    module.load_state_dict({name: weights[name] for name, _ in module.named_parameters()})
    far = [(kit.run(module, text) - want).abs().max() for text, want in zip(TEXTS, logits, strict=True)]
    return float(torch.stack(far).nan_to_num(nan=torch.inf).max())


def renamed(weights: Weights) -> Weights:
    """The weights also under the names that some twins want: norms moved to the other side, a head of its own."""
    more = dict(weights)
    for name, tensor in weights.items():
        more.setdefault(name.replace("_norm_in", "_norm_out"), tensor)
        more.setdefault(name.replace("_norm_out", "_norm_in"), tensor)
    more.setdefault("head.weight", weights["embed.weight"].roll(1, dims=0))
    return more


@pytest.mark.parametrize("name", VARIANTS)
def test_an_unbroken_twin_is_the_model_itself(name: str, sound: Any, loaded: Loaded) -> None:
    program, weights, logits = sound(name)
    has_experts = any(isinstance(op, Experts) for op in program.ops())
    assert distance(loaded(name), program, weights, logits) <= (ROUNDING if has_experts else 0.0)


@pytest.mark.parametrize("knob", knobs.KNOBS)
def test_a_twin_with_one_knob_broken_gives_other_logits(knob: str, sound: Any, loaded: Loaded) -> None:
    found: dict[str, float] = {}
    for name in VARIANTS:
        program, weights, logits = sound(name)
        broken = knobs.KNOBS[knob](program)
        if broken is not None:
            found[name] = distance(loaded(name), broken, renamed(weights), logits)
    assert found, "no checkpoint has this knob"
    assert {name: d for name, d in found.items() if not d > CLEARLY} == {}, "these checkpoints do not need it"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_field_that_a_program_uses_is_broken_by_some_twin(name: str, sound: Any) -> None:
    program, _, _ = sound(name)
    broken: set[str] = set()
    for knob in knobs.KNOBS.values():
        twin = knob(program)
        broken |= set() if twin is None else set(differing(program, twin))
    missing = used(program) - broken - set(knobs.NOT_BROKEN)
    assert not missing


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    "pair",
    [
        ("mlp.gate", "mlp.up"),
        ("attn.k", "attn.v"),
        ("attn_norm", "mlp_norm"),
        ("norm_in", "norm_out"),
        ("q_norm", "k_norm"),
        ("ssm.A_log", "ssm.D"),
    ],
)
def test_a_twin_with_two_weights_exchanged_gives_other_logits(
    name: str, pair: tuple[str, str], sound: Any, loaded: Loaded
) -> None:
    program, weights, logits = sound(name)
    one, other = pair
    exchanged = {key: weights.get(_exchange(key, one, other), tensor) for key, tensor in weights.items()}
    same_shapes = all(exchanged[key].shape == tensor.shape for key, tensor in weights.items())
    if not same_shapes or not all(any(name in key for key in weights) for name in pair):
        pytest.skip("this model does not have both, or not of one size")
    assert distance(loaded(name), program, exchanged, logits) > CLEARLY


@pytest.mark.parametrize("name", VARIANTS)
def test_a_twin_whose_query_heads_read_the_wrong_keys_gives_other_logits(name: str, sound: Any, loaded: Loaded) -> None:
    """Head h reads key head h % K instead of h // (H / K): the query heads are dealt out like cards. Or h - 1 if K = H."""
    program, weights, logits = sound(name)
    if not program.attention_specs():
        pytest.skip("this model has no attention")
    spec = program.attention_specs()[0]
    H, K, D = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if K == 1:
        pytest.skip("there is one key head, which all query heads read")
    order = torch.arange(H).view(H // K, K).T.reshape(-1) if K < H else torch.arange(H).roll(1)  # [H], place -> head
    dealt = dict(weights)
    for key, tensor in weights.items():
        if ".attn.q." in key or ".attn.q_up." in key or (".attn.q_norm." in key and tensor.shape[0] == H * D):
            dealt[key] = tensor.unflatten(0, (H, D))[order].flatten(0, 1)
        if ".attn.o.weight" in key:
            dealt[key] = tensor.unflatten(1, (H, spec.v_head_dim))[:, order].flatten(1, 2)
    assert distance(loaded(name), program, dealt, logits) > CLEARLY


@pytest.mark.parametrize("name", VARIANTS)
def test_a_twin_whose_states_read_the_wrong_groups_gives_other_logits(name: str, sound: Any, loaded: Loaded) -> None:
    """Head h of a state space reads B and C of group h % G instead of h // (H / G)."""
    program, weights, logits = sound(name)
    op = next((op for op in program.ops() if isinstance(op, StateSpace)), None)
    if op is None or op.num_groups == 1:
        pytest.skip("this model has no state space, or one whose heads all read the same group")
    H, G, P, inner = op.num_heads, op.num_groups, op.head_dim, op.inner_size
    heads = torch.arange(H).view(H // G, G).T.reshape(-1) if G < H else torch.arange(H).roll(1)  # [H], place -> head
    channels = (heads[:, None] * P + torch.arange(P)).reshape(-1)  # [I]
    rest = torch.arange(inner, op.conv_size)
    orders = {  # of the rows of each parameter; out_proj has the channels as columns
        "in_proj": torch.cat((channels, inner + channels, inner + rest, inner + op.conv_size + heads)),
        "conv": torch.cat((channels, rest)),
        "norm": channels, "dt_bias": heads, "A_log": heads, "D": heads,
    }  # fmt: skip
    dealt = dict(weights)
    for key, tensor in weights.items():
        _, _, own = key.partition(".ssm.")
        if own.partition(".")[0] in orders:
            dealt[key] = tensor[orders[own.partition(".")[0]]]
        elif own == "out_proj.weight":
            dealt[key] = tensor[:, channels]
    assert distance(loaded(name), program, dealt, logits) > CLEARLY


def _exchange(key: str, one: str, other: str) -> str:
    return key.replace(one, other) if one in key else key.replace(other, one)


def used(program: DecoderProgram) -> set[str]:
    """Fields, as "Class.field", whose value in this program is not the field's default."""
    found = set()
    for node in nodes(program):
        kind = type(node).__name__
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            structure = isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])
            if kind == "Rope" and field.name == "parameters":
                found |= {f"Rope.parameters.{name}" for name, _ in value}
            elif value != field.default and not structure:
                found.add(f"{kind}.{field.name}")
    return found - {
        "Attention.spec",
        "AttentionSpec.mask",
        "Part.op",
        "DecoderProgram.embedding",
        "DecoderProgram.head",
    }


def differing(one: Any, other: Any) -> Iterator[str]:
    """Fields, as "Class.field", in which two programs differ."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        for a, b in zip(one, other, strict=True):
            yield from differing(a, b)
        return
    if not dataclasses.is_dataclass(one) or type(one) is not type(other):
        return
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        name = f"{type(one).__name__}.{field.name}"
        if isinstance(one, Rope) and field.name == "parameters":
            yield from (f"{name}.{key}" for key in dict(a) if dict(a)[key] != dict(b).get(key))
        elif a != b:
            yield name
            yield from differing(a, b)
