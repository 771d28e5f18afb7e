"""Weights as int8 rows; inputs become int8 too, but for the columns that hold large values: those stay as they are.

A column of the input counts as large if any token of the call is large there, so a token's result depends, within the
rounding of int8, on the tokens that it is computed with. That is the method, not an accident of this package.

Source: Dettmers et al. 2022, "LLM.int8()", section 3; `Linear8bitLt` and `MatMul8bitLt` of bitsandbytes 0.50.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pluglm import CheckpointError
from pluglm_quantizer_bitsandbytes.settings import Settings

NAMES = ("weight", "SCB", "weight_format")


class Int8Linear(nn.Module):
    """A linear layer by LLM.int8. [..., in] -> [..., out].

    Buffers: codes int8 [out, in]; absmax float32 [out], the largest value of each row; shift [out] or None, the bias.
    """

    codes: Tensor
    absmax: Tensor
    shift: Tensor | None

    def __init__(self, codes: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        for name, tensor in {"codes": codes, "absmax": absmax, "shift": bias}.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]; the result has its dtype."""
        ops, bias = torch.ops.bitsandbytes, self.shift
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])  # [n, in]
        # A copy: the operator sets large values to zero for a moment.
        half = rows.to(torch.float16, copy=True, memory_format=torch.contiguous_format)
        codes, absmax, large = ops.int8_vectorwise_quant.default(half, self.threshold)
        y: Tensor
        if self.threshold > 0:
            y, _ = ops.int8_mixed_scaled_mm.default(rows, codes, self.codes, absmax, self.absmax, large, bias)
        else:
            y = ops.int8_scaled_mm.default(codes, self.codes, absmax, self.absmax, bias=bias, dtype=x.dtype)
        return y.reshape(*x.shape[:-1], self.codes.shape[0])  # [..., out]


def quantize(weight: Tensor, bias: Tensor | None, threshold: float) -> Int8Linear:
    """weight: [out, in], which is rounded to float16 first, as the library does; bias: [out] or None."""
    half = weight.to(torch.float16, copy=True, memory_format=torch.contiguous_format)
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(half)
    return Int8Linear(codes, absmax, bias, threshold)


def pack(layer: Int8Linear) -> dict[str, Tensor]:
    """The tensors that bitsandbytes writes for this layer; format 0 means rows."""
    form = torch.tensor(0, dtype=torch.uint8)
    tensors = {"weight": layer.codes, "SCB": layer.absmax, "weight_format": form}
    return tensors if layer.shift is None else {**tensors, "bias": layer.shift}


def unpack(name: str, tensors: Mapping[str, Tensor], settings: Settings, size: tuple[int, int] | None) -> Int8Linear:
    """The layer of these tensors.

    Args:
        size: (out, in) of the layer, None if nobody knows.
    Raises: CheckpointError unless they fit each other and the layer.
    """
    codes, bias = tensors["weight"], tensors.get("bias")
    wanted = "[out, in]" if size is None else str([*size])
    if codes.dtype != torch.int8 or codes.ndim != 2 or (size is not None and tuple(codes.shape) != size):
        raise _damaged(name, "weight", f"it is {codes.dtype} {list(codes.shape)}, not torch.int8 {wanted}")
    rows = codes.shape[0]
    absmax, form = tensors["SCB"], tensors["weight_format"]
    if absmax.dtype != torch.float32 or tuple(absmax.shape) != (rows,):
        raise _damaged(name, "SCB", f"it is {absmax.dtype} {list(absmax.shape)}, not torch.float32 [{rows}]")
    if form.numel() != 1 or int(form) != 0:
        raise _damaged(name, "weight_format", f"it is {form.tolist()}, not 0 (rows)")
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (rows,)):
        raise _damaged(name, "bias", f"it is {bias.dtype} {list(bias.shape)}, not floating point [{rows}]")
    bias = None if bias is None else bias.to(getattr(torch, settings.dtype))
    return Int8Linear(codes, absmax, bias, settings.threshold)


def _damaged(name: str, short: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the packed weight of {name!r} cannot be read: {short}: {found}.",
        why="quantization_config says bitsandbytes in 8 bits.",
        fix="Get the file again, or save the model again from its plain weights.", tensor=f"{name}.{short}",
    )  # fmt: skip
