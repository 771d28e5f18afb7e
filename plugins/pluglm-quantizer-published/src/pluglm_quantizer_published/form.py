"""What a packed layer is made of: which tensors, of which shapes and dtypes, and how they become a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pluglm.errors import CheckpointError
from pluglm_quantizer_published.rounding import Rounding
from pluglm_quantizer_published.scaled import ScaledWeight

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: Tensor name -> allowed dtypes and the shape.
Fields = Mapping[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Form:
    """One way to pack; a subclass a format.

    Attributes:
        rounding: of the layer's input, or None.
        required, optional: short names of the tensors. input_names: those of the input's scale and zero point.
    """

    rounding: Rounding | None = None
    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ("bias",)
    input_names: ClassVar[tuple[str, str]] = ("input_scale", "input_zero_point")

    def names(self) -> tuple[str, ...]:
        """The tensors that a layer of this form must have, where that depends on the form's settings."""
        return self.required

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(in, out), as the tensors say."""
        raise NotImplementedError

    def fields(self, in_features: int, out_features: int) -> Fields:
        """All tensors that this form knows. Raises ValueError if no layer of these sizes can be packed so."""
        raise NotImplementedError

    def scaled(self, tensors: Mapping[str, Tensor], in_features: int, *, regular: bool) -> ScaledWeight:
        """Unpack. in_features, regular: what `sizes` and `is_regular` said when the layer was built."""
        raise NotImplementedError

    def is_regular(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whole numbers in groups of one size, whose columns stand side by side?"""
        raise NotImplementedError

    def check_values(self, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with the numbers, beyond shapes and dtypes."""
        return None

    def check(self, layer: str, tensors: Mapping[str, Tensor], sizes: tuple[int, int] | None) -> None:
        """Raise CheckpointError unless the tensors fit each other and the model.

        Args:
            layer: for the message. sizes: (in, out) of the model's layer, or None if nobody said.
        """
        for short in self.names():
            if short not in tensors:
                raise misfit(layer, short, "it is missing")
        first = self.names()[0]
        if tensors[first].ndim != 2:
            raise misfit(layer, first, f"it has shape {list(tensors[first].shape)}, a packed weight is a matrix")
        found = self.sizes(tensors)
        if sizes is not None and found != sizes:
            what = f"it is packed from {found[0]} columns and {found[1]} rows, the model has {sizes[0]} and {sizes[1]}"
            raise misfit(layer, first, what)
        try:
            fields = self.fields(*found)
        except ValueError as e:
            raise misfit(layer, first, str(e)) from e
        for short, tensor in tensors.items():
            dtypes, shape = fields[short]
            found_shape = (
                shape if tensor.numel() == 1 and shape in ((), (1,)) else tuple(tensor.shape)
            )  # both are written
            if tensor.dtype not in dtypes or found_shape != shape:
                wanted = f"{' or '.join(_name(d) for d in dtypes)} {list(shape)}"
                raise misfit(layer, short, f"it is {_name(tensor.dtype)} {list(tensor.shape)}, not {wanted}")
            if "scale" in short and not bool(as_scale(tensor).isfinite().all()):
                raise misfit(layer, short, "it holds scales that are no numbers")
        if wrong := self.check_values(tensors):
            raise misfit(layer, first, wrong)


def as_scale(tensor: Tensor) -> Tensor:
    """float32. uint8 is what float8_e8m0fnu was stored as before torch had it: powers of two."""
    if tensor.dtype is torch.uint8:
        return torch.exp2(tensor.float() - 127)
    return tensor.float()


def misfit(layer: str, short: str, what: str) -> CheckpointError:
    """The error of one tensor."""
    return CheckpointError(
        f"the packed tensor {short} of {layer} does not fit: {what}.",
        why="quantization_config and the model's sizes say what it must be; another reading would give noise.",
        fix="Check that config.json and the weights belong together, or use an unpacked copy of the model.",
        tensor=f"{layer}.{short}",
    )


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
