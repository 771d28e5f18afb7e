"""The compile executor against the torch module: every kind of decoder, every layout, every form of a pass.

Tracing is what is tested, so most tests use the backend "eager", which runs what was traced as it is. One slow test
makes machine code.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluglm_attention_eager
import pluglm_attention_sdpa
import pluglm_caches
import pluglm_executor_compile
import pytest
import torch
from pluglm_blocks import build_decoder
from pluglm_executor_compile import refusals
from torch import Tensor

from pluglm import ContextLengthError, PluglmError, UnsupportedRequestError
from pluglm.contracts import (
    Attention,
    AttentionRequest,
    AttentionSpec,
    Branch,
    CacheRequest,
    DecoderProgram,
    Embedding,
    ExecutorRequest,
    FeedForward,
    ForwardInput,
    Head,
    KVSlot,
    Layer,
    MaskSpec,
    ModelDescription,
    ModelParts,
    Norm,
    Part,
    Rope,
    SharedSlot,
)
from pluglm.contracts.weights import WeightMap

SPEC = AttentionSpec(6, 3, 10, 10, 0.3)
ROPE = Rope("default", 100.0, 10)
NORM = Norm("rms", 24, 1e-5)
LAYER_NORM = Norm("layer", 24, 1e-5, bias=True)
BIASED = {"q_bias": True, "k_bias": True, "v_bias": True, "o_bias": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads would only wait for each other. And torch's trace log, which nobody reads, takes longer
    than tracing once pytest listens to it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.getLogger("torch.__trace").propagate = False
    yield
    torch._dynamo.reset()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain() -> Pair:
    """A model of one layer, for tests that leave it as it was: what one has compiled the next one uses."""
    return make(program(layer(0)))


def layer(slot: int, spec: AttentionSpec = SPEC, rope: Rope | None = ROPE, norm: Norm = NORM, **changed: Any) -> Layer:
    """A Llama-like layer; `changed` fields of its attention."""
    feed = FeedForward(24, 20, "silu") if norm is NORM else FeedForward(24, 20, "gelu_tanh", gated=False, bias=True)
    return Layer((
        Branch((Part("attn", Attention(spec, slot, rope=rope, **changed), norm_in=norm),)),
        Branch((Part("mlp", feed, norm_in=norm, norm_out=None if norm is LAYER_NORM else norm),)),
    ))  # fmt: skip


def program(*layers: Layer, **changed: Any) -> DecoderProgram:
    """A program of these layers, each with a slot of its own; `changed` fields of the program."""
    layers = layers or (layer(0), layer(1))
    slots = tuple(KVSlot(3, 10, 10) for _ in layers)
    made = DecoderProgram(Embedding(37, 24), layers, Norm("rms", 24, 1e-5), Head(tied=True), slots, 300)
    return dataclasses.replace(made, **changed)


def capped(**mask: int) -> AttentionSpec:
    return dataclasses.replace(SPEC, softcap=5.0, mask=MaskSpec(**mask))


PROGRAMS = {
    "gemma 2": program(
        layer(0, capped(window=7)), layer(1, capped()), embedding=Embedding(37, 24, scale=4.9),
        head=Head(tied=True, softcap=3.0), slots=(KVSlot(3, 10, 10, window=7), KVSlot(3, 10, 10)),
    ),
    "gpt 2": program(
        layer(0, rope=None, norm=LAYER_NORM, **BIASED), embedding=Embedding(37, 24, learned_positions=300),
        final_norm=LAYER_NORM, head=Head(tied=False, bias=True),
    ),
    "shared keys, alibi and sinks": program(
        layer(0, dataclasses.replace(SPEC, sinks=True)),
        layer(1, dataclasses.replace(SPEC, alibi_slopes=(0.5, 0.25, 0.1, 0.05, 0.02, 0.01)), rope=None),
        layer(2, query_temperature=(0.1, 8.0)), slots=(KVSlot(3, 10, 10), KVSlot(3, 10, 10), SharedSlot(0)),
    ),
}  # fmt: skip


@dataclasses.dataclass
class Pair:
    """One model, twice: its torch module and its executor, and what makes their caches."""

    module: Any
    executor: Any
    program: DecoderProgram
    request: Any

    def cache(self, rows: int = 1, layout: str = "dynamic", capacity: int = 120) -> Any:
        return build_layout(self.program, layout).new(batch_size=rows, capacity=capacity)

    @torch.no_grad()
    def output(self, which: str, cache: Any, ids: Any, positions: Any = None, **more: Any) -> Any:
        """One pass, by "torch" or by "compile". ids: [B, T] numbers."""
        token_ids = torch.tensor(ids)
        dense = positions is None and cache.dense
        at = cache.next_positions(token_ids.shape[1]) if positions is None else torch.tensor(positions)
        run = self.module.forward if which == "torch" else self.executor.run
        return run(ForwardInput(token_ids, at, cache, dense=dense, **more))

    def feed(self, which: str, *arguments: Any, **more: Any) -> Tensor:
        logits: Tensor = self.output(which, *arguments, **more).logits
        return logits


def make(made: DecoderProgram, attention: Any = pluglm_attention_eager, **options: Any) -> Pair:
    """Build a program with random weights. options: of the executor."""
    specs = made.attention_specs()
    backend = attention.pluglm_build_attention(request=AttentionRequest(specs, "cpu", "float32"))
    C, V = made.embedding.hidden_size, made.embedding.vocab_size
    description = ModelDescription(
        "test", made, WeightMap(()), V, C, len(made.layers), made.max_seq_len, specs, made.slots
    )
    module = build_decoder(made, ModelParts(description, backend, {}, "cpu", "float32")).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    options = {"backend": "eager", **options}
    layout = build_layout(made, "dynamic")
    request = ExecutorRequest(module, description, layout, "cpu", "float32", None, tuple(options.items()))
    return Pair(module, pluglm_executor_compile.pluglm_build_executor(request=request), made, request)


def build_layout(made: DecoderProgram, layout: str) -> Any:
    request = CacheRequest(made.slots, ("dense", "paged", "quantized"), "cpu", "float32", max_seq_len=made.max_seq_len,
                           rotations=made.rotations())  # fmt: skip
    return getattr(pluglm_caches, layout).pluglm_build_cache(request=request)


def same(got: Tensor, want: Tensor) -> None:
    """Up to the order of addition: a product of 16 rows, some of them padding, adds in another order than one of 11."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def tokens(rows: int, count: int, first: int = 0) -> list[list[int]]:
    return [[(first + 7 * r + 5 * t) % 37 for t in range(count)] for r in range(rows)]


