"""The native executor against the torch module: every part of a program, every dense cache, every instruction set."""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluglm_executor_cpu
import pytest
import torch
from native_models import NORM, ROPE, SPEC, Pair, build_layout, close, layer, llama, make, with_library
from pluglm_executor_cpu import native
from torch import nn

from pluglm import InputError, PluglmError, UnsupportedRequestError
from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    Embedding,
    ExecutorRequest,
    FeedForward,
    ForwardInput,
    Head,
    KVSlot,
    Layer,
    MaskSpec,
    Norm,
    Part,
    Rope,
    SharedSlot,
)

FOLDER = Path(__file__).resolve().parents[1]


def check(program: DecoderProgram, **how: Any) -> Pair:
    """Passes of 1, 3 and 1 tokens after a prompt that torch reads, and a prompt the library reads that torch goes on."""
    pair = make(program, **how)
    one, two, three = pair.cache(), pair.cache(), pair.cache()
    prompt = [[i % 37 for i in range(5, 5 + 21)]]
    close(pair, pair.feed("cpu", one, prompt), pair.feed("torch", two, prompt))
    assert pair.executor.native_passes == 0  # 21 tokens are a prompt
    for ids in ([[3]], [[30, 31, 32]], [[4]], [[9]]):
        close(pair, pair.feed("cpu", one, ids), pair.feed("torch", two, ids))
    assert pair.executor.native_passes == 4
    pair.feed("cpu", three, [prompt[0][:12]])
    pair.feed("cpu", three, [prompt[0][12:]])
    pair.feed("cpu", three, [[3]])
    assert pair.executor.native_passes == 7
    pair.feed("torch", three, [[30, 31, 32, 4]])
    close(pair, pair.feed("torch", three, [[9]]), pair.feed("torch", again(pair, prompt), [[9]]))
    return pair


def again(pair: Pair, prompt: list[list[int]]) -> Any:
    """A cache that torch has filled with what `check` fed, in the same pieces: some rotations look at a pass's length."""
    cache = pair.cache()
    for ids in ([prompt[0][:12]], [prompt[0][12:]], [[3]], [[30, 31, 32, 4]]):
        pair.feed("torch", cache, ids)
    return cache


def spec(**changed: Any) -> AttentionSpec:
    return dataclasses.replace(SPEC, **changed)


def mlp(*branches: Branch) -> DecoderProgram:
    return llama(Layer((layer(0).branches[0], *branches)))


def feed_forward(**changed: Any) -> DecoderProgram:
    op = dataclasses.replace(FeedForward(24, 20, "silu"), **changed)
    return mlp(Branch((Part("mlp", op, norm_in=NORM),)))


def normed(norm: Norm) -> DecoderProgram:
    branch = Branch((Part("mlp", FeedForward(24, 20, "silu"), norm_in=norm, norm_out=norm),))
    return dataclasses.replace(mlp(branch), final_norm=norm)


SLOPES = tuple(0.5 / (h + 1) for h in range(6))
FIRST = Part("attn", Attention(SPEC, 0, rope=ROPE), norm_in=NORM, scale_out=0.6)
SECOND = Part("mlp", FeedForward(24, 20, "gelu"), share_norm_in=True, scale_in=0.7, scale_out=1.3)
YARN = (("beta_fast", 1.2), ("beta_slow", 0.4), ("factor", 5.0), ("original_max_position_embeddings", 8))
LONG = (("factor", 2.0), ("long_factor", (3.0, 2.0, 1.5, 2.0, 4.0)), ("original_max_position_embeddings", 24),
        ("short_factor", (1.0, 1.1, 1.2, 1.3, 1.4)))  # fmt: skip
