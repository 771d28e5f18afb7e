"""bfloat16 weights as they are: packed for oneDNN where it multiplies bfloat16, widened for many rows where not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pluglm import InputError

#: Rows from which a float32 product of widened weights beats torch's bfloat16 one on a CPU without bfloat16
#: instructions, and the rows of the weight that are widened at a time. Measured, see the README.
MANY_ROWS, BLOCK = 8, 512


class PackedLinear(nn.Module):
    """A linear layer whose weight is held in oneDNN's own order and in no other. [..., in] -> [..., out]."""

    packed: Tensor
    bias_: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), persistent=False)
        self.register_buffer("bias_", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the weight's dtype. Raises: InputError if a gradient is wanted."""
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "A packed layer of onednn has no gradient.", why="oneDNN's packed product has none.",
                fix="Run under torch.no_grad(), or load the model without quantizer='onednn'.", argument="x",
            )  # fmt: skip
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias_, "none", [], "")
        return y

    def dense(self) -> Tensor:
        """The weight [out, in], a copy."""
        return self.packed.to_dense()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which opaque tensors have not: the weight goes as a plain tensor."""
        buffers = {**self._buffers, "packed": self.dense()}
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._buffers["packed"] = torch.ops.mkldnn._reorder_linear_weight(self._buffers["packed"])


class WidenedLinear(nn.Module):
    """A linear layer of bfloat16 whose product for many rows is float32. [..., in] -> [..., out].

    Products of bfloat16 numbers are exact in float32 and both forms add in float32, so results differ by the order of
    addition and one rounding at the end. Besides the weight a block of it in float32 is held while a pass runs.
    """

    values: Tensor
    bias_: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("values", weight)
        self.register_buffer("bias_", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] bfloat16."""
        out_features, in_features = self.values.shape
        if x.numel() < MANY_ROWS * in_features or (x.requires_grad and torch.is_grad_enabled()):
            return F.linear(x, self.values, self.bias_)
        wide = x.reshape(-1, in_features).float()
        y = torch.empty(wide.shape[0], out_features, dtype=x.dtype, device=x.device)
        bias = None if self.bias_ is None else self.bias_.float()
        for start in range(0, out_features, BLOCK):
            part = slice(start, start + BLOCK)
            y[:, part] = F.linear(wide, self.values[part].float(), None if bias is None else bias[part])
        return y.view(*x.shape[:-1], out_features)

    def dense(self) -> Tensor:
        """The weight [out, in] itself."""
        return self.values
