"""torchao's weight tensors as plain tensors under their names, and back, for every class in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pluglm import UnsupportedRequestError
from pluglm_quantizer_torchao.library import find

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: The class whose bytes lie as this CPU's instructions want them: its codes are written out row by row.
OPAQUE = "Int4OpaqueTensor"


@dataclass(frozen=True)
class Skeleton:
    """A weight of one size without its numbers.

    Attributes:
        cls: torchao's class. attributes: all that is no tensor. required: what a file must have.
        fields: name in a file -> dtype and shape.
    """

    cls: Any
    attributes: Mapping[str, Any]
    required: tuple[str, ...]
    fields: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def quantized(config: Any, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with torchao's weight. weight: [out, in]; bias: [out] or None."""
    linear = linear_of(weight, bias)
    holder = nn.Sequential(linear)  # quantize_ may put another module in a child's place
    find("quantization:quantize_")(holder, config)
    made: Any = holder[0]
    assert type(made.weight.data) is not Tensor, f"torchao left a weight of {list(weight.shape)} as it is"
    found: nn.Linear = made
    return found


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these tensors, uncopied."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def skeleton(config: Any, out_features: int, in_features: int, device: str, dtype: torch.dtype) -> Skeleton:
    """What torchao makes of a weight of this size: on no device if it can, else of zeros on the real one."""
    size = out_features, in_features
    try:
        weight: Any = quantized(config, torch.empty(size, device="meta", dtype=dtype), None).weight
    except (AssertionError, RuntimeError, NotImplementedError, ValueError):
        weight = quantized(config, torch.zeros(size, device=device, dtype=dtype), None).weight
    names, attributes = weight.__tensor_flatten__()
    fields = {name: (getattr(weight, name).dtype, tuple(getattr(weight, name).shape)) for name in names}
    required = tuple(type(weight.data).tensor_data_names)
    if type(weight.data).__name__ == OPAQUE:
        del fields["qdata"]
        fields = {"codes": (torch.uint8, (out_features, in_features // 2)), **fields}
        required = ("codes", *required[1:])
    return Skeleton(type(weight.data), attributes, required, fields)


def flattened(weight: Any) -> dict[str, Tensor]:
    """The tensors of a weight, by name."""
    names, _ = weight.__tensor_flatten__()
    tensors = {name: getattr(weight, name).detach().contiguous() for name in names}
    if type(weight.data).__name__ == OPAQUE:
        codes = int4_codes(tensors.pop("qdata"))
        tensors = {"codes": codes[:, ::2] | codes[:, 1::2] << 4, **tensors}
    return tensors


def misfit(tensors: Mapping[str, Tensor], expected: Skeleton) -> tuple[str, str] | None:
    """The first tensor that a skeleton does not fit, and why; scales may be floats of another width."""
    for name, tensor in tensors.items():
        dtype, shape = expected.fields[name]
        near = tensor.dtype is dtype or (tensor.dtype in FLOATS and dtype in FLOATS)
        if not near or tuple(tensor.shape) != shape:
            return name, f"{tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
        if tensor.dtype in FLOATS and not bool(tensor.isfinite().all()):
            return name, "not finite"
    return None


def unflattened(tensors: Mapping[str, Tensor], expected: Skeleton) -> Any:
    """A weight of tensors that fit. Floats become those that torchao computes with in the compute dtype."""
    given = {
        name: tensor.to(expected.fields[name][0]) if tensor.dtype in FLOATS else tensor
        for name, tensor in tensors.items()
    }
    if expected.cls.__name__ == OPAQUE:
        packed = given.pop("codes")
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
        given["qdata"] = _int4_packed(codes)
    return expected.cls.__tensor_unflatten__(given, expected.attributes, None, None)


def int4_codes(qdata: Tensor) -> Tensor:
    """The codes that torch's CPU packing of 4 bits was given: 0 … 15.

    How it lays them out depends on the instructions of the CPU: blocks of rows, in each column by column. Which rows
    lie where is found by packing two columns that say where they are from; packing the result again proves it.

    Args:
        qdata: [out, in / 2] uint8, of `_convert_weight_to_int4pack_for_cpu`.
    Returns: [out, in] uint8.
    Raises: UnsupportedRequestError if a CPU does otherwise.
    """
    rows, columns = qdata.shape[0], 2 * qdata.shape[1]
    found, blocks, start = _halves(qdata), _blocks(rows), 0
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    for block in blocks if sum(map(len, blocks)) == rows else ():
        end = start + len(block) * columns
        codes[block] = found[start:end].view(columns, len(block)).T
        start = end
    if not torch.equal(_int4_packed(codes), qdata):
        reason = "this CPU's packing of 4 bits is not made of blocks of rows, so its codes cannot be found again"
        raise UnsupportedRequestError(
            "int4 weights of this CPU cannot be kept.", why=f"{reason}.", fix='Use "torchao:intx" or "torchao:int8".',
            reasons=(reason,),
        )  # fmt: skip
    return codes


def _blocks(rows: int) -> list[Tensor]:
    """The rows of each block, in their order."""
    index = torch.arange(2 * rows).view(rows, 2)
    where = torch.zeros(2 * rows, dtype=torch.int64)
    for shift in range(0, (2 * rows - 1).bit_length(), 4):
        where |= _halves(_int4_packed(index >> shift & 15)).long() << shift
    row, column = where // 2, where % 2
    ends = [0, *(torch.nonzero(column.diff() == -1).flatten() + 1).tolist(), 2 * rows]
    return [row[start : start + (end - start) // 2] for start, end in pairwise(ends)]


def _int4_packed(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int().contiguous(), 1)
    return packed


def _halves(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten()