PROGRAMS: dict[str, DecoderProgram] = {
    "plain": llama(),
    "biases": llama(layer(0, q_bias=True, k_bias=True, v_bias=True, o_bias=True)),
    "some biases": llama(layer(0, q_bias=True, v_bias=True)),
    "heads alike": llama(layer(0, spec(num_kv_heads=6)), slots=(KVSlot(6, 10, 10),)),
    "one key head": llama(layer(0, spec(num_kv_heads=1)), slots=(KVSlot(1, 10, 10),)),
    "value heads of another size": llama(layer(0, spec(v_head_dim=14)), slots=(KVSlot(3, 10, 14),)),
    "wide heads": llama(
        layer(0, spec(head_dim=80, v_head_dim=72), Rope("default", 1e4, 64)), slots=(KVSlot(3, 80, 72),)
    ),
    "window": llama(layer(0, spec(mask=MaskSpec(window=7)))),
    "chunk": llama(layer(0, spec(mask=MaskSpec(chunk=6)))),
    "bidirectional": llama(layer(0, spec(mask=MaskSpec(causal=False, chunk=8)))),
    "soft cap": llama(layer(0, spec(softcap=1.5)), head=Head(tied=True, softcap=2.0)),
    "sinks": llama(layer(0, spec(sinks=True))),
    "alibi": llama(layer(0, spec(alibi_slopes=SLOPES), rope=None)),
    "no positions": llama(layer(0, rope=None)),
    "partial rotation": llama(layer(0, rope=Rope("default", 100.0, 4))),
    "interleaved": llama(layer(0, rope=Rope("default", 100.0, 8, interleaved=True))),
    "linear": llama(layer(0, rope=Rope("linear", 100.0, 10, parameters=(("factor", 2.5),)))),
    "dynamic": llama(layer(0, rope=Rope("dynamic", 100.0, 10, parameters=(("factor", 3.0),), max_seq_len=23))),
    "yarn": llama(layer(0, rope=Rope("yarn", 100.0, 10, parameters=YARN))),
    "longrope": llama(layer(0, rope=Rope("longrope", 100.0, 10, parameters=LONG, max_seq_len=48))),
    "two rotations": llama(layer(0, rope=Rope("default", 50.0, 10)), layer(1)),
    "head norms": llama(layer(0, qk_norm=Norm("rms", 10, 1e-5, offset=1.0))),
    "norms over all": llama(layer(0, qk_norm=Norm("rms", 60, 1e-5), qk_norm_over="all")),
    "layer norms of heads": llama(layer(0, qk_norm=Norm("layer", 10, 1e-5, bias=True))),
    "clip": llama(layer(0, qkv_clip=0.4)),
    "shared keys": llama(layer(0), layer(1), slots=(KVSlot(3, 10, 10), SharedSlot(0))),
    "parallel": llama(Layer((Branch((FIRST, SECOND), scale=0.8),))),
    "parallel with norms": llama(
        Layer((Branch((dataclasses.replace(FIRST, norm_out=NORM), dataclasses.replace(SECOND, norm_out=NORM))),))
    ),
    "scales": mlp(Branch((Part("mlp", FeedForward(24, 20, "silu"), NORM, None, 0.5, 1.7),), scale=0.4)),
    "no norms": llama(Layer((Branch((Part("attn", Attention(SPEC, 0), scale_in=0.5),)),)), final_norm=None),
    "layer norm": normed(Norm("layer", 24, 1e-5, bias=True)),
    "layer norm with an offset": normed(Norm("layer", 24, 1e-5, offset=1.0)),
    "bare layer norm": normed(Norm("layer", 24, 1e-5, weight=False)),
    "rms norm with an offset": normed(Norm("rms", 24, 1e-5, offset=1.0)),
    "rms norm that rounds late": normed(Norm("rms", 24, 1e-5, offset=1.0, cast_late=True)),
    **{name: feed_forward(activation=name, bias=True) for name in native.ACTIVATIONS},
    **{f"ungated {name}": feed_forward(activation=name, gated=False, bias=True) for name in ("gelu", "relu2")},
    "factors of the mlp": feed_forward(gate_scale=0.6, down_scale=1.4),
    "embedding": llama(embedding=Embedding(37, 24, 4.9, 302, 2, Norm("layer", 24, 1e-5, bias=True))),
    "own head": llama(head=Head(tied=False, bias=True, scale=0.3)),
    "tied head with a bias": llama(head=Head(tied=True, bias=True)),
}


