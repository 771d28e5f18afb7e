"""Absmax rounding, and the layer that multiplies by it."""

import torch
from torch import nn

from acme_quantizer import CALLS


class Rows8Linear(nn.Module):
    def __init__(self, packed, scale, offset):
        super().__init__()
        self.register_buffer("packed", packed)  # [out, in] int8
        self.register_buffer("scale", scale)  # [out] float32
        self.register_buffer("offset", offset)  # [out] or None

    def forward(self, x):
        CALLS["forward"] += 1
        y = (x.float() @ self.packed.float().T * self.scale).to(x.dtype)
        return y if self.offset is None else y + self.offset


class Rows8:
    name = "rows8"
    bits = 8.0

    def refusal(self, name, in_features, out_features):
        return "the head stays as it is" if name == "head" else None

    def quantize(self, name, weight, bias):
        CALLS["quantize"] += 1
        scale = weight.float().abs().amax(1).clamp(min=1e-12) / 127
        packed = (weight.float() / scale[:, None]).round().to(torch.int8)
        return Rows8Linear(packed, scale, bias)

    def pack(self, module):
        tensors = {"packed": module.packed, "scale": module.scale}
        return tensors if module.offset is None else {**tensors, "offset": module.offset}

    def tensor_names(self, name):
        return ("packed", "scale")

    def unpack(self, name, tensors):
        CALLS["unpack"] += 1
        return Rows8Linear(tensors["packed"].clone(), tensors["scale"].clone(), tensors.get("offset"))

    def config(self):
        return {"quant_method": "rows8"}
