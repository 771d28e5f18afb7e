"""Weights go in and out whole: every tensor is accounted for, none is copied that can be mapped, none is held in vain."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pluglm.contracts import Chain, Split, SplitGroups, Stack, Transpose, WeightMap, WeightRule, rules
from pluglm.errors import CheckpointError
from pluglm.loader import reader_of
from pluglm.weight_packing import quantize_module, quantized_layers
from pluglm.weight_rules import assign
from pluglm.weights import export_weights, load_weights

# Pairwise different: vocabulary, hidden, feed-forward, q, k, v, experts.
V, C, F, Q, K, U, E = 11, 6, 10, 8, 4, 5, 3
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int32: "I32", torch.int8: "I8"}


@dataclass
class Info:
    shape: tuple[int, ...]
    dtype: str


class FakeCheckpoint:
    """Tensors in memory; counts who reads which, and runs `before_read` first."""

    path = Path("model-folder")
    config: Mapping[str, Any] = {}

    def __init__(self, tensors: Mapping[str, Tensor], before_read: Any = None) -> None:
        self.held = dict(tensors)
        self.tensors = {name: Info(tuple(t.shape), NAMES[t.dtype]) for name, t in tensors.items()}
        self.read: list[str] = []
        self.before_read = before_read

    def tensor(self, name: str) -> Tensor:
        if self.before_read is not None:
            self.before_read()
        self.read.append(name)
        return self.held[name]


class Block(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(C, F, bias=bias)
        self.down = nn.Linear(F, C, bias=bias)


class Model(nn.Module):
    """An embedding, two blocks, a norm and a head of its own."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, C)
        self.layers = nn.ModuleList(Block(bias=bias) for _ in range(2))
        self.norm = nn.LayerNorm(C, bias=False)
        self.head = nn.Linear(C, V, bias=False)


def table(*, bias: bool = False, **more: Any) -> WeightMap:
    names = {
        "model.embed.weight": "embed.weight", "model.h.{}.up.weight": "layers.{}.up.weight",
        "model.h.{}.down.weight": "layers.{}.down.weight", "model.norm.weight": "norm.weight",
        "lm_head.weight": "head.weight",
    }  # fmt: skip
    if bias:  # after the weights, as tables are written
        names |= {"model.h.{}.up.bias": "layers.{}.up.bias", "model.h.{}.down.bias": "layers.{}.down.bias"}
    given = {"ignored": {"*.inv_freq": "computed"}, "prefixes": ("model.", ""), **more}
    return WeightMap(tuple(rules(names, layers=range(2))), **given)


