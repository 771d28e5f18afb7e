"""What is special to flex: options, what is compiled, blocks that are skipped, and what torch says."""

from __future__ import annotations

import json
import warnings
from importlib.resources import files

import pluglm_attention_flex
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode

from pluglm.contracts import AttentionRequest, AttentionSpec, KeyInfo, MaskSpec
from pluglm.errors import UnsupportedRequestError
from pluglm.static_filter import TIERS
from pluglm.testing.attention_oracle import LAYOUTS, Layout, case_of, expected, spec_of

GROUPED = spec_of(["grouped-heads"])


def build(*specs, device="cpu", dtype="float32", **options):
    request = AttentionRequest(specs=specs, device=device, dtype=dtype, options=tuple(options.items()))
    return pluglm_attention_flex.pluglm_build_attention(request=request)


def refusals(**request):
    with pytest.raises(UnsupportedRequestError) as caught:
        build(GROUPED, **request)
    return caught.value.reasons


def test_auto_takes_it_last():
    facts = json.loads((files("pluglm_attention_flex") / "pluglm.json").read_text("utf-8"))["providers"][0]
    assert facts["tier"] == TIERS[-1] == "reference"


def test_compile_is_true_or_false_and_nothing_else():
    assert refusals(compile="yes") == ("option compile is 'yes', and it is True or False",)


def test_compiling_on_a_cpu_is_refused_for_its_wrong_numbers():
    (reason,) = refusals(compile=True)
    assert reason.startswith("compile=True on a CPU: torch 2.13's kernel there gave wrong numbers")


def test_float64_is_computed_uncompiled_only():
    assert refusals(device="cuda", dtype="float64") == (
        "float64 compiled: torch's kernels add up in float32; pass compile=False",
    )
    build(GROUPED, device="cuda", dtype="float64", compile=False)


def test_another_device_is_refused():
    assert refusals(device="mps") == ("device mps is not one of cpu, cuda",)


def test_no_warning_of_torch_escapes(monkeypatch):
    monkeypatch.setattr(torch_flex, "_WARNINGS_SHOWN", set())
    for features in ((), ("sinks",)):
        case = case_of(LAYOUTS["a ring"], spec_of(features))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            case.run(build(case.spec))
        assert seen == []


def test_sinks_far_from_the_scores_neither_overflow_nor_vanish():
    case = case_of(LAYOUTS["a ring"], spec_of(["sinks"]))
    sinks = torch.tensor([-1e4, 1e4, -80.0, 80.0, 0.0, 5.0])
    backend = build(case.spec)
    o = backend.attend(case.q, _dense(case), case.spec, case.prepare(backend), sinks=sinks)
    plain = expected(case_of(LAYOUTS["a ring"], spec_of([])))
    assert torch.allclose(o[:, 0].double(), plain[:, 0], atol=1e-5)  # a sink that weighs nothing
    assert bool((o[:, 1] == 0).all())  # and one that weighs everything


def test_uncompiled_grouped_heads_meet_torch_as_query_rows():
    """torch's plain form repeats the keys as often as there are query heads to a key head: here once."""
    shapes = []

    class Calls(TorchDispatchMode):
        supports_higher_order_operators = True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.name() == "flex_attention":
                shapes.append((args[0].shape[1], args[1].shape[1]))
            return func(*args, **(kwargs or {}))

    case = case_of(LAYOUTS["more tokens"], GROUPED)
    backend = build(GROUPED)
    mask = case.prepare(backend)
    with Calls():
        case.attend(backend, mask)
    assert shapes == [(3, 3)]


def test_blocks_that_nobody_sees_are_skipped_when_compiled():
    """128 · 128 pairs a block: under a window of 100, a query block sees its own key block and the one before."""
    spec = AttentionSpec(6, 3, 64, 64, 0.125, MaskSpec(window=100))
    positions = torch.arange(512)[None]
    mask = build(spec, device="cuda").prepare(spec, positions, KeyInfo(positions, 512, dense=True))
    assert (mask.blocks.to_dense()[0, 0] != 0).tolist() == [[j in (i - 1, i) for j in range(4)] for i in range(4)]


def test_a_layer_that_torch_cannot_compile_is_a_typed_error_with_its_cause(monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("there is no compiler")

    case = case_of(LAYOUTS["more tokens"], GROUPED)
    backend = _compiled_by(no_compiler, monkeypatch)
    with pytest.raises(UnsupportedRequestError, match="compile=False") as caught:
        case.run(backend)
    assert caught.value.reasons[0].startswith("torch.compile failed: backend='no_compiler' raised")
    assert "no compiler" in str(caught.value.__cause__)


def test_a_growing_sequence_keeps_its_kernel(monkeypatch):
    graphs = []

    def counts(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backend = _compiled_by(counts, monkeypatch)
    for S in (150, 151, 152, 180, 300):
        case = case_of(Layout(((S - 1,),), (tuple(range(S)),), dense=True), GROUPED)
        assert torch.allclose(case.run(backend).double(), expected(case), atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
def test_the_compiled_form_agrees_with_the_oracle():
    """On this CPU, with heads of 64 channels and fixed lengths, where torch's kernel for CPUs is right."""
    spec = AttentionSpec(6, 3, 64, 64, 0.125, MaskSpec(window=40), softcap=5.0, alibi_slopes=(0.1,) * 6)
    rows = tuple(range(64, 128)), tuple(range(40, 104))
    keys = tuple(range(128)), tuple([-1] * 24 + list(range(104)))
    case = case_of(Layout(rows, keys), spec)
    backend = build(spec)
    backend._compiled, backend._flex = True, torch.compile(torch_flex.flex_attention, fullgraph=True, dynamic=False)
    mask = case.prepare(backend)
    first, second = case.attend(backend, mask), case.attend(backend, mask)
    assert torch.equal(first, second)
    assert torch.allclose(first.double(), expected(case), atol=1e-5)


def _compiled_by(compiler, monkeypatch):
    """A backend whose compiled form comes from `compiler`, on CPU tensors; nothing in it asks where it runs."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_with(f, backend=compiler, **how))
    return build(GROUPED, device="cuda")


def _dense(case):
    from pluglm.contracts import DenseView

    return DenseView(case.k, case.v)