@with_library
@pytest.mark.parametrize("name", PROGRAMS)
def test_decoding_equals_the_torch_module(name: str) -> None:
    check(PROGRAMS[name], threads=1)


@with_library
@pytest.mark.parametrize("name", ["plain", "parallel with norms", "window", "norms over all", "own head"])
def test_bfloat16_is_as_near_as_rounding_lets_it_be(name: str) -> None:
    check(PROGRAMS[name], dtype="bfloat16", threads=1)


@with_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", native.ISAS)
def test_every_instruction_set_of_this_machine_computes_the_same(isa: str, dtype: str) -> None:
    library = native.library()
    assert library is not None
    if isa not in library.isas:
        pytest.skip(f"this machine has no {isa}")
    for name in ("plain", "wide heads", "soft cap", "gelu_tanh"):
        assert check(PROGRAMS[name], dtype=dtype, isa=isa, threads=2).executor.isa == isa


MIXED = llama(
    layer(0, spec(mask=MaskSpec(window=7))), layer(1), layer(2, spec(mask=MaskSpec(chunk=6))),
    slots=(KVSlot(3, 10, 10, window=7), KVSlot(3, 10, 10), KVSlot(3, 10, 10, chunk=6)),
)  # fmt: skip


@with_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["dynamic", "static", "hybrid", "offloaded"])
def test_every_dense_layout_is_read_and_written_in_place(layout: str, dtype: str) -> None:
    """Long enough that storage grows, and that windows move within it."""
    pair = make(MIXED, layout=layout, dtype=dtype, threads=1)
    one, two = pair.cache(capacity=260), pair.cache(capacity=260)
    for i in range(220):
        got, want = pair.feed("cpu", one, [[i % 37]]), pair.feed("torch", two, [[i % 37]])
        if i % 20 == 0 or i > 200:
            close(pair, got, want)
    assert pair.executor.torch_passes == 0
    for slot in range(3):
        close(pair, one.read(slot).k, two.read(slot).k)


@with_library
@pytest.mark.parametrize(("layout", "reach"), [("sliding", {"window": 7}), ("chunked", {"chunk": 6})])
def test_layouts_of_constant_size_are_followed_as_cells_move(layout: str, reach: dict[str, int]) -> None:
    program = llama(layer(0, spec(mask=MaskSpec(**reach))), slots=(KVSlot(3, 10, 10, **reach),))
    pair = make(program, layout=layout, threads=1)
    one, two = pair.cache(capacity=290), pair.cache(capacity=290)
    for i in range(280):
        close(pair, pair.feed("cpu", one, [[i % 37]]), pair.feed("torch", two, [[i % 37]]))
    assert pair.executor.torch_passes == 0


@with_library
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_with_padding_and_holes(side: str) -> None:
    pair = make(MIXED, threads=2)
    ids = [list(range(20)), list(range(7, 27)), list(range(3, 23))]
    positions = [list(range(20)), [-1] * 6 + list(range(14)), [-1] * 15 + list(range(5))]
    if side == "right":
        positions = [list(range(20)), [*range(14)] + [-1] * 6, [*range(5)] + [-1] * 15]
    caches = [pair.cache(3), pair.cache(3)]
    outputs = []
    for which, cache in zip(("cpu", "torch"), caches, strict=True):
        pair.feed(which, cache, ids, positions)
        pair.feed(which, cache, [[1, 2], [3, 4], [5, 6]], [[20, 21], [14, 15], [5, -1]])
        pair.feed(which, cache, [[7], [8], [9]])
        cache.rollback(torch.tensor([2, 0, 1]))
        outputs.append([pair.feed(which, cache, [[i], [i + 1], [i + 2]]) for i in range(12)])
    assert pair.executor.native_passes == 14
    for got, want in zip(*outputs, strict=True):
        close(pair, got, want)


