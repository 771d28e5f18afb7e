"""A linear layer of packed codes, and what a file holds of it.

Source: `HQQLinear.state_dict` of hqq 0.2.8, whose numbers and words are tensors too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pluglm import CheckpointError
from pluglm.contracts import GroupedWeight
from pluglm_quantizer_hqq import codes
from pluglm_quantizer_hqq.settings import BITS, Grid

#: What a layer cannot be read without.
NEEDED = ("W_q", "nbits", "group_size", "shape", "scale", "zero", "axis", "packing")
#: What files of hqq hold besides: facts that follow from the others, or that must be as here.
BESIDE = (
    "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
#: Of these, those that mean a layout of another kind if they are set (or, the last two, if they are not).
_FLAGS = {
    "quant_scale": False, "quant_zero": False, "offload_meta": False, "channel_wise": True, "encoded_state_dict": True,
}  # fmt: skip


class HqqLinear(nn.Module):
    """A linear layer of packed codes. [..., in] -> [..., out].

    Buffers: packed, see `codes.pack`; scale and zero [groups, 1] (axis 1) or [1, groups] (axis 0); shift [out] or None,
    the bias; the last three in the compute dtype.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    shift: Tensor | None

    def __init__(
        self, packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, grid: Grid, size: tuple[int, int]
    ) -> None:
        """grid: its group_size is a number. size: (out, in)."""
        super().__init__()
        self.grid, self.size = grid, size
        self.rows = size[0] * size[1] // (grid.group_size or 1) if grid.axis == 1 else grid.group_size or 1
        for name, tensor in {"packed": packed, "scale": scale, "zero": zero, "shift": bias}.items():
            self.register_buffer(name, tensor)

    @property
    def bits(self) -> float:
        """Of a weight, scales and zeros included."""
        return 8 * sum(t.nbytes for t in (self.packed, self.scale, self.zero)) / (self.size[0] * self.size[1])

    def dense(self) -> Tensor:
        """The weight, [out, in] in the compute dtype."""
        whole = codes.unpack(self.packed, self.grid.bits, self.rows)
        return ((whole.to(self.scale.dtype) - self.zero) * self.scale).view(self.size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the compute dtype."""
        y = x @ self.dense().T
        return y if self.shift is None else y + self.shift


class GroupedHqqLinear(HqqLinear):
    """The same, of which each group lies within a row: see `pluglm.contracts.GroupedLinear`."""

    def grouped(self) -> GroupedWeight:
        """The weight, unpacked anew."""
        groups = self.size[0], -1
        scale, zero = self.scale.float(), self.zero.float()
        whole = codes.unpack(self.packed, self.grid.bits, self.rows).to(torch.uint8)
        return GroupedWeight(
            self.grid.bits, self.grid.group_size or self.size[1], whole.reshape(self.size), scale.reshape(groups),
            (-zero * scale).reshape(groups),
        )  # fmt: skip

    def grouped_bias(self) -> Tensor | None:
        """[out] in the compute dtype, or None."""
        return self.shift


def make(
    packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, grid: Grid, size: tuple[int, int]
) -> HqqLinear:
    """The layer of these tensors, of the kind that says most."""
    within = grid.axis == 1 and size[1] % (grid.group_size or 1) == 0
    return (GroupedHqqLinear if within else HqqLinear)(packed, scale, zero, bias, grid, size)


def write(layer: HqqLinear) -> dict[str, Tensor]:
    """The tensors that hqq writes for this layer."""
    grid = layer.grid
    numbers = {"nbits": grid.bits, "group_size": grid.group_size or 0, "axis": grid.axis}
    flags = {"view_as_float": False, "stores_quant_config": True, "optimize": True, "round_zero": grid.bits == 4}
    words = {
        "packing": codes.PACKING[grid.bits], "unpack_view_dtype": str(codes.storage(grid.bits)),
        "compute_dtype": str(layer.scale.dtype),
    }  # fmt: skip
    tensors = {"W_q": layer.packed, "scale": layer.scale, "zero": layer.zero, "shape": torch.tensor(layer.size)}
    tensors |= {name: torch.tensor(value, dtype=torch.int32) for name, value in numbers.items()}
    tensors |= {name: torch.tensor(int(v), dtype=torch.uint8) for name, v in {**flags, **_FLAGS}.items()}
    tensors |= {name: torch.tensor(list(word.encode()), dtype=torch.uint8) for name, word in words.items()}
    return tensors if layer.shift is None else {**tensors, "bias": layer.shift}


def read(name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, wanted: tuple[int, int] | None) -> HqqLinear:
    """The layer of these tensors.

    Args:
        dtype: the compute dtype, whatever `compute_dtype` was. wanted: (out, in) of the layer, None if nobody knows.
    Raises: CheckpointError unless they fit each other and the layer.
    """
    grid, size = _grid(name, tensors, wanted)
    packed, group = tensors["W_q"], grid.group_size or 1
    groups = size[0] * size[1] // group
    rows, columns = (groups, group) if grid.axis == 1 else (group, groups)
    storage, shape = codes.storage(grid.bits), (-(-rows // codes.PER[grid.bits]), columns)
    if packed.is_floating_point() and _flag(tensors, "view_as_float"):
        packed = packed.contiguous().view(storage)
    if packed.dtype != storage or tuple(packed.shape) != shape:
        raise _damaged(name, "W_q", f"it is {packed.dtype} {list(packed.shape)}, not {storage} {list(shape)}")
    one = (groups, 1) if grid.axis == 1 else (1, groups)
    for short, form in {"scale": one, "zero": one, "bias": (size[0],)}.items():
        tensor = tensors.get(short)
        if tensor is not None and (not tensor.is_floating_point() or tuple(tensor.shape) != form):
            found = f"it is {tensor.dtype} {list(tensor.shape)}, not floating point {list(form)}"
            raise _damaged(name, short, found)
    bias = tensors.get("bias")
    return make(
        packed, tensors["scale"].to(dtype), tensors["zero"].to(dtype), None if bias is None else bias.to(dtype), grid,
        size,
    )  # fmt: skip


def _grid(name: str, tensors: Mapping[str, Tensor], wanted: tuple[int, int] | None) -> tuple[Grid, tuple[int, int]]:
    """How a layer is packed, and (out, in)."""
    for short, usual in _FLAGS.items():
        if short in tensors and _flag(tensors, short) is not usual:
            raise _damaged(name, short, f"it is {tensors[short].tolist()}, which means a layout that is not read here")
    size = tensors["shape"].tolist()
    if tensors["shape"].ndim != 1 or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise _damaged(name, "shape", f"it is {size}, not [out, in]")
    if wanted is not None and size != [*wanted]:
        raise _damaged(name, "shape", f"it is {size}, the layer is {[*wanted]}")
    bits, group, axis = (_number(name, tensors, short) for short in ("nbits", "group_size", "axis"))
    if bits not in BITS:
        raise _damaged(name, "nbits", f"it is {bits}, not one of {', '.join(map(str, BITS))}")
    if axis not in (0, 1):
        raise _damaged(name, "axis", f"it is {axis}, not 0 or 1")
    if group < 1 or size[0] * size[1] % group:
        raise _damaged(name, "group_size", f"it is {group}, of which {size[0]} x {size[1]} weights are not made")
    word = tensors["packing"]
    packing = bytes(word.tolist()).decode("ascii", "replace") if word.dtype == torch.uint8 and word.ndim == 1 else None
    if packing != codes.PACKING[bits]:
        raise _damaged(name, "packing", f"it is {packing!r}, not {codes.PACKING[bits]!r}")
    return Grid(bits, group, axis), (size[0], size[1])


def _flag(tensors: Mapping[str, Tensor], short: str) -> bool | None:
    tensor = tensors.get(short)
    return None if tensor is None or tensor.numel() != 1 else bool(tensor)


def _number(name: str, tensors: Mapping[str, Tensor], short: str) -> int:
    tensor = tensors[short]
    if tensor.numel() != 1 or tensor.is_floating_point():
        raise _damaged(name, short, f"it is {tensor.dtype} {list(tensor.shape)}, not a whole number")
    return int(tensor)


def _damaged(name: str, short: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the packed weight of {name!r} cannot be read: {short}: {found}.",
        why="quantization_config says hqq.",
        fix="Get the file again, or save the model again from its plain weights.", tensor=f"{name}.{short}",
    )  # fmt: skip