def contents(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed.weight": (V, C),
        "model.norm.weight": (C,),
        "lm_head.weight": (V, C),
    }
    for i in range(2):
        shapes |= {f"model.h.{i}.up.weight": (F, C), f"model.h.{i}.down.weight": (C, F)}
        if bias:
            shapes |= {f"model.h.{i}.up.bias": (F,), f"model.h.{i}.down.bias": (C,)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def on_meta(make: Any = Model, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        module: nn.Module = make(**arguments)
    return module


def fill(module: nn.Module, weights: WeightMap, checkpoint: Any, **arguments: Any) -> nn.Module:
    load_weights(module, weights, checkpoint, **{"device": "cpu", "dtype": torch.float32, **arguments})
    return module


def refusal(weights: WeightMap, checkpoint: FakeCheckpoint, module: nn.Module | None = None, **arguments: Any) -> Any:
    """The error of a load that must fail before, or without, a quiet change."""
    with pytest.raises(CheckpointError) as caught:
        fill(module or on_meta(), weights, checkpoint, **arguments)
    assert caught.value.path == "model-folder"
    assert caught.value.fix
    return caught.value


class Packed(nn.Module):
    """A replacement: the weight in halves of itself, under names of its own."""

    def __init__(self, half: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.halved = nn.Parameter(half, requires_grad=False)
        self.register_buffer("shift", bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.halved * 2, self.shift)


class Halves:
    """A quantizer that loses nothing, so that everything can be compared exactly."""

    name, bits = "halves", 32.0

    def __init__(self, *, refuses: tuple[str, ...] = ("head",)) -> None:
        self.refuses = refuses
        self.order: list[str] = []
        self.seen: list[weakref.ref[Tensor]] = []

    def alive(self) -> int:
        return sum(ref() is not None for ref in self.seen)

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        return "stays plain" if name in self.refuses else None

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        assert self.alive() == 0, f"{self.alive()} full-precision layers are alive beside {name}"
        self.order.append(name)
        if self.counts:
            self.seen.append(weakref.ref(weight))
        return Packed(weight / 2, None if bias is None else bias.clone())

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        assert isinstance(module, Packed), f"asked to pack a {type(module).__name__}"
        tensors = {"half": module.halved.detach()}
        return tensors if module.shift is None else {**tensors, "bias": module.shift}

    def tensor_names(self, name: str) -> tuple[str, ...]:
        return ("half", "bias") if self.biased else ("half",)

    biased = False
    #: Whether `alive` is watched: weights are copies then, not what the fake checkpoint itself holds.
    counts = False

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        return Packed(tensors["half"], tensors.get("bias"))

    def config(self) -> dict[str, Any]:
        return {"quant_method": "halves"}


# What a load does


def test_every_parameter_gets_its_tensor_and_nothing_is_left_on_meta() -> None:
    held = contents(bias=True)
    module = fill(on_meta(bias=True), table(bias=True), FakeCheckpoint(held))
    assert torch.equal(module.get_parameter("layers.1.down.bias"), held["model.h.1.down.bias"])
    assert torch.equal(module.get_parameter("layers.0.up.weight"), held["model.h.0.up.weight"])
    assert not any(p.is_meta or p.requires_grad for p in module.parameters())


def test_tensors_of_the_wanted_dtype_are_mapped_not_copied() -> None:
    held = contents()
    module = fill(on_meta(), table(), FakeCheckpoint(held))
    assert module.get_parameter("layers.0.up.weight").data_ptr() == held["model.h.0.up.weight"].data_ptr()
    assert module.get_parameter("embed.weight").data_ptr() == held["model.embed.weight"].data_ptr()


def test_tensors_of_another_dtype_are_converted() -> None:
    module = fill(on_meta(), table(), FakeCheckpoint(contents(dtype=torch.bfloat16)))
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_a_split_hands_out_views_of_one_tensor() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(C, n, bias=False) for n in (Q, K, U))

    weights = WeightMap((WeightRule(("qkv",), ("q.weight", "k.weight", "v.weight"), Split((Q, K, U))),))
    qkv = torch.randn(Q + K + U, C)
    module = fill(on_meta(Fused), weights, FakeCheckpoint({"qkv": qkv}))
    start = qkv.data_ptr()
    assert module.get_parameter("q.weight").data_ptr() == start
    assert module.get_parameter("v.weight").data_ptr() == start + (Q + K) * C * 4
    assert dict(export_weights(module, weights))["qkv"].equal(qkv)


def test_progress_goes_over_every_rule() -> None:
    seen: list[Any] = []

    def track(items: list[Any]) -> Any:
        seen.extend(items)
        return items

    fill(on_meta(), table(), FakeCheckpoint(contents()), track=track)
    assert {a.sources for a in seen} == {(name,) for name in contents()}


@pytest.mark.parametrize("spelled", ["model.", ""])
def test_a_file_may_leave_out_the_optional_prefix(spelled: str) -> None:
    held = {
        spelled + name.removeprefix("model.") if name != "lm_head.weight" else name: t for name, t in contents().items()
    }
    held[f"{spelled}rotary.inv_freq"] = torch.ones(2)
    module = fill(on_meta(), table(), FakeCheckpoint(held))
    assert torch.equal(module.get_parameter("norm.weight"), held[f"{spelled}norm.weight"])
    assert "model.norm.weight" in dict(export_weights(module, table())), "written as the table spells it"


def test_ignored_tensors_are_not_read() -> None:
    checkpoint = FakeCheckpoint({**contents(), "model.h.0.rotary.inv_freq": torch.ones(2)})
    fill(on_meta(), table(), checkpoint)
    assert "model.h.0.rotary.inv_freq" not in checkpoint.read


# What is refused, and that no tensor is read before


def test_missing_tensors_are_named() -> None:
    held = contents()
    del held["model.norm.weight"], held["model.h.1.up.weight"]
    checkpoint = FakeCheckpoint(held)
    error = refusal(table(), checkpoint)
    assert error.what == (
        "model-folder lacks 2 of the tensors this model needs: 'model.h.1.up.weight', 'model.norm.weight'."
    )
    assert error.why == "it holds 5 tensors, such as 'lm_head.weight', 'model.embed.weight', 'model.h.0.down.weight'."
    assert "missing weights are never filled in" in error.fix
    assert (error.tensor, error.missing) == ("model.h.1.up.weight", ("model.h.1.up.weight", "model.norm.weight"))
    assert checkpoint.read == []


def test_surplus_tensors_are_named() -> None:
    checkpoint = FakeCheckpoint({**contents(), "model.h.0.gate.weight": torch.ones(2)})
    error = refusal(table(), checkpoint)
    assert error.what == "model-folder holds 1 tensors that this model has no place for: 'model.h.0.gate.weight'."
    assert error.why == "a weight that is left out changes every result."
    assert "model_type" in error.fix
    assert error.surplus == ("model.h.0.gate.weight",)
    assert checkpoint.read == []


def test_a_long_list_is_cut() -> None:
    extra = {f"x{i}": torch.ones(1) for i in range(10)}
    error = refusal(table(), FakeCheckpoint({**contents(), **extra}))
    assert error.what.endswith("'x7' and 2 more.")


def test_a_parameter_without_a_rule_is_told_to_the_authors() -> None:
    weights = table()
    weights = replace(weights, rules=weights.rules[:-1])
    held = contents()
    del held["lm_head.weight"]
    error = refusal(weights, FakeCheckpoint(held))
    assert error.what == "the weight map of this architecture leaves 1 parameters empty: 'head.weight'."
    assert error.why == "no rule has them as a target, or the file lacks an optional tensor that this config needs."
    assert error.fix == "Report this to the authors of the architecture plugin, with the config.json."
    assert error.tensor == "head.weight"


def test_a_rule_whose_target_is_no_parameter_does_not_drop_its_tensor_in_silence() -> None:
    weights = table(bias=True)
    checkpoint = FakeCheckpoint(contents(bias=True))
    error = refusal(weights, checkpoint, on_meta(bias=False))
    assert error.what.startswith(
        "this architecture's weight map fills 4 parameters that its module lacks: 'layers.0.down.bias'"
    )
    assert error.why == "these tensors would be left out in silence."
    assert "architecture plugin" in error.fix
    assert error.tensor == "layers.0.down.bias"
    assert checkpoint.read == []


def test_a_wrong_shape_is_found_before_a_byte_is_read() -> None:
    checkpoint = FakeCheckpoint({**contents(), "model.h.1.up.weight": torch.zeros(C, F)})
    error = refusal(table(), checkpoint)
    assert error.what == "tensor 'model.h.1.up.weight' of model-folder does not fit the model."
    assert error.why == f"it has shape [{C}, {F}], config.json makes layers.1.up.weight [{F}, {C}]."
    assert "quantization_config" in error.fix
    assert error.tensor == "model.h.1.up.weight"
    assert checkpoint.read == []


def test_integers_are_no_weights() -> None:
    checkpoint = FakeCheckpoint({**contents(), "model.norm.weight": torch.zeros(C, dtype=torch.int8)})
    error = refusal(table(), checkpoint)
    assert error.why == "it is stored as I8, a weight must be floating point."
    assert error.tensor == "model.norm.weight"
    assert checkpoint.read == []


def test_integers_are_found_in_any_source_of_a_rule() -> None:
    module = nn.Module()
    module.w = nn.Parameter(torch.empty(2, C, device="meta"))
    weights = WeightMap((WeightRule(("a", "b"), ("w",), Stack()),))
    held = {"a": torch.zeros(C), "b": torch.zeros(C, dtype=torch.int32)}
    assert refusal(weights, FakeCheckpoint(held), module).why == "it is stored as I32, a weight must be floating point."


@pytest.mark.parametrize(
    ("transform", "held", "why"),
    [
        (Split((Q, K)), {"a": (Q, C)}, f"[({Q}, {C})] does not fit this model: dimension 0 is {Q}, the parts ({Q}, {K}) need {Q + K}."),
        (Split((Q, K), dim=1), {"a": (Q,)}, f"[({Q},)] does not fit this model: there is no dimension 1 to split."),
        (Transpose(), {"a": (Q,)}, f"[({Q},)] does not fit this model: only matrices can be transposed, found shapes [({Q},)]."),
        (SplitGroups(2, (Q, K)), {"a": (Q, C)}, f"[({Q}, {C})] does not fit this model: dimension 0 is {Q}, the parts ({2 * Q}, {2 * K}) need {2 * (Q + K)}."),
        (Stack(), {"a": (Q,), "b": (K,)}, f"[({Q},), ({K},)] does not fit this model: tensors of different shapes cannot be stacked: [({K},), ({Q},)]."),
    ],
)  # fmt: skip
def test_what_a_transform_cannot_take_is_said_in_its_words(transform: Any, held: dict[str, Any], why: str) -> None:
    module = nn.Module()
    targets = ("w", "x") if isinstance(transform, Split | SplitGroups) else ("w",)
    for name in targets:
        module.register_parameter(name, nn.Parameter(torch.empty(Q, C, device="meta")))
    weights = WeightMap((WeightRule(tuple(held), targets, transform),))
    error = refusal(weights, FakeCheckpoint({name: torch.zeros(shape) for name, shape in held.items()}), module)
    assert error.why == why
    assert error.tensor == "a"


def test_a_buffer_that_was_made_on_meta_is_not_left_without_values() -> None:
    module = on_meta()
    module.register_buffer("inv_freq", torch.empty(3, device="meta"), persistent=False)
    error = refusal(table(), FakeCheckpoint(contents()), module)
    assert error.what == "1 tensors of the model have no values after loading: 'inv_freq'."
    assert (
        error.why == "modules are built without storage; a buffer must be computed when it is first used, or be mapped."
    )
    assert "plugin" in error.fix
    assert error.tensor == "inv_freq"


# Optional and tied


class Tied(nn.Module):
    """A head that borrows the embedding without owning it."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, C)
        self.up = nn.Linear(C, F, bias=False)
        self.head = nn.Module()
        if bias:
            self.head.bias = nn.Parameter(torch.empty(V))


TIED = WeightMap((
    WeightRule(("lm_head.weight",), ("head.weight",), optional=True, tied_to="embed.weight"),
    *rules({"embed.weight": "embed.weight", "up.weight": "up.weight"}),
))  # fmt: skip


def test_a_tied_head_may_be_absent() -> None:
    held = {"embed.weight": torch.randn(V, C), "up.weight": torch.randn(F, C)}
    module = fill(on_meta(Tied), TIED, FakeCheckpoint(held))
    assert dict(export_weights(module, TIED)).keys() == held.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_head_may_be_repeated_whatever_the_order_of_rules_and_the_dtype(dtype: torch.dtype) -> None:
    embed = torch.randn(V, C)
    held = {"embed.weight": embed, "up.weight": torch.randn(F, C), "lm_head.weight": embed.clone()}
    module = fill(on_meta(Tied), TIED, FakeCheckpoint(held), dtype=dtype)
    assert torch.equal(module.get_parameter("embed.weight"), embed.to(dtype))


def test_a_tied_head_that_differs_means_another_model() -> None:
    embed = torch.randn(V, C)
    held = {"embed.weight": embed, "up.weight": torch.randn(F, C), "lm_head.weight": embed + 1}
    error = refusal(TIED, FakeCheckpoint(held), on_meta(Tied))
    assert error.what == "model-folder holds 'lm_head.weight', which differs from 'embed.weight'."
    assert error.why == "config.json says that the two are one (tie_word_embeddings), so one of them would be lost."
    assert error.fix == "Set tie_word_embeddings to false in config.json if the file is right."
    assert error.tensor == "lm_head.weight"


def test_an_optional_rule_needs_all_of_its_sources_or_none() -> None:
    rule = WeightRule(("a", "b"), ("w",), Stack(), optional=True)
    with pytest.raises(CheckpointError, match="lacks 1 of the tensors this model needs: 'b'"):
        assign(WeightMap((rule,)), FakeCheckpoint({"a": torch.zeros(C)}), {"w"}, packed={})


class Shared(nn.Module):
    """A head whose parameter is the embedding's own, registered before it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(C, V, bias=False)
        self.embed = nn.Embedding(V, C)
        self.up = nn.Linear(C, F, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("repeated", [False, True])
def test_a_shared_parameter_is_filled_under_all_its_names(repeated: bool) -> None:
    held = {"embed.weight": torch.randn(V, C), "up.weight": torch.randn(F, C)}
    more = {"lm_head.weight": held["embed.weight"].clone()} if repeated else {}
    module = fill(on_meta(Shared), TIED, FakeCheckpoint({**held, **more}))
    assert module.head.weight is module.embed.weight
    assert module.head.weight.data_ptr() == held["embed.weight"].data_ptr()
    written = dict(export_weights(module, TIED))
    assert written.keys() == held.keys()


def test_a_linear_layer_that_shares_its_weight_is_not_quantized() -> None:
    assert quantized_layers(on_meta(Shared), Halves(refuses=()), ()).keys() == {"up"}


# Rules both ways


@st.composite
def tables(draw: st.DrawFn) -> tuple[WeightMap, dict[str, Tensor], nn.Module]:
    """Any number of rules of any kind, with the checkpoint and the empty module that they connect."""
    found: list[WeightRule] = []
    held: dict[str, Tensor] = {}
    module = nn.Module()
    prefix = draw(st.sampled_from(["model.", ""]))
    kinds = st.sampled_from(
        ["plain", "split", "transpose", "stack", "split of transposed", "transposed stack", "groups"]
    )
    for i, kind in enumerate(draw(st.lists(kinds, max_size=5))):
        sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
        dim, width = draw(st.sampled_from([0, 1, -1, -2])), draw(st.integers(1, 6))
        total = sum(sizes)
        fused = (total, width) if dim in (0, -2) else (width, total)
        table: dict[str, tuple[Any, list[tuple[int, ...]], int]] = {
            "plain": (None, [(total, width)], 1), "split": (Split(sizes, dim), [fused], len(sizes)),
            "transpose": (Transpose(), [(total, width)], 1), "stack": (Stack(), [(total, width)] * len(sizes), 1),
            "split of transposed": (Chain((Transpose(), Split(sizes))), [(width, total)], len(sizes)),
            "transposed stack": (Chain((Transpose(), Stack())), [(total, width)] * len(sizes), 1),
            "groups": (SplitGroups(3, sizes, dim), [(3 * total, width) if dim in (0, -2) else (width, 3 * total)], len(sizes)),
        }  # fmt: skip
        transform, shapes, count = table[kind]
        sources = tuple(f"model.{i}.{n}" for n in range(len(shapes)))
        targets = tuple(f"t{i}_{n}" for n in range(count))
        tensors = [torch.randn(shape) for shape in shapes]
        held |= {prefix + name.removeprefix("model."): t for name, t in zip(sources, tensors, strict=True)}
        results = transform.apply(tensors) if transform is not None else tensors
        for name, tensor in zip(targets, results, strict=True):
            module.register_parameter(name, nn.Parameter(torch.empty(tensor.shape, device="meta")))
        found.append(WeightRule(sources, targets, transform))
    return WeightMap(tuple(draw(st.permutations(found))), prefixes=("model.", "")), held, module


@given(tables())
def test_what_was_loaded_is_written_back_bit_by_bit(case: tuple[WeightMap, dict[str, Tensor], nn.Module]) -> None:
    weights, held, module = case
    written = dict(export_weights(fill(module, weights, FakeCheckpoint(held)), weights))
    assert written.keys() == {f"model.{name.removeprefix('model.')}" for name in held}
    for name, tensor in held.items():
        assert torch.equal(written[f"model.{name.removeprefix('model.')}"], tensor)


@given(tables())
def test_declared_shapes_are_those_of_the_results(case: tuple[WeightMap, dict[str, Tensor], nn.Module]) -> None:
    weights, held, _ = case
    for rule in weights.rules:
        tensors = [held[name if name in held else name.removeprefix("model.")] for name in rule.sources]
        if rule.transform is not None:
            shapes = [tuple(t.shape) for t in tensors]
            assert [tuple(t.shape) for t in rule.transform.apply(tensors)] == list(rule.transform.shapes(shapes))


# Quantizers


def packing(**arguments: Any) -> tuple[nn.Module, Halves, FakeCheckpoint]:
    """A model that was packed while it was read from bfloat16, so that every weight is a copy."""
    quantizer = Halves()
    quantizer.counts = True
    checkpoint = FakeCheckpoint(contents(bias=True, dtype=torch.bfloat16), lambda: _nothing_alive(quantizer))
    module = fill(on_meta(bias=True), table(bias=True), checkpoint, quantizer=quantizer, **arguments)
    return module, quantizer, checkpoint


def _nothing_alive(quantizer: Halves) -> None:
    assert quantizer.alive() == 0, "a full-precision layer is alive while the next tensor is read"


def test_linear_layers_are_replaced_as_they_are_read_and_never_more_than_one_is_alive() -> None:
    module, quantizer, checkpoint = packing()
    assert sorted(quantizer.order) == ["layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up"]
    assert quantizer.alive() == 0
    assert isinstance(module.get_submodule("layers.0.up"), Packed)
    assert isinstance(module.get_submodule("head"), nn.Linear)
    assert not any(t.is_meta for t in [*module.parameters(), *module.buffers()])
    weights = [i for i, name in enumerate(checkpoint.read) if ".h." in name and name.endswith("weight")]
    biases = [i for i, name in enumerate(checkpoint.read) if name.endswith("bias")]
    assert max(biases) < min(weights), "a weight that waits for its bias is held in full precision"


def test_a_layer_that_is_packed_while_read_computes_the_same() -> None:
    module, _, checkpoint = packing()
    x = torch.randn(2, C)
    w, b = (checkpoint.held[f"model.h.1.up.{leaf}"].float() for leaf in ("weight", "bias"))
    assert torch.equal(module.get_submodule("layers.1.up")(x), nn.functional.linear(x, w, b))


def test_parts_of_a_fused_tensor_are_packed_one_after_another() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(C, n) for n in (Q, K, U))

    targets = ("q", "k", "v")
    weights = WeightMap((
        WeightRule(("w",), tuple(f"{t}.weight" for t in targets), Split((Q, K, U))),
        WeightRule(("b",), tuple(f"{t}.bias" for t in targets), Split((Q, K, U))),
    ))  # fmt: skip
    quantizer = Halves()
    quantizer.counts = True
    held = {"w": torch.randn(Q + K + U, C).bfloat16(), "b": torch.randn(Q + K + U).bfloat16()}
    module = fill(on_meta(Fused), weights, FakeCheckpoint(held), quantizer=quantizer)
    assert quantizer.order == list(targets)
    written = dict(export_weights(module, weights, quantizer))
    assert written.keys() == {f"{t}.{short}" for t in targets for short in ("half", "bias")}


def test_a_loaded_module_is_packed_one_layer_at_a_time() -> None:
    quantizer = Halves()
    module = fill(on_meta(bias=True), table(bias=True), FakeCheckpoint(contents(bias=True, dtype=torch.bfloat16)))
    originals = {name: weakref.ref(m) for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    alive: list[int] = []
    plain = quantizer.quantize

    def counting(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        alive.append(sum(ref() is not None for ref in originals.values()))
        return plain(name, weight, bias)

    quantizer.quantize = counting  # type: ignore[method-assign]
    assert quantize_module(module, quantizer) == 4
    assert alive == [5, 4, 3, 2], "each original goes as soon as its successor is there"
    assert dict(module.named_parameters())["layers.1.up.halved"].shape == (F, C)


@pytest.mark.parametrize("way", ["while loading", "afterwards"])
def test_skipped_layers_stay_plain_and_are_read_back_so(way: str) -> None:
    skip = ("layers.0.*",)
    quantizer = Halves()
    module = on_meta()
    if way == "while loading":
        fill(module, table(), FakeCheckpoint(contents()), quantizer=quantizer, skip=skip)
    else:
        assert quantize_module(fill(module, table(), FakeCheckpoint(contents())), quantizer, skip) == 2
    assert isinstance(module.get_submodule("layers.0.up"), nn.Linear)
    written = dict(export_weights(module, table(), quantizer))
    assert "model.h.0.up.weight" in written
    assert "model.h.1.up.half" in written
    again = fill(on_meta(), table(), FakeCheckpoint(written), quantizer=Halves(), packed=True)  # skip is not said again
    assert isinstance(again.get_submodule("layers.0.up"), nn.Linear)
    assert isinstance(again.get_submodule("layers.1.up"), Packed)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_weights_are_written_beside_their_names_and_read_back(bias: bool) -> None:
    quantizer = Halves()
    quantizer.biased = bias
    weights = table(bias=bias)
    module = fill(on_meta(bias=bias), weights, FakeCheckpoint(contents(bias=bias)), quantizer=quantizer)
    written = dict(export_weights(module, weights, quantizer))
    assert written.keys() == {
        name.replace("up.weight", "up.half").replace("down.weight", "down.half") for name in contents(bias=bias)
    }
    again = fill(on_meta(bias=bias), weights, FakeCheckpoint(written), quantizer=quantizer, packed=True)
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    for (name, one), (other, two) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(one, two)


def test_a_fused_tensor_that_is_packed_in_part_loses_nothing() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(C, Q), nn.Linear(C, K)

    weights = WeightMap((
        WeightRule(("w",), ("q.weight", "k.weight"), Split((Q, K))), WeightRule(("b",), ("q.bias", "k.bias"), Split((Q, K))),
    ))  # fmt: skip
    quantizer = Halves(refuses=("k",))
    quantizer.biased = True
    held = {"w": torch.randn(Q + K, C), "b": torch.randn(Q + K)}
    module = fill(on_meta(Fused), weights, FakeCheckpoint(held), quantizer=quantizer)
    written = dict(export_weights(module, weights, quantizer))
    assert written.keys() == {"q.half", "q.bias", "k.weight", "k.bias"}
    again = fill(on_meta(Fused), weights, FakeCheckpoint(written), quantizer=quantizer, packed=True)
    assert torch.equal(again.get_parameter("k.bias"), held["b"][Q:])
    assert torch.equal(again.get_parameter("k.weight"), held["w"][Q:])


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_head_is_no_packed_layer(bias: bool) -> None:
    held = {"embed.weight": torch.randn(V, C), "up.weight": torch.randn(F, C)}
    weights, expected = TIED, {"embed.weight", "up.half"}
    if bias:
        held["head.bias"] = torch.randn(V)
        weights, expected = (
            replace(TIED, rules=(*TIED.rules, *rules({"head.bias": "head.bias"}))),
            {*expected, "head.bias"},
        )
    module = fill(on_meta(Tied, bias=bias), weights, FakeCheckpoint(held), quantizer=Halves())
    assert dict(export_weights(module, weights, Halves())).keys() == expected


def test_missing_packed_tensors_are_named() -> None:
    quantizer = Halves()
    written = dict(
        export_weights(fill(on_meta(), table(), FakeCheckpoint(contents()), quantizer=quantizer), table(), quantizer)
    )
    del written["model.h.1.down.half"]
    checkpoint = FakeCheckpoint(written)
    error = refusal(table(), checkpoint, quantizer=quantizer, packed=True)
    assert error.what == "model-folder lacks packed tensors of layers.1.down: 'model.h.1.down.half'."
    assert error.why == "its quantization_config says that halves packed this layer."
    assert error.fix == "Save the model again, or load the unpacked weights and quantize them."
    assert error.tensor == "model.h.1.down.half"
    assert checkpoint.read == []


def test_a_plain_weight_beside_its_packed_form_is_surplus() -> None:
    quantizer = Halves()
    written = dict(
        export_weights(fill(on_meta(), table(), FakeCheckpoint(contents()), quantizer=quantizer), table(), quantizer)
    )
    written["model.h.0.up.weight"] = torch.zeros(F, C)
    error = refusal(table(), FakeCheckpoint(written), quantizer=quantizer, packed=True)
    assert error.surplus == ("model.h.0.up.weight",)


def test_packed_weights_without_the_optional_prefix_are_found() -> None:
    quantizer = Halves()
    written = dict(
        export_weights(fill(on_meta(), table(), FakeCheckpoint(contents()), quantizer=quantizer), table(), quantizer)
    )
    bare = {name.removeprefix("model."): t for name, t in written.items()}
    module = fill(on_meta(), table(), FakeCheckpoint(bare), quantizer=quantizer, packed=True)
    assert isinstance(module.get_submodule("layers.0.up"), Packed)


class Beside(Halves):
    """Writes as bitsandbytes does: the packed weight keeps its name, and what belongs to it lies under that name."""

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        tensors = super().pack(module)
        return {"weight": tensors.pop("half"), "weight.state.scale": torch.tensor(2.0), **tensors}

    def stored_names(self, name: str, place: str, present: frozenset[str]) -> tuple[str, ...]:
        self.places = {**getattr(self, "places", {}), name: (place, present)}
        return tuple(sorted(present)) if "weight.state.scale" in present else ()

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        return Packed(tensors["weight"] * tensors["weight.state.scale"] / 2, tensors.get("bias"))


@pytest.mark.parametrize("bare", [False, True])
def test_a_packed_weight_may_keep_its_name_with_tensors_under_it(bare: bool) -> None:
    quantizer = Beside(refuses=("layers.1.up",))
    held, weights = contents(bias=True), table(bias=True)
    module = fill(on_meta(bias=True), weights, FakeCheckpoint(held), quantizer=quantizer)
    written = dict(export_weights(module, weights, quantizer))
    assert written.keys() >= {"model.h.0.up.weight", "model.h.0.up.weight.state.scale", "model.h.0.up.bias"}
    assert "model.h.1.up.weight.state.scale" not in written
    if bare:
        written = {name.removeprefix("model."): t for name, t in written.items()}
    reader = Beside(refuses=())
    again = fill(on_meta(bias=True), weights, FakeCheckpoint(written), quantizer=reader, packed=True)
    prefix = "" if bare else "model."
    assert reader.places["layers.0.up"] == (f"{prefix}h.0.up", {"weight", "weight.state.scale", "bias"})
    assert reader.places["layers.1.up"] == (f"{prefix}h.1.up", {"weight", "bias"})
    assert isinstance(again.get_submodule("layers.1.up"), nn.Linear)
    assert torch.equal(again.get_parameter("layers.0.up.halved") * 2, held["model.h.0.up.weight"])
    assert torch.equal(again.get_buffer("layers.0.up.shift"), held["model.h.0.up.bias"])


class Reads(Halves):
    """One that reads files of others: what a layer has there shows in the file."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, tuple[str, frozenset[str]]] = {}

    def stored_names(self, name: str, place: str, present: frozenset[str]) -> tuple[str, ...]:
        self.asked[name] = place, present
        return tuple(sorted(present)) if "half" in present else ()


def halved(held: Mapping[str, Tensor], *layers: str) -> dict[str, Tensor]:
    """The same contents with these layers packed as `Halves` does it."""
    packed = {name: tensor for name, tensor in held.items() if name.removesuffix(".weight") not in layers}
    return packed | {f"{layer}.half": held[f"{layer}.weight"] / 2 for layer in layers}


@pytest.mark.parametrize("spelled", ["model.", ""])
def test_a_reader_of_others_files_is_shown_what_is_there_under_the_files_own_name(spelled: str) -> None:
    held = halved(contents(bias=True), "model.h.0.up", "model.h.1.up")
    held = {spelled + name.removeprefix("model."): t for name, t in held.items() if name != "lm_head.weight"}
    held["lm_head.weight"] = contents()["lm_head.weight"]
    reader = Reads()
    module = fill(on_meta(bias=True), table(bias=True), FakeCheckpoint(held), quantizer=reader, packed=True)
    assert reader.asked["layers.0.up"] == (f"{spelled}h.0.up", {"half", "bias"})
    assert reader.asked["layers.1.down"] == (f"{spelled}h.1.down", {"weight", "bias"})
    assert torch.equal(module.get_buffer("layers.1.up.shift"), held[f"{spelled}h.1.up.bias"])
    assert isinstance(module.get_submodule("layers.1.down"), nn.Linear)


def test_a_reader_need_not_know_that_a_layer_has_a_bias() -> None:
    held = halved(contents(bias=True), "model.h.0.up")
    del held["model.h.0.up.bias"]
    error = refusal(table(bias=True), FakeCheckpoint(held), on_meta(bias=True), quantizer=Reads(), packed=True)
    assert error.what == "model-folder lacks packed tensors of layers.0.up: 'model.h.0.up.bias'."


@pytest.mark.parametrize("transform", [Split((Q, K)), Transpose()])
def test_packed_tensors_of_a_fused_or_turned_weight_are_refused(transform: Any) -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(C, Q, bias=False), nn.Linear(C, K, bias=False)

    targets = ("q.weight", "k.weight") if isinstance(transform, Split) else ("q.weight",)
    rest = () if isinstance(transform, Split) else (WeightRule(("k.weight",), ("k.weight",)),)
    weights = WeightMap((WeightRule(("a.qk.weight",), targets, transform), *rest))
    checkpoint = FakeCheckpoint({"a.qk.half": torch.ones(Q + K, C), "k.weight": torch.ones(K, C)})
    error = refusal(weights, checkpoint, on_meta(Fused), quantizer=Reads(), packed=True)
    assert error.what == "model-folder holds a.qk packed, from which q would have to be taken."
    assert error.why == (
        "this model splits or turns that weight while it is read, and packed tensors are only read whole."
    )
    assert error.fix == "Use an unpacked copy of the model."
    assert error.tensor == "a.qk.half"
    assert checkpoint.read == []


class Unpacks(Halves):
    """One that gives plain tensors in the place of packed ones."""

    def unpacked(self, checkpoint: Any) -> Any:
        return FakeCheckpoint({
            name.replace(".half", ".weight"): tensor * 2 if name.endswith(".half") else tensor
            for name, tensor in checkpoint.held.items()
        })  # fmt: skip


def test_what_a_quantizer_unpacks_itself_is_read_as_if_nobody_had_packed_it() -> None:
    held = contents()
    packed = FakeCheckpoint(halved(held, "model.h.0.up", "model.h.1.down"))
    module = fill(on_meta(), table(), packed, quantizer=Unpacks(), packed=True)
    written = dict(export_weights(module, table()))
    assert written.keys() == held.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in held.items())


def test_groups_are_dealt_out_as_their_docstring_says() -> None:
    fused = torch.arange(12).view(6, 2)  # two groups of: two rows of the first part, one of the second
    first, second = SplitGroups(2, (2, 1)).apply([fused])
    assert first.tolist() == [[0, 1], [2, 3], [6, 7], [8, 9]]
    assert second.tolist() == [[4, 5], [10, 11]]


def test_a_stack_of_matrices_is_transposed_one_by_one() -> None:
    stacked = torch.randn(3, 4, 5)
    (found,) = Transpose().apply([stacked])
    assert torch.equal(found[1], stacked[1].T)
    assert Transpose().shapes([(3, 4, 5)]) == [(3, 5, 4)]


class Experts(nn.Module):
    """E experts' matrices in one parameter, and a router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(C, E)
        self.up = nn.Parameter(torch.empty(E, F, C))
        self.gate = nn.Parameter(torch.empty(E, F, C))


def one_by_one_or_fused() -> WeightMap:
    table = {"model.router.weight": "router.weight", "model.router.bias": "router.bias"}
    each = [
        WeightRule(tuple(f"model.{j}.{name}" for j in range(E)), (f"{name}",), Stack(), layout="each")
        for name in ("up", "gate")
    ]
    fused = WeightRule(("model.gate_up",), ("gate", "up"), Split((F, F), dim=1), layout="fused")
    return WeightMap((*rules(table), *each, fused), prefixes=("model.", ""))


def in_both_layouts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    router = {"model.router.weight": torch.randn(E, C), "model.router.bias": torch.randn(E)}
    gate_up = torch.randn(E, 2 * F, C)
    gate, up = torch.split(gate_up, F, dim=1)
    each = {f"model.{j}.{name}": t[j] for j in range(E) for name, t in (("up", up), ("gate", gate))}
    return {**router, **each}, {**router, "model.gate_up": gate_up}


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_file_is_read_in_the_layout_that_it_has_and_written_in_the_first(prefix: str) -> None:
    each, fused = in_both_layouts()
    weights, modules = one_by_one_or_fused(), []
    for held in (each, fused):
        spelled = {prefix + name.removeprefix("model."): tensor for name, tensor in held.items()}
        modules.append(fill(on_meta(Experts), weights, FakeCheckpoint(spelled)))
    assert modules[0].state_dict().keys() == modules[1].state_dict().keys()
    for name, tensor in modules[0].state_dict().items():
        assert torch.equal(tensor, modules[1].state_dict()[name])
    assert torch.equal(modules[0].get_parameter("gate"), fused["model.gate_up"][:, :F])
    for module in modules:
        written = dict(export_weights(module, weights))
        assert written.keys() == each.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in each.items())


def test_a_missing_tensor_of_the_files_own_layout_is_named_and_not_those_of_the_others() -> None:
    each, fused = in_both_layouts()
    del each["model.1.up"]
    assert refusal(one_by_one_or_fused(), FakeCheckpoint(each), on_meta(Experts)).missing == ("model.1.up",)
    del fused["model.router.bias"]
    assert refusal(one_by_one_or_fused(), FakeCheckpoint(fused), on_meta(Experts)).missing == ("model.router.bias",)


def test_tensors_in_two_layouts_at_once_are_refused() -> None:
    each, fused = in_both_layouts()
    error = refusal(one_by_one_or_fused(), FakeCheckpoint({**each, **fused}), on_meta(Experts))
    assert error.surplus == ("model.gate_up",)


def test_a_file_in_no_layout_lacks_the_tensors_of_the_first() -> None:
    router = {name: t for name, t in in_both_layouts()[0].items() if "router" in name}
    error = refusal(one_by_one_or_fused(), FakeCheckpoint(router), on_meta(Experts))
    assert error.missing == ("model.0.up", "model.1.up", "model.2.up", "model.0.gate", "model.1.gate", "model.2.gate")


def test_a_rule_may_keep_a_wider_dtype_than_the_models() -> None:
    wide = 5 + torch.rand(E) / 64  # differ from each other by less than bfloat16 can say
    weights = WeightMap((WeightRule(("w",), ("weight",)), WeightRule(("b",), ("bias",), dtype="float32")))
    held = FakeCheckpoint({"w": torch.randn(E, C), "b": wide})
    module = fill(on_meta(lambda: nn.Linear(C, E)), weights, held, dtype=torch.bfloat16)
    assert module.get_parameter("weight").dtype == torch.bfloat16
    assert torch.equal(module.get_parameter("bias"), wide)
    assert dict(export_weights(module, weights))["b"].dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "pluglm-quantizer-published"),
        ("mxfp4", "pluglm-quantizer-published"),
        ("spq_r", "pluglm-quantizer-spq-r"),
    ],
)
def test_the_advice_names_the_package_that_reads_a_method(method: str, package: str) -> None:
    assert reader_of(method) == package