# Equal to the module


@pytest.mark.parametrize("name", PROGRAMS)
def test_prompts_chunks_and_tokens_equal_the_torch_module(name: str) -> None:
    pair = make(PROGRAMS[name])
    one, two = pair.cache(2), pair.cache(2)
    for count in (11, 1, 5, 1, 16):  # two shapes: 1 and 16
        ids = tokens(2, count, count)
        same(pair.feed("compile", one, ids), pair.feed("torch", two, ids))
        assert one.length == two.length
    assert len(pair.executor.compiled_s) == 2
    assert (pair.executor.compiled_passes, pair.executor.eager_passes) == (5, 0)


def test_every_layout_and_backend_is_served_by_the_same_graphs() -> None:
    """A graph does not know of them, and a cache that grows compiles nothing."""
    windowed = layer(0, dataclasses.replace(SPEC, mask=MaskSpec(window=7)))
    made = program(windowed, layer(1), slots=(KVSlot(3, 10, 10, window=7), KVSlot(3, 10, 10)))
    pair = make(made, pluglm_attention_sdpa)
    before = None
    for layout in ("dynamic", "static", "hybrid", "paged", "quantized", "offloaded"):
        one, two = pair.cache(2, layout), pair.cache(2, layout)
        for count in (13, *[1] * 30):
            ids = tokens(2, count, one.length)
            same(pair.feed("compile", one, ids), pair.feed("torch", two, ids))
        traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        before = traced if before is None else before
        assert traced == before
    assert len(pair.executor.compiled_s) == 2


