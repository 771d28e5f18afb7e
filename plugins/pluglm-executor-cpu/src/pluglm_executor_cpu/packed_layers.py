"""Layers that a quantizer has put in place of linear ones, as the blocks that the library multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pluglm.contracts import (
    Attention,
    BlockedEmbedding,
    BlockedLinear,
    DecoderProgram,
    Experts,
    FeedForward,
    GroupedLinear,
    RowBlocks,
)
from pluglm.contracts.packed import BLOCK_GROUP, BLOCK_ROWS, unfit

#: The token table's name in the module.
EMBED = "embed"
#: What hands out the tensors that it multiplies by itself.
BLOCKED = (BlockedLinear, BlockedEmbedding)


@dataclass(frozen=True)
class PackedLayer:
    """One layer's weight, its bias in float32, and whether the blocks are the layer's own tensors or a copy."""

    blocks: RowBlocks
    bias: Tensor | None
    shared: bool


def linear_sizes(program: DecoderProgram) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer that the library multiplies, and of the token table, by name in the module."""
    C = program.embedding.hidden_size
    sizes = {EMBED: (program.embedding.vocab_size, C)}
    for i, layer in enumerate(program.layers):
        for part in (part for branch in layer.branches for part in branch.parts):
            name, op = f"layers.{i}.{part.name}", part.op
            if isinstance(op, Attention):
                spec = op.spec
                sizes[f"{name}.q"] = (spec.num_heads * spec.head_dim, C)
                sizes[f"{name}.k"] = (spec.num_kv_heads * spec.head_dim, C)
                sizes[f"{name}.v"] = (spec.num_kv_heads * spec.v_head_dim, C)
                sizes[f"{name}.o"] = (C, spec.num_heads * spec.v_head_dim)
            elif isinstance(op, FeedForward):
                sizes |= _feed_forward_sizes(op, name)
            elif isinstance(op, Experts) and op.shared is not None:
                sizes |= _feed_forward_sizes(op.shared, f"{name}.shared")
    return sizes if program.head.tied else sizes | {"head": (program.embedding.vocab_size, C)}


def _feed_forward_sizes(op: FeedForward, name: str) -> dict[str, tuple[int, int]]:
    C, F = op.hidden_size, op.intermediate_size
    return {f"{name}.gate": (F, C), f"{name}.up": (F, C), f"{name}.down": (C, F)}


def packed_modules(module: nn.Module, program: DecoderProgram) -> dict[str, GroupedLinear | BlockedEmbedding]:
    """The layers in a linear layer's or the table's place whose weight can be taken over, by name."""
    sizes = linear_sizes(program)
    return {
        name: child
        for name, child in module.named_modules()
        if name in sizes
        and not isinstance(child, nn.Linear)
        and isinstance(child, BlockedEmbedding if name == EMBED else GroupedLinear)
    }


def lay_out(
    layers: Mapping[str, GroupedLinear | BlockedEmbedding], program: DecoderProgram
) -> tuple[dict[str, PackedLayer], list[str]]:
    """Each layer as blocks, and why some cannot be."""
    sizes, found, reasons = linear_sizes(program), {}, []
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in layers.items():
            shared = isinstance(layer, BLOCKED)
            if isinstance(layer, BLOCKED):
                blocks = layer.blocks
            else:
                weight = layer.grouped()
                reason = unfit(weight)
                if reason is not None:
                    reasons.append(f"{name} is a {type(layer).__name__}: {reason}")
                    continue
                blocks = RowBlocks.of(weight)
            wrong = list(_wrong(blocks, sizes[name]))
            reasons += [f"{name} is a {type(layer).__name__}: {reason}" for reason in wrong]
            bias = layer.grouped_bias() if isinstance(layer, GroupedLinear) else None
            if not wrong:
                found[name] = PackedLayer(blocks, None if bias is None else bias.detach().float().contiguous(), shared)
    return found, reasons


def _wrong(blocks: RowBlocks, size: tuple[int, int]) -> Iterator[str]:
    """What would lead the library out of a tensor: it does not look again."""
    if (blocks.rows, blocks.columns) != size:
        yield f"its blocks say [{blocks.rows}, {blocks.columns}], the program {list(size)}"
        return
    count, groups = -(-blocks.rows // BLOCK_ROWS), blocks.columns // BLOCK_GROUP
    if blocks.bits not in (4, 8) or blocks.columns % BLOCK_GROUP:
        yield f"its blocks are of {blocks.bits} bits and {blocks.columns} columns"
        return
    kind = torch.int8 if blocks.bits == 8 else torch.uint8
    scales = (torch.float16, (count, groups, BLOCK_ROWS))
    wanted = {"codes": (kind, (count, groups * blocks.bits, BLOCK_ROWS, 4)), "scale": scales, "offset": scales}
    for name, (dtype, shape) in wanted.items():
        tensor = getattr(blocks, name)
        if tensor is None and name == "offset":
            continue
        if tensor.dtype is not dtype or tuple(tensor.shape) != shape or tensor.device.type != "cpu":
            yield f"its {name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, not {dtype} {list(shape)}"
        elif not tensor.is_contiguous():
            yield f"its {name} is not contiguous"
