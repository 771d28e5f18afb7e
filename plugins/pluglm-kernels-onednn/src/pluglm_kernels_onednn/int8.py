"""int8 weights, one scale a row: a weight-only product for few rows, oneDNN's product of integers for many.

Few rows are bound by reading the weight. Many are bound by multiplying, and there each row of the input is rounded to
whole numbers of its own scale and offset:

    x[r, i] ≈ s[r] · (c[r, i] - z[r]),    y[r, o] = s[r] · (w[o] · Σᵢ c[r, i] · q[o, i] - z[r] · w[o] · Σᵢ q[o, i])

oneDNN takes one scale for all rows. So it is told that the scale is 1, and the rows are scaled afterwards: what it
computes in the first sum is exact, and a row does not depend on its neighbours.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks", section 2.2 and 2.3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pluglm import InputError
from pluglm.contracts import GroupedWeight
from pluglm_kernels_onednn import capability

#: Rows up to which the weight-only product is the faster one: with packed weights at hand, and if they must be packed
#: for the pass. Measured, see the README.
FEW_ROWS_KEPT, FEW_ROWS = 8, 48
#: The weight-only product reads this many columns at a time on some CPU, and past the end of a row that has fewer.
COLUMNS = 32


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [out, in] in -127 … 127, and scales [out], bfloat16, so that both products use the same ones.

    Args:
        weight: [out, in], floating. A row's scale is its largest value / 127, rounded up to bfloat16.
    """
    wide = weight.float()
    exact = wide.abs().amax(dim=1) / 127
    bits = exact.contiguous().view(torch.int32) + 0xFFFF  # positive: the next bfloat16, unless it is one
    scale = (bits & ~0xFFFF).view(torch.float32)
    scale = scale.masked_fill(scale < torch.finfo(torch.float32).tiny, 1.0)  # of a row of zeros
    codes = (wide / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes, scale.to(torch.bfloat16)


def rounded_rows(x: Tensor, highest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each row of x as whole numbers 0 … highest: codes uint8 [rows, in], scales and offsets float32 [rows, 1].

    Zero is met exactly. A row with a NaN or an infinity has a scale of that kind, so its results say so.
    """
    least, most = torch.aminmax(x, dim=1, keepdim=True)
    least, most = least.float().clamp(max=0), most.float().clamp(min=0)
    scale = ((most - least) / highest).clamp(min=1e-30)
    offset = (-least / scale).round_()
    return (x / scale).round_().add_(offset).clamp_(0, highest).to(torch.uint8), scale, offset


class Int8Linear(nn.Module):
    """[..., in] -> [..., out] in x's dtype. Two products: see `few_rows`.

    Up to `few_rows` rows, activations are bfloat16 and sums float32: only the weight is rounded to int8. With more rows
    activations are rounded as well.

    Args:
        codes: [out, in] int8, none is -128. scale: [out] bfloat16. bias: [out] or None.
        keep_packed: hold a second copy of the weight, packed for oneDNN, and pack no more in each pass of many rows.
        few_rows: None: what was measured.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor
    bias_: Tensor | None

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, *, keep_packed: bool, few_rows: int | None
    ) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias_", bias)
        self.few_rows = few_rows if few_rows is not None else FEW_ROWS_KEPT if keep_packed else FEW_ROWS
        wide = scale.float()
        self.register_buffer("sums", codes.sum(dim=1).float() * wide, persistent=False)  # w[o] · Σᵢ q[o, i]
        self.keep_packed = keep_packed
        self._packed: Tensor | None = capability.prepack(codes) if keep_packed else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in], bfloat16 or float32. Raises: InputError if a gradient is wanted."""
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "An int8 layer of onednn has no gradient.", why="its activations are rounded to whole numbers.",
                fix="Run under torch.no_grad(), or load the model without quantizer='onednn'.", argument="x",
            )  # fmt: skip
        rows = x.reshape(-1, self.codes.shape[1])
        if rows.shape[0] <= self.few_rows:
            y = self.weight_only(rows) if rows.shape[0] else rows.new_empty(0, self.codes.shape[0])
        else:
            y = self.integers(rows)
        if self.bias_ is not None:
            y = y + self.bias_
        return y.to(x.dtype).view(*x.shape[:-1], self.codes.shape[0])

    def weight_only(self, x: Tensor) -> Tensor:
        """For few rows. x: [rows, in]; [rows, out] bfloat16, whatever x is: in float32 torch's product is no faster
        than one number at a time."""
        x = x.to(torch.bfloat16).contiguous()
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scale)
        return y

    def integers(self, x: Tensor) -> Tensor:
        """For many rows. x: [rows, in]; [rows, out] float32."""
        packed = self._packed
        if packed is None:
            packed = capability.prepack(self.codes)
            self._packed = packed if self.keep_packed else None
        codes, scale, offset = rounded_rows(x, capability.highest_code())
        y = capability.multiply(codes, packed, self.scale.float())
        return y.addcmul_(offset, self.sums, value=-1).mul_(scale)

    def grouped(self) -> GroupedWeight:
        """See `pluglm.contracts.GroupedLinear`: one group a row."""
        return GroupedWeight(8, self.codes.shape[1], self.codes, self.scale.float()[:, None])

    def grouped_bias(self) -> Tensor | None:
        """[out] in the compute dtype, or None."""
        return self.bias_

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: opaque tensors can be neither, and are made again."""
        return {**self.__dict__, "_packed": None}
