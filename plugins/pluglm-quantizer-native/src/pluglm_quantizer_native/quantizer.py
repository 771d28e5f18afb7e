"""Linear layers into `NativeLinear`, tied tables into `NativeEmbedding`, and their tensors into files and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pluglm import CheckpointError
from pluglm.contracts import RowBlocks
from pluglm.contracts.packed import BLOCK_GROUP, BLOCK_ROWS
from pluglm_quantizer_native.linear import NativeEmbedding, NativeLinear, Work
from pluglm_quantizer_native.rounding import rounded
from pluglm_quantizer_native.settings import HEAD, NONE, VARIANTS, Settings, Variant

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class NativeQuantizer:
    """See `pluglm.contracts.TableQuantizer`."""

    name = "native"

    def __init__(self, settings: Settings, device: str, dtype: str) -> None:
        self._settings, self._biased = settings, set(settings.biased)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._work = Work.on(device, self._dtype)
        self._sizes: dict[str, tuple[int, int]] = {}  # (out, in) of the layers that the core has asked about
        self._tables: set[str] = set()
        self.bits = VARIANTS[settings.variant].bits_per_weight

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """Layers whose `in` is not made of groups stay plain, and those that the settings leave out."""
        self._sizes[name] = (out_features, in_features)
        if self._settings.variant_of(*self._names(name)) == NONE:
            return f"the plan keeps {name} as it is"
        if in_features % BLOCK_GROUP:
            return f"its {in_features} columns are no multiple of {BLOCK_GROUP}, the size of a group"
        return None

    def table_refusal(self, name: str, columns: int, rows: int) -> str | None:
        """As `refusal`; the settings speak of the table as `head`, too."""
        self._tables.add(name)
        return self.refusal(name, columns, rows)

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """weight: [out, in]; bias: [out] or None. Raises: CheckpointError for weights that have no such form."""
        if bias is not None:
            self._biased.add(name)
        return NativeLinear(self._blocks(name, weight), bias, self._work)

    def quantize_table(self, name: str, weight: Tensor) -> nn.Module:
        """weight: [V, C]. Raises: CheckpointError for weights that have no such form."""
        self._tables.add(name)
        return NativeEmbedding(self._blocks(name, weight), self._work, self._dtype)

    def _blocks(self, name: str, weight: Tensor) -> RowBlocks:
        variant, settings = self._variant(name), self._settings
        grouped = rounded(
            name, weight, bits=variant.bits, has_offset=variant.has_offset, rounding=settings.rounding,
            weighting=settings.weighting,
        )  # fmt: skip
        return RowBlocks.of(grouped)

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        """codes, scale and offset of `pluglm.contracts.RowBlocks`, shape int32 [2]: (out, in), and bias."""
        assert isinstance(module, (NativeLinear, NativeEmbedding))
        shape = torch.tensor([module.rows, module.columns], dtype=torch.int32)
        tensors = {"codes": module.codes, "scale": module.scale, "shape": shape}
        optional = {"offset": module.offset, "bias": module.bias if isinstance(module, NativeLinear) else None}
        return tensors | {name: tensor for name, tensor in optional.items() if tensor is not None}

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """Names of `pack` for one layer."""
        offset = ("offset",) if self._variant(name).has_offset else ()
        return ("codes", "scale", "shape", *offset, *(("bias",) if name in self._biased else ()))

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer that `pack` was given. The tensors are kept as they are, mapped from a file as they may be."""
        bias = tensors.get("bias")
        return NativeLinear(self._read(name, tensors), None if bias is None else bias.to(self._dtype), self._work)

    def unpack_table(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The table that `pack` was given; its tensors are kept as they are, too."""
        self._tables.add(name)
        return NativeEmbedding(self._read(name, tensors), self._work, self._dtype)

    def _read(self, name: str, tensors: Mapping[str, Tensor]) -> RowBlocks:
        variant = self._variant(name)
        rows, columns = self._check(name, tensors, variant)
        return RowBlocks(variant.bits, rows, columns, tensors["codes"], tensors["scale"], tensors.get("offset"))

    def config(self) -> dict[str, Any]:
        """Written beside packed weights, and read back by `settings.read`."""
        return self._settings.to_config(self._biased)

    def _variant(self, name: str) -> Variant:
        return VARIANTS[self._settings.variant_of(*self._names(name))]

    def _names(self, name: str) -> tuple[str, ...]:
        """What the settings may call a layer or table."""
        return (name, HEAD) if name in self._tables else (name,)

    def _check(self, name: str, tensors: Mapping[str, Tensor], variant: Variant) -> tuple[int, int]:
        """(out, in). Raises CheckpointError unless every tensor is of the shape and dtype that `pack` gives."""
        shape = tensors["shape"]
        if shape.dtype is not torch.int32 or shape.shape != (2,):
            raise _unfit(name, "shape", f"is {_kind(shape)}, not torch.int32 [2]")
        rows, columns = (int(size) for size in shape)
        if rows < 1 or columns < 1 or columns % BLOCK_GROUP:
            raise _unfit(
                name, "shape", f"is ({rows}, {columns}), not positive and the second a multiple of {BLOCK_GROUP}"
            )
        if self._sizes.get(name, (rows, columns)) != (rows, columns):
            raise _unfit(name, "shape", f"is ({rows}, {columns}), and config.json says {self._sizes[name]}")
        blocks, unit = -(-rows // BLOCK_ROWS), 32 // variant.bits
        groups = (blocks, columns // BLOCK_GROUP, BLOCK_ROWS)
        expected: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            "codes": ((torch.int8 if variant.bits == 8 else torch.uint8,), (blocks, columns // unit, BLOCK_ROWS, 4)),
            "scale": ((torch.float16,), groups), "offset": ((torch.float16,), groups), "bias": (FLOATS, (rows,)),
        }  # fmt: skip
        for short, (dtypes, size) in expected.items():
            if short not in tensors:
                continue
            tensor = tensors[short]
            if tensor.dtype not in dtypes or tensor.shape != size:
                raise _unfit(name, short, f"is {_kind(tensor)}, not {dtypes[0]} {list(size)}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise _unfit(name, short, "holds numbers that are not finite")
        return rows, columns


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _unfit(name: str, short: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the packed weight of {name!r} does not fit: {short} {found}.",
        why="quantization_config says how it was packed.", fix="Save the model again from its plain weights.",
        tensor=f"{name}.{short}",
    )  # fmt: skip