@with_library
def test_rows_that_are_reordered_selected_or_forked_are_found_again() -> None:
    pair = make(llama(), threads=1)
    outputs = []
    for which in ("cpu", "torch"):
        cache, kept = pair.cache(4), []
        pair.feed(which, cache, [[1, 2, 3], [4, 5, 6], [7, 8, 9], [3, 3, 3]])
        for change in (
            lambda c: c.reorder(torch.tensor([2, 0, 0, 1])), lambda c: c.select(torch.tensor([1, 3])),
            lambda c: c.repeat(2), lambda c: c.crop(2), lambda c: c.reset(),
        ):  # fmt: skip
            twin = cache.fork()
            change(cache)
            rows = [[i] for i in range(cache.batch_size)]
            kept += [pair.feed(which, cache, rows), pair.feed(which, twin, [[9]] * twin.batch_size)]
        outputs.append(kept)
    for got, want in zip(*outputs, strict=True):
        close(pair, got, want)


@with_library
def test_all_kept_logits_and_none_but_those() -> None:
    pair = make(llama(), threads=1)
    for keep in (0, 1, 2, 5):
        one, two = pair.cache(2), pair.cache(2)
        ids = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
        got, want = (pair.feed(w, c, ids, logits_to_keep=keep) for w, c in (("cpu", one), ("torch", two)))
        close(pair, got, want)
    assert pair.executor.native_passes == 4


@with_library
def test_what_the_library_does_not_compute_goes_through_torch() -> None:
    pair = make(llama(), threads=1)
    ids, at = torch.tensor([[1, 2]]), torch.arange(2)[None]
    run = pair.executor.run
    with torch.no_grad():
        assert run(ForwardInput(ids, at, None, dense=True)).logits.shape == (1, 2, 37)
        hidden = run(ForwardInput(ids, at, pair.cache(), dense=True, output_hidden_states=True)).hidden_states
        run(ForwardInput(None, at, pair.cache(), embeds=pair.module.embed(ids), dense=True))
        run(ForwardInput(ids, at, pair.cache(), dense=True, segments=torch.zeros(1, 2, dtype=torch.int64)))
        run(ForwardInput(ids, at, pair.cache(), dense=True, logits_to_keep=torch.tensor([0])))
    run(ForwardInput(ids, at, pair.cache(), dense=True)).logits.sum().backward()
    assert len(hidden) == 3
    assert pair.module.embed.weight.grad.any()
    assert (pair.executor.native_passes, pair.executor.torch_passes) == (0, 6)


@with_library
def test_weights_that_change_are_packed_again_by_the_next_prompt() -> None:
    pair = make(llama(), threads=1)
    with torch.no_grad():
        pair.module.layers[1].mlp.down.weight.mul_(0.5)
    one, two = pair.cache(), pair.cache()
    prompt = [list(range(20))]
    pair.feed("cpu", one, prompt)
    pair.feed("torch", two, prompt)
    close(pair, pair.feed("cpu", one, [[5]]), pair.feed("torch", two, [[5]]))


@with_library
def test_a_cache_is_let_go_when_its_owner_lets_it_go() -> None:
    import weakref

    pair = make(llama(), threads=1)
    cache = pair.cache()
    pair.feed("cpu", cache, [[1]])
    seen = weakref.ref(cache)
    del cache
    gc.collect()
    assert seen() is None
    assert not pair.executor._bindings


@with_library
def test_wrong_ids_and_positions_are_refused_and_the_cache_is_unchanged() -> None:
    pair = make(
        dataclasses.replace(llama(), embedding=Embedding(37, 24, learned_positions=9), max_seq_len=9), threads=1
    )
    cache = pair.cache()
    pair.feed("cpu", cache, [[1, 2]])
    with pytest.raises(InputError, match="run from -1 to 3"):
        pair.feed("cpu", cache, [[3, -1]])
    with pytest.raises(InputError, match=r"no position 9.*\n.*learned 9"):
        pair.feed("cpu", cache, [[1, 1]], [[8, 9]])
    assert cache.length == 2