# Token tables


class PackedTable(Packed):
    """A table in halves of itself."""

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.halved[token_ids] * 2

    def project(self, x: Tensor) -> Tensor:
        return x @ self.halved.T * 2


class Tables(Halves):
    """Packs tables as well."""

    def table_refusal(self, name: str, columns: int, rows: int) -> str | None:
        assert (columns, rows) == (C, V)
        return self.refusal(name, columns, rows)

    def quantize_table(self, name: str, weight: Tensor) -> nn.Module:
        self.quantize(name, weight, None)
        return PackedTable(weight / 2, None)

    def unpack_table(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        return PackedTable(tensors["half"], None)


class Reader(nn.Module):
    """A head without a table of its own."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.take_table(table)

    @property
    def table(self) -> nn.Module:
        return self.held[0]

    def take_table(self, table: nn.Module) -> None:
        self.held = (table,)


class ReadTable(nn.Module):
    """Two tables, of which a head reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(V, C), nn.Embedding(V, C)
        self.up = nn.Linear(C, F, bias=False)
        self.head = Reader(self.embed)


READ = WeightMap((
    WeightRule(("lm_head.weight",), ("head.weight",), optional=True, tied_to="embed.weight"),
    *rules({"m.wte.weight": "embed.weight", "m.wpe.weight": "places.weight", "m.up.weight": "up.weight"}),
), prefixes=("m.", ""))  # fmt: skip


def read_tables(*, head: bool = False, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    held = {"m.wte.weight": torch.randn(V, C).to(dtype), "m.wpe.weight": torch.randn(V, C).to(dtype),
            "m.up.weight": torch.randn(F, C).to(dtype)}  # fmt: skip
    return held | ({"lm_head.weight": held["m.wte.weight"].clone()} if head else {})


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_the_table_of_a_head_is_replaced_for_the_head_too_and_none_else(late: bool, repeated: bool) -> None:
    quantizer, held = Tables(), read_tables(head=repeated)
    quantizer.counts = True
    if late:
        module = fill(on_meta(ReadTable), READ, FakeCheckpoint(held))
        assert quantize_module(module, quantizer) == 2
    else:
        checkpoint = FakeCheckpoint(held, lambda: _nothing_alive(quantizer))
        module = fill(on_meta(ReadTable), READ, checkpoint, quantizer=quantizer)
    assert sorted(quantizer.order) == ["embed", "up"]
    assert quantizer.alive() == 0, "the plain table is still held"
    assert isinstance(module.get_submodule("embed"), PackedTable)
    assert isinstance(module.get_submodule("places"), nn.Embedding)
    head: Any = module.get_submodule("head")
    assert head.table is module.get_submodule("embed")
    written = dict(export_weights(module, READ, quantizer))
    assert written.keys() == {"m.wte.half", "m.wpe.weight", "m.up.half"}
    for prefix in ("m.", ""):
        saved = {prefix + name.removeprefix("m."): tensor for name, tensor in written.items()}
        again = fill(on_meta(ReadTable), READ, FakeCheckpoint(saved), quantizer=Tables(), packed=True)
        found: Any = again.get_submodule("head")
        assert isinstance(found.table, PackedTable)
        assert torch.equal(found.table.halved * 2, held["m.wte.weight"].float())


@pytest.mark.parametrize(("quantizer", "skip"), [
    (Halves(), ()), (Tables(refuses=("embed",)), ()), (Tables(), ("em*",)), (Tables(), ("head",)),
])  # fmt: skip
def test_a_table_stays_plain_for_who_packs_none_or_refuses_it_or_is_told_to_skip_it_or_its_head(
    quantizer: Halves, skip: tuple[str, ...]
) -> None:
    module = fill(on_meta(ReadTable), READ, FakeCheckpoint(read_tables()), quantizer=quantizer, skip=skip)
    assert quantizer.order == ["up"]
    head: Any = module.get_submodule("head")
    assert isinstance(head.table, nn.Embedding)
    assert not head.table.weight.is_meta
    written = dict(export_weights(module, READ, quantizer))
    assert written.keys() == {"m.wte.weight", "m.wpe.weight", "m.up.half"}
    again = fill(on_meta(ReadTable), READ, FakeCheckpoint(written), quantizer=Tables(), packed=True)
    assert isinstance(again.get_submodule("embed"), nn.Embedding), "the file holds it plain"


def test_an_embedding_that_shares_its_parameter_is_no_packed_table() -> None:
    def make() -> nn.Module:
        module: Any = ReadTable()
        module.places.weight = module.embed.weight
        return module

    assert quantized_layers(make(), Tables(), ()).keys() == {"up"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeated_head_that_differs_from_a_packed_table_means_another_model(dtype: torch.dtype) -> None:
    held = read_tables(head=True, dtype=torch.float32)
    held["lm_head.weight"][V - 1, 0] += 1
    error = refusal(READ, FakeCheckpoint(held), on_meta(ReadTable), quantizer=Tables(), dtype=dtype)
    assert error.what == "model-folder holds 'lm_head.weight', which differs from 'embed.weight'."


def test_a_plain_head_beside_a_packed_table_is_refused() -> None:
    quantizer = Tables()
    module = fill(on_meta(ReadTable), READ, FakeCheckpoint(read_tables()), quantizer=quantizer)
    written = dict(export_weights(module, READ, quantizer))
    written["lm_head.weight"] = torch.zeros(V, C)
    error = refusal(READ, FakeCheckpoint(written), on_meta(ReadTable), quantizer=quantizer, packed=True)
    assert error.what == "model-folder holds 'lm_head.weight' beside 'embed.weight' in packed form."
    assert error.fix == "Save the model again from its plain weights."
    assert error.tensor == "lm_head.weight"
