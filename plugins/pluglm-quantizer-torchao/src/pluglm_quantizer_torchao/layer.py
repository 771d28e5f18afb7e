"""The layers: torchao's weight inside, and what it is for executors that bring kernels of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pluglm.contracts import GroupedWeight
from pluglm_quantizer_torchao.storage import int4_codes


class PackedLinear(nn.Module):
    """A linear layer whose weight is a torchao tensor. [..., in] -> [..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the compute dtype."""
        y: Tensor = self.linear(x)
        return y


class GroupedPackedLinear(PackedLinear):
    """One whose weight other code can run: whole numbers with scales (`pluglm.contracts.GroupedLinear`)."""

    def grouped(self) -> GroupedWeight:
        """The weight, unpacked anew at each call."""
        weight: Any = self.linear.weight
        return GROUPED[type(weight.data).__name__](weight)

    def grouped_bias(self) -> Tensor | None:
        """[out] in the compute dtype, or None."""
        bias: Tensor | None = self.linear.bias
        return None if bias is None else bias.detach()


def packed_linear(linear: nn.Linear, *, rounds_input: bool) -> PackedLinear:
    """The layer: one that rounds its input offers no weight, for that alone would compute something else."""
    offers = not rounds_input and type(linear.weight.data).__name__ in GROUPED
    return (GroupedPackedLinear if offers else PackedLinear)(linear)


def _int8(weight: Any) -> GroupedWeight:
    return _affine(weight, bits=8)


def _intx(weight: Any) -> GroupedWeight:
    return _affine(weight, bits=int(str(weight.target_dtype).removeprefix("torch.int")))


def _affine(weight: Any, *, bits: int) -> GroupedWeight:
    """(code - zero) * scale: int8 codes where all zeros are 0, else the same counted from below."""
    rows, columns = weight.qdata.shape
    group = weight.block_size[-1]
    scale = weight.scale.detach().float().expand(rows, columns // group).contiguous()
    zero = weight.zero_point
    if zero is None or not bool(zero.any()):
        return GroupedWeight(bits, group, weight.qdata.detach(), scale)
    half = 2 ** (bits - 1)
    codes = (weight.qdata.to(torch.int16) + half).to(torch.uint8)
    return GroupedWeight(bits, group, codes, scale, -(zero.float().expand_as(scale) + half) * scale)


def _int4(weight: Any) -> GroupedWeight:
    """(code - 8) * scale + zero. Source: `_weight_int4pack_mm_for_cpu` of torch."""
    scale, zero = weight.scale_and_zero.detach().float().unbind(-1)  # [in / group, out] each
    scale, zero = scale.T.contiguous(), zero.T.contiguous()
    return GroupedWeight(4, weight.block_size[-1], int4_codes(weight.qdata), scale, zero - 8 * scale)


#: torchao's classes of whole numbers.
GROUPED = {"Int8Tensor": _int8, "IntxUnpackedToInt8Tensor": _intx, "Int4OpaqueTensor": _int4}
