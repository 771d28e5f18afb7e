"""Small models with random weights, built twice: as a torch module and as its executor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pluglm_attention_eager
import pluglm_caches
import pluglm_executor_cpu
import pytest
import torch
import torch.nn.functional as F
from pluglm_blocks import build_decoder
from pluglm_executor_cpu import native
from torch import Tensor, nn

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
    GroupedWeight,
    Head,
    KVSlot,
    Layer,
    ModelDescription,
    ModelParts,
    Norm,
    Part,
    Rope,
    RowBlocks,
)
from pluglm.contracts.weights import WeightMap
from pluglm.weight_packing import quantize_module, replace_layer

with_library = pytest.mark.skipif(native.library() is None, reason="this installation has no compiled library")
SPEC = AttentionSpec(6, 3, 10, 10, 0.3)
ROPE = Rope("default", 100.0, 10)
NORM = Norm("rms", 24, 1e-5)


def layer(slot: int, spec: AttentionSpec = SPEC, rope: Rope | None = ROPE, **changed: Any) -> Layer:
    """A Llama-like layer; `changed` fields of its attention."""
    return Layer((
        Branch((Part("attn", Attention(spec, slot, rope=rope, **changed), norm_in=NORM),)),
        Branch((Part("mlp", FeedForward(24, 20, "silu"), norm_in=NORM),)),
    ))  # fmt: skip


def llama(*layers: Layer, **changed: Any) -> DecoderProgram:
    """A program of these layers, each with a slot of its own; `changed` fields of the program."""
    layers = layers or (layer(0), layer(1))
    slots = tuple(KVSlot(3, 10, 10) for _ in layers)
    program = DecoderProgram(Embedding(37, 24), layers, Norm("rms", 24, 1e-5), Head(tied=True), slots, 300)
    return dataclasses.replace(program, **changed)


@dataclasses.dataclass
class Pair:
    """One model, twice: its torch module and its executor, and what makes their caches."""

    module: Any
    executor: Any
    layout: Any
    request: Any

    def cache(self, rows: int = 1, capacity: int = 120) -> Any:
        return self.layout.new(batch_size=rows, capacity=capacity)

    @torch.no_grad()
    def feed(self, which: str, cache: Any, ids: Any, positions: Any = None, **more: Any) -> Any:
        """Logits of one pass, by "torch" or by "cpu"."""
        token_ids = torch.tensor(ids)
        dense = positions is None and cache.dense
        at = cache.next_positions(token_ids.shape[1]) if positions is None else torch.tensor(positions)
        run = self.module.forward if which == "torch" else self.executor.run
        return run(ForwardInput(token_ids, at, cache, dense=dense, **more)).logits


def make(
    program: Any, *, dtype: str = "float32", layout: str = "dynamic", quantizer: Any = None, **options: Any
) -> Pair:
    """Build a program with random weights, and pack its layers. options: of the executor."""
    specs = program.attention_specs()
    backend = pluglm_attention_eager.pluglm_build_attention(request=AttentionRequest(specs, "cpu", dtype))
    C, V = program.embedding.hidden_size, program.embedding.vocab_size
    description = ModelDescription(
        "test", program, WeightMap(()), V, C, len(program.layers), program.max_seq_len, specs, program.slots
    )
    module = build_decoder(program, ModelParts(description, backend, {}, "cpu", dtype)).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter.shape[-1] ** 0.5)
    if quantizer is not None:
        quantize_module(module, quantizer)
    made = build_layout(program, layout, dtype)
    request = ExecutorRequest(module, description, made, "cpu", dtype, None, tuple(options.items()))
    return Pair(module, pluglm_executor_cpu.pluglm_build_executor(request=request), made, request)


def with_table(pair: Pair, bits: int, *, offsets: bool = False, **options: Any) -> Pair:
    """The same module, its token table packed, and an executor for it. options: of the executor."""
    weight = pair.module.embed.weight.detach()
    blocks = RowBlocks.of(nearest(weight, bits, 32, offsets=offsets))
    replace_layer(pair.module, "embed", BlockedTable(blocks, weight.dtype))
    request = dataclasses.replace(pair.request, options=tuple(options.items()))
    executor = pluglm_executor_cpu.pluglm_build_executor(request=request)
    return dataclasses.replace(pair, executor=executor, request=request)


def build_layout(program: Any, layout: str, dtype: str) -> Any:
    """A cache layout by its name."""
    request = CacheRequest(program.slots, ("dense",), "cpu", dtype, max_seq_len=program.max_seq_len,
                           rotations=program.rotations())  # fmt: skip
    return getattr(pluglm_caches, layout).pluglm_build_cache(request=request)


def close(pair: Pair, got: torch.Tensor, want: torch.Tensor) -> None:
    """1e-4 in float32; in bfloat16 a few units in the last place of the largest logit."""
    assert got.shape == want.shape
    assert got.dtype is want.dtype
    apart = float((got.float() - want.float()).abs().max())
    assert apart <= (1e-4 if pair.request.dtype == "float32" else 0.03 * float(want.float().abs().max())), apart


# Packed weights


class Blocked(nn.Module):
    """A linear layer of `RowBlocks`, multiplied as the plain weight that they say."""

    codes: Tensor
    scale: Tensor

    def __init__(self, blocks: RowBlocks, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", blocks.codes)
        self.register_buffer("scale", blocks.scale)
        self.register_buffer("offset", blocks.offset)
        self.register_buffer("shift", bias)
        self._sizes = blocks.bits, blocks.rows, blocks.columns

    @property
    def blocks(self) -> RowBlocks:
        return RowBlocks(*self._sizes, self.codes, self.scale, self.offset)  # type: ignore[arg-type]

    def grouped(self) -> GroupedWeight:
        return self.blocks.grouped()

    def grouped_bias(self) -> Tensor | None:
        return self.shift  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.grouped().dense().to(x.dtype), self.grouped_bias())


class BlockedTable(Blocked):
    """A token table of `RowBlocks`, in the compute dtype of a model."""

    def __init__(self, blocks: RowBlocks, dtype: torch.dtype) -> None:
        super().__init__(blocks, None)
        self._dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.grouped().dense().to(self._dtype)[token_ids]

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.grouped().dense().to(x.dtype), bias)


class Grouped(nn.Module):
    """The same of a `GroupedWeight`, whose layout is its own affair."""

    def __init__(self, weight: GroupedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def grouped(self) -> GroupedWeight:
        return self._weight

    def grouped_bias(self) -> Tensor | None:
        return self._bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight.dense().to(x.dtype), self._bias)


def nearest(weight: Tensor, bits: int, group: int, *, offsets: bool) -> GroupedWeight:
    """Round to the nearest of 2^bits steps: between a group's extremes, or evenly about zero."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // group, group)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    if not offsets:
        scale = (torch.maximum(-low, high) / (2 ** (bits - 1) - 1)).half().float()
        codes = (groups / scale[..., None]).round().to(torch.int8)
        return GroupedWeight(bits, group, codes.view(rows, columns), scale)
    scale, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return GroupedWeight(bits, group, codes.view(rows, columns), scale, low)


class Nearest:
    """A quantizer. bits, offsets: by the layer's name, or by "" for the rest; blocked: hands out blocks."""

    name, bits = "nearest", 4.5

    def __init__(
        self, bits: Mapping[str, int] | int = 8, *, offsets: bool = False, group: int = 32, blocked: bool = True
    ) -> None:
        self._bits = {"": bits} if isinstance(bits, int) else bits
        self._offsets, self._group, self._blocked = offsets, group, blocked

    def bits_of(self, name: str) -> int:
        """0: the layer stays as it is."""
        return next((bits for part, bits in self._bits.items() if part in name), 0)

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        return "it stays" if in_features % self._group or not self.bits_of(name) else None

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        grouped = nearest(weight, self.bits_of(name), self._group, offsets=self._offsets)
        return Blocked(RowBlocks.of(grouped), bias) if self._blocked else Grouped(grouped, bias)