@with_library
def test_threads_of_python_and_many_passes_do_not_disturb_each_other() -> None:
    pair = make(llama(), threads=3)
    want = pair.feed("torch", pair.cache(), [[7]])
    wrong = []

    def decode() -> None:
        for _ in range(60):
            if not torch.allclose(pair.feed("cpu", pair.cache(), [[7]]), want, atol=1e-4):
                wrong.append(1)

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pair.executor.native_passes == 180


@with_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_child_process_starts_threads_of_its_own() -> None:
    pair = make(llama(), threads=2)
    want = pair.feed("cpu", pair.cache(), [[7]])
    child = os.fork()
    if not child:
        same = torch.equal(pair.feed("cpu", pair.cache(), [[7]]), want)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


@with_library
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of address space that is kept to")
def test_threads_that_cannot_be_started_are_an_error_and_not_the_end_of_the_process() -> None:
    """In a child, whose address space is too small for the stacks."""
    import resource

    pair = make(llama(), threads=1)
    child = os.fork()
    if not child:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**26, held + 2**26))
        try:
            pluglm_executor_cpu.pluglm_build_executor(
                request=dataclasses.replace(pair.request, options=(("threads", 200),))
            )
        except PluglmError as error:
            os._exit(0 if "200 threads could not be started" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitpid(child, 0)[1] == 0


@with_library
def test_a_cache_of_another_model_is_not_written_to() -> None:
    """Its heads are narrower: the library would write beyond them."""
    pair, other = make(llama(), threads=1), make(llama(layer(0, spec(num_kv_heads=1)), slots=(KVSlot(1, 10, 10),)))
    narrow = make(
        llama(*(layer(i, spec(head_dim=8, v_head_dim=8), rope=None) for i in range(2)), slots=(KVSlot(3, 8, 8),) * 2)
    )
    for cache in (other.cache(), narrow.cache()):
        with pytest.raises((PluglmError, RuntimeError, IndexError)):
            pair.feed("cpu", cache, [[1]])
    assert (pair.executor.native_passes, pair.executor.torch_passes) == (0, 2)


@with_library
def test_weights_are_packed_whatever_torch_makes_by_default() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        pair = make(PROGRAMS["biases"], threads=1)
    finally:
        torch.set_default_dtype(torch.float32)
    close(pair, pair.feed("cpu", pair.cache(), [[1, 2]]), pair.feed("torch", pair.cache(), [[1, 2]]))


@with_library
def test_weights_that_change_while_a_cache_needs_torch_do_not_lock_up() -> None:
    pair = make(llama(), layout="quantized", threads=1)
    cache = pair.cache(capacity=290)
    for i in range(200):
        pair.feed("cpu", cache, [[i % 37]])
    before = pair.executor.torch_passes
    with torch.no_grad():
        pair.module.layers[1].mlp.down.weight.mul_(0.5)
    pair.feed("cpu", cache, [[1]])
    assert pair.executor.torch_passes == before + 1 > 1


@with_library
def test_a_cache_that_begins_to_pack_its_cells_goes_on_through_torch() -> None:
    """Until then it hands out slices of what it stores, and afterwards copies that nothing may be written to."""
    pair = make(llama(), layout="quantized", threads=1)
    one, two = pair.cache(capacity=290), pair.cache(capacity=290)
    for i in range(280):
        got, want = pair.feed("cpu", one, [[i % 37]]), pair.feed("torch", two, [[i % 37]])
    assert pair.executor.native_passes > 100
    assert pair.executor.torch_passes > 20
    assert (got - want).abs().max() < 0.05  # cells are rounded coarsely, and differences of 1e-7 to either side


@with_library
def test_bfloat16_is_nearer_to_float32_than_the_torch_module_is() -> None:
    pair, exact = (make(PROGRAMS["parallel"], dtype=dtype, threads=1) for dtype in ("bfloat16", "float32"))
    with torch.no_grad():
        for to, given in zip(exact.module.parameters(), pair.module.parameters(), strict=True):
            to.copy_(given)
    errors = []
    for which in ("cpu", "torch"):
        one, two = pair.cache(), exact.cache()
        apart = [pair.feed(which, one, [[i % 37]]).float() - exact.feed("torch", two, [[i % 37]]) for i in range(60)]
        errors.append(float(torch.stack(apart).square().mean()))
    assert errors[0] < errors[1]


# Refusals


def refused(pair: Any, **changed: Any) -> tuple[str, ...]:
    with pytest.raises(UnsupportedRequestError, match="cannot run this model") as caught:
        pluglm_executor_cpu.pluglm_build_executor(request=dataclasses.replace(pair.request, **changed))
    return caught.value.reasons


@with_library
def test_every_reason_against_a_request_is_given_at_once() -> None:
    pair = make(llama(), threads=1)
    reasons = refused(
        pair, variant="fast", device="cuda:0", dtype="float16",
        options=(("threads", 0), ("isa", "mmx"), ("bits", 8)),
    )  # fmt: skip
    said = "\n".join(reasons)
    for part in ("no variants, so not 'fast'", "threads is a whole number from 1 on, not 0", "isa is one of portable",
                 "no option 'bits', only threads, isa, activations", "on the CPU, not on cuda:0",
                 "float32 and bfloat16 weights, not float16", "not a plain float16 tensor"):  # fmt: skip
        assert part in said


@with_library
def test_programs_it_cannot_say_are_refused_by_what_they_need() -> None:
    pair = make(llama(), threads=1)
    changed = {
        "cross-attention": layer(0, cross=True),
        "relative buckets": layer(0, spec(bias=True), relative_buckets=(8, 20)),
        "query temperatures": layer(0, query_temperature=(0.1, 8.0)),
        "prefix masks": layer(0, spec(mask=MaskSpec(prefix=True))),
    }
    for says, one in changed.items():
        description = dataclasses.replace(pair.request.description, program=llama(one, layer(1)))
        assert any(says in reason for reason in refused(pair, description=description))
    description = dataclasses.replace(pair.request.description, program=None)
    assert refused(pair, description=description) == (
        "the model has no program: its architecture brings a module of its own",
    )


@with_library
def test_a_replaced_linear_layer_is_refused() -> None:
    pair = make(llama(), threads=1)

    class Packed(nn.Linear):
        pass

    pair.module.layers[0].mlp.up = Packed(24, 20, bias=False)
    assert any("Packed (the first is layers.0.mlp.up)" in reason for reason in refused(pair))


@with_library
@pytest.mark.parametrize("layout", ["paged", "sink"])
def test_layouts_that_do_not_store_what_they_hand_out_are_refused(layout: str) -> None:
    pair = make(llama(), threads=1)
    made = build_layout(llama(), layout, "float32")
    assert refused(pair, layout=made) == (
        f"caches of the layout {made.name!r} do not hand out slices of what they store",
    )


def test_without_a_library_it_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    description = SimpleNamespace(program=llama())
    request: Any = ExecutorRequest(nn.Linear(1, 1), description, None, "cpu", "float32")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedRequestError) as caught:
        pluglm_executor_cpu.pluglm_build_executor(request=request)
    for word in ("no compiled library", "g++", "PLUGLM_NATIVE=1"):
        assert word in str(caught.value)


# The build


@pytest.mark.skipif(not (FOLDER / "hatch_build.py").exists(), reason="the build script is not part of the wheel")
def test_without_a_compiler_the_build_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hatchling")
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop("hatch_build", None)
    import hatch_build

    source = tmp_path / "step.cpp"
    source.write_text("int f() { return nonsense; }\n")
    if shutil.which("c++"):
        assert "nonsense" in hatch_build.compiled(source, tmp_path / "libstep.so")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler was found" in hatch_build.compiled(source, tmp_path / "libstep.so")
    assert [path.name for path in tmp_path.iterdir()] == ["step.cpp"]
    sys.modules.pop("hatch_build", None)