def test_padding_holes_rollback_crop_and_other_batch_sizes() -> None:
    pair = make(program(layer(0)))
    outputs = []
    for which in ("compile", "torch"):
        cache, kept = pair.cache(3), []
        positions = [list(range(9)), [-1] * 4 + list(range(5)), [*range(2)] + [-1] * 7]
        kept.append(pair.feed(which, cache, tokens(3, 9), positions))
        kept.append(pair.feed(which, cache, tokens(3, 2), [[9, 10], [5, 6], [2, -1]]))
        cache.rollback(torch.tensor([1, 0, 2]))
        kept.append(pair.feed(which, cache, tokens(3, 1)))
        cache.crop(8)
        kept.append(pair.feed(which, cache, tokens(3, 1)))
        cache.select(torch.tensor([2, 0]))
        kept.append(pair.feed(which, cache, tokens(2, 1)))
        twin = cache.fork()
        kept += [pair.feed(which, cache, tokens(2, 1, 3)), pair.feed(which, twin, tokens(2, 1, 4))]
        outputs.append((kept, positions))
    real = torch.tensor(outputs[0][1]) >= 0
    for i, (got, want) in enumerate(zip(outputs[0][0], outputs[1][0], strict=True)):
        assert got.shape == want.shape
        same(got[real] if i == 0 else got, want[real] if i == 0 else want)
    assert len(pair.executor.compiled_s) == 3  # 3 × 16, 3 × 1, 2 × 1


def test_what_a_pass_can_ask_for(plain: Pair) -> None:
    pair, ids = plain, tokens(2, 6)
    for more in (
        {"logits_to_keep": 2}, {"logits_to_keep": torch.tensor([4, -5])},
        {"output_hidden_states": True, "segments": torch.tensor([[0, 0, 0, 1, 1, 1]])},
    ):  # fmt: skip
        got, want = (pair.output(which, pair.cache(2), ids, **more) for which in ("compile", "torch"))
        same(got.logits, want.logits)
        assert (got.hidden_states is None) == (want.hidden_states is None)
        for one, two in zip(got.hidden_states or (), want.hidden_states or (), strict=True):
            same(one, two)
    with torch.no_grad():
        embeds, at = pair.module.embed(torch.tensor(ids)), torch.arange(6)[None]
        got = pair.executor.run(ForwardInput(None, at, None, embeds=embeds, dense=True)).logits
        want = pair.module.forward(ForwardInput(None, at, None, embeds=embeds, dense=True)).logits
    same(got, want)


def test_inference_mode_and_no_grad_may_take_turns() -> None:
    pair = make(program(layer(0)))
    one, two = pair.cache(), pair.cache()
    for i in range(4):
        with torch.inference_mode(i % 2 == 0):
            assert torch.equal(pair.feed("compile", one, [[i]]), pair.feed("torch", two, [[i]]))
    assert len(pair.executor.compiled_s) == 1


def test_a_pass_with_a_gradient_runs_uncompiled_and_is_counted() -> None:
    pair = make(program(layer(0)))
    inputs = ForwardInput(torch.tensor([[1, 2]]), torch.arange(2)[None], pair.cache(), dense=True)
    pair.executor.run(inputs).logits.sum().backward()
    assert pair.module.embed.weight.grad is not None
    assert (pair.executor.compiled_passes, pair.executor.eager_passes) == (0, 1)


def test_weights_that_change_are_seen(plain: Pair) -> None:
    pair = plain
    pair.feed("compile", pair.cache(), [[1]])
    for factor in (0.5, 2.0):
        with torch.no_grad():
            pair.module.layers[0].mlp.down.weight.mul_(factor)
        assert torch.equal(pair.feed("compile", pair.cache(), [[1]]), pair.feed("torch", pair.cache(), [[1]]))


