"""The layers: they keep the tensors of the file as they are and unpack them in each product."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pluglm.contracts import GroupedWeight
from pluglm_quantizer_published.form import Form
from pluglm_quantizer_published.scaled import ScaledWeight


class PackedLinear(nn.Module):
    """A linear layer over the tensors of a file. [..., in] -> [..., out].

    Its buffers are called `stored_` and the name in the file.
    """

    def __init__(self, form: Form, tensors: Mapping[str, Tensor], dtype: torch.dtype, *, regular: bool) -> None:
        super().__init__()
        self.form, self.shorts, self.dtype, self.regular = form, tuple(tensors), dtype, regular
        self.in_features, self.out_features = form.sizes(tensors)
        for short, tensor in tensors.items():
            self.register_buffer(f"stored_{short}", tensor)

    def stored(self) -> dict[str, Tensor]:
        """The tensors under their short names in the file."""
        return {short: self.get_buffer(f"stored_{short}") for short in self.shorts}

    def scaled(self) -> ScaledWeight:
        """The weight, unpacked anew."""
        return self.form.scaled(self.stored(), self.in_features, regular=self.regular)

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """[out] in `dtype`, or None."""
        return self.get_buffer("stored_bias").to(dtype) if "bias" in self.shorts else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the compute dtype."""
        return nn.functional.linear(x, self.scaled().dense(x.dtype), self.bias_in(x.dtype))


class RegularLinear(PackedLinear):
    """One whose weight other code can run: whole numbers, groups side by side (`pluglm.contracts.GroupedLinear`)."""

    def grouped(self) -> GroupedWeight:
        """The weight, unpacked anew at each call."""
        return self.scaled().grouped()

    def grouped_bias(self) -> Tensor | None:
        """[out] in the compute dtype, or None."""
        return self.bias_in(self.dtype)


class RoundingLinear(PackedLinear):
    """One whose input is rounded too. The product is in float32 (float64 for float64), as kernels add up."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the compute dtype."""
        rounding, stored = self.form.rounding, self.stored()
        assert rounding is not None, "packed_linear chose this class for it"
        wide = torch.float64 if x.dtype is torch.float64 else torch.float32
        scale, zero = (stored.get(name) for name in self.form.input_names)
        rounded = rounding(x.to(wide), scale, zero)
        return nn.functional.linear(rounded, self.scaled().dense(wide), self.bias_in(wide)).to(x.dtype)


def packed_linear(form: Form, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PackedLinear:
    """The layer of checked tensors: a kind that offers no more than it can keep."""
    regular = form.is_regular(tensors)
    kind = RoundingLinear if form.rounding is not None else RegularLinear if regular else PackedLinear
    return kind(form, tensors, dtype, regular=regular)