def test_threads_of_python_do_not_disturb_each_other(plain: Pair) -> None:
    pair = plain
    want = [pair.feed("torch", pair.cache(), [[i]]) for i in range(3)]
    wrong: list[Any] = []

    def decode(i: int) -> None:
        try:
            for _ in range(30):
                if not torch.equal(pair.feed("compile", pair.cache(), [[i]]), want[i]):
                    wrong.append(i)
        except Exception as e:  # noqa: BLE001 - whatever it is, the test has to know
            wrong.append(e)

    threads = [threading.Thread(target=decode, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Errors


def test_a_full_cache_raises_before_anything_is_written(plain: Pair) -> None:
    pair = plain
    cache = pair.cache(layout="static", capacity=4)
    pair.feed("compile", cache, [[1]])
    with pytest.raises(ContextLengthError):
        pair.feed("compile", cache, [[1, 2, 3, 4]])
    assert cache.length == 1
    pair.feed("compile", cache, [[1]])


def test_an_error_inside_a_pass_comes_out_as_it_is_and_nothing_counts(plain: Pair) -> None:
    pair = plain
    cache = pair.cache()
    pair.feed("compile", cache, [[1]])
    append = cache.append
    cache.append = lambda *_: (_ for _ in ()).throw(PluglmError("the disk is gone"))
    with pytest.raises(PluglmError, match="the disk is gone"):
        pair.feed("compile", cache, [[2]])
    cache.append = append
    twin = pair.cache()
    pair.feed("torch", twin, [[1]])
    assert cache.length == 1
    assert torch.equal(pair.feed("compile", cache, [[2]]), pair.feed("torch", twin, [[2]]))


def test_one_shape_too_many_is_an_error_and_not_a_compilation_without_end() -> None:
    pair = make(program(layer(0)), max_shapes=1)
    cache = pair.cache()
    pair.feed("compile", cache, [[1]])
    with pytest.raises(PluglmError) as caught:
        pair.feed("compile", cache, [[1, 2]])
    assert caught.value.what == "The compile executor has compiled 1 shapes of passes, and this would be one more."
    assert caught.value.why == "each takes seconds and memory; the new one has 1 rows and 16 tokens."
    assert caught.value.fix is not None and "max_shapes" in caught.value.fix
    assert cache.length == 1
    pair.feed("compile", cache, [[1]])


def test_what_cannot_be_traced_is_a_typed_error() -> None:
    pair = make(program(layer(0)))

    class Printing(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            print(float(x.sum()))
            return super().forward(x)

    pair.module.layers[0].mlp.down = Printing(20, 24)
    cache = pair.cache()
    with pytest.raises(UnsupportedRequestError) as caught:
        pair.feed("compile", cache, [[1]])
    assert caught.value.what == "torch.compile with the backend 'eager' failed on passes of 1 × 1 tokens."
    assert caught.value.why is not None and caught.value.why.startswith("Unsupported")
    assert caught.value.fix is not None and 'executor="eager"' in caught.value.fix
    assert cache.length == 0


def test_a_part_that_is_replaced_later_is_an_error_and_not_ignored() -> None:
    pair = make(program(layer(0)))
    pair.module.layers[0].mlp = torch.nn.Identity()
    with pytest.raises(PluglmError, match=r"part of the model was replaced[\s\S]*with the part in place"):
        pair.feed("compile", pair.cache(), [[1]])


# Refusals


def reasons(pair: Pair, **changed: Any) -> tuple[str, ...]:
    with pytest.raises(UnsupportedRequestError) as caught:
        pluglm_executor_compile.pluglm_build_executor(request=dataclasses.replace(pair.request, **changed))
    assert caught.value.what == 'executor="compile" cannot run this model.'
    assert caught.value.why == "\n".join(caught.value.reasons)
    assert caught.value.fix == 'Choose executor="eager", or change what stands in the way.'
    return tuple(caught.value.reasons)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fullgraph": True}, "it has no option 'fullgraph', only backend, cache_dir, max_shapes, mode"),
        ({"backend": "cudagraphs"}, "its option backend is one of inductor, aot_eager, eager, not 'cudagraphs'"),
        ({"mode": "fast"}, "its option mode is one of default, max-autotune-no-cudagraphs, not 'fast'"),
        ({"mode": "reduce-overhead"}, "mode 'reduce-overhead' records a CUDA graph of the whole pass"),
        ({"mode": "default", "backend": "eager"}, "only the backend inductor has modes, not 'eager'"),
        ({"cache_dir": 3}, "its option cache_dir is the name of a folder, not 3"),
        ({"cache_dir": "x", "backend": "eager"}, "only the backend inductor keeps compiled code, not 'eager'"),
        ({"max_shapes": 0}, "its option max_shapes is a whole number from 1 on, not 0"),
    ],
)
def test_an_option_is_honoured_or_refused(options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "no_compiler", lambda _: None)
    (reason,) = reasons(make(program(layer(0))), options=tuple(options.items()))
    assert reason.startswith(words)


def test_every_reason_is_given_at_once() -> None:
    pair = make(program(layer(0)))
    pair.module.layers[0].mlp.down = SimpleLinear()
    description = dataclasses.replace(
        pair.request.description,
        program=program(layer(0, relative_buckets=(8, 16), spec=dataclasses.replace(SPEC, bias=True))),
    )
    assert reasons(pair, variant="fast", description=description) == (
        "it has no variants, so not 'fast'",
        "1 layers are SimpleLinear (the first is layers.0.mlp.down): it compiles plain layers only",
        "it does not compile relative buckets: their size changes with every token",
    )
    none = SimpleNamespace(program=None)
    assert reasons(pair, description=none) == ("the model has no program: its architecture brings a module of its own",)
    assert reasons(pair, module=torch.nn.Identity()) == (
        "the module is a Identity, not the one that the program means",
    )


class SimpleLinear(torch.nn.Module):
    pass


def test_without_a_compiler_the_plan_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    pair = make(program(layer(0)))
    (reason,) = reasons(pair, options=())
    assert reason.endswith("install g++ or clang++, or name one in the environment variable CXX")
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert reasons(pair, options=(), device="cuda:0") == (
        "torch.compile needs triton on cuda:0 and finds none: `pip install triton`",
    )


# Backends of torch


def test_the_backend_aot_eager_computes_the_same() -> None:
    pair = make(program(layer(0)), backend="aot_eager")
    one, two = pair.cache(2), pair.cache(2)
    for count in (3, 16):
        ids = tokens(2, count)
        same(pair.feed("compile", one, ids), pair.feed("torch", two, ids))


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32" or refusals.no_compiler("cpu") is not None, reason="no C++ compiler")
def test_machine_code_computes_the_same_and_is_kept_where_the_option_says(tmp_path: Path) -> None:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    pair = make(program(), pluglm_attention_sdpa, backend="inductor", cache_dir=str(tmp_path))
    one, two = pair.cache(2), pair.cache(2)
    for count in (5, 1, 1):
        ids = tokens(2, count)
        torch.testing.assert_close(pair.feed("compile", one, ids), pair.feed("torch", two, ids), rtol=1e-4, atol=1e-4)
    assert any(tmp_path.rglob("*.cpp"))
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


@pytest.mark.gpu
def test_on_a_gpu_triton_code_computes_the_same() -> None:
    """Written where there was none, and not run yet."""
    pair = make(program())
    module = pair.module.cuda()
    specs = pair.program.attention_specs()
    backend = pluglm_attention_sdpa.pluglm_build_attention(request=AttentionRequest(specs, "cuda", "float32"))
    for part in module.modules():
        if hasattr(part, "backend"):
            part.backend = backend
    module._plan._backend = backend
    request = dataclasses.replace(pair.request, device="cuda", options=())
    executor = pluglm_executor_compile.pluglm_build_executor(request=request)
    made = CacheRequest(pair.program.slots, ("dense",), "cuda", "float32")
    one, two = (pluglm_caches.dynamic.pluglm_build_cache(request=made).new(batch_size=2) for _ in range(2))
    for count in (5, 1):
        ids = torch.tensor(tokens(2, count), device="cuda")
        with torch.no_grad():
            got = executor.run(ForwardInput(ids, one.next_positions(count), one, dense=True)).logits
            want = module.forward(ForwardInput(ids, two.next_positions(count), two, dense=True)).logits
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
