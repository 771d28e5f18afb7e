"""Linear layers and token tables that hold their weight in blocks and unpack a part at a time while they multiply."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pluglm.contracts import GroupedWeight, RowBlocks
from pluglm.contracts.packed import BLOCK_GROUP, BLOCK_ROWS

#: The low halves of four bytes, and as bytes whatever their order.
LOW = 0x0F0F0F0F


@dataclass(frozen=True)
class Work:
    """How products are computed.

    Attributes:
        dtype: of a product.
        at_once: weights that are unpacked at once; few enough that on a CPU they stay in its cache.
    """

    dtype: torch.dtype
    at_once: int

    @classmethod
    def on(cls, device: str, dtype: torch.dtype) -> Work:
        """For layers on a device in a compute dtype.

        CPUs without the instructions multiply float16 and bfloat16 many times slower than float32 (torch 2.13, AVX2).
        There the product is float32, and only its result is rounded to the compute dtype.
        """
        if not device.startswith("cpu"):
            return cls(dtype, 2**26)
        fast = dtype is torch.bfloat16 and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return cls(dtype if fast or dtype is torch.float64 else torch.float32, 2**18)


class _Blocked(nn.Module):
    """A weight in blocks, and products with it. The unpacked weight is never kept."""

    codes: Tensor
    scale: Tensor
    offset: Tensor | None

    def __init__(self, blocks: RowBlocks, work: Work) -> None:
        super().__init__()
        self.bits, self.rows, self.columns = blocks.bits, blocks.rows, blocks.columns
        self.register_buffer("codes", blocks.codes)
        self.register_buffer("scale", blocks.scale)
        self.register_buffer("offset", blocks.offset)
        self._work = work
        self._blocks_at_once = max(1, work.at_once // (BLOCK_ROWS * self.columns))

    @property
    def blocks(self) -> RowBlocks:
        """The tensors that this layer holds."""
        return RowBlocks(self.bits, self.rows, self.columns, self.codes, self.scale, self.offset)

    def grouped(self) -> GroupedWeight:
        """The weight row by row: a copy."""
        return self.blocks.grouped()

    def _times(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., columns] @ weight.T + bias: [..., rows] in x's dtype."""
        flat, parts = x.to(self._work.dtype), []
        bias = None if bias is None else bias.to(self._work.dtype)
        for first in range(0, len(self.codes), self._blocks_at_once):
            last = first + self._blocks_at_once
            rows = slice(first * BLOCK_ROWS, min(last * BLOCK_ROWS, self.rows))
            weight = self._dense(slice(first, last))[: rows.stop - rows.start]
            parts.append(linear(flat, weight, None if bias is None else bias[rows]))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).to(x.dtype)

    def _dense(self, part: slice) -> Tensor:
        """The rows of some blocks, filled up as they are, in the dtype of products: [rows, in].

        Four columns of a row lie side by side and are moved as one int32, before the codes become numbers.
        """
        units = self.codes[part].flatten(2).view(torch.int32).transpose(1, 2).contiguous()  # [blocks, 16, units]
        offset = None if self.offset is None else _by_row(self.offset[part])
        return self._numbers(units.flatten(0, 1), _by_row(self.scale[part]), offset)

    def _numbers(self, units: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
        """units [rows, units] int32, scale and offset [rows, groups]: [rows, columns] in the dtype of products."""
        if self.bits == 4:
            units = torch.stack((units & LOW, units >> 4 & LOW), dim=-1)
        exact = torch.float64 if self._work.dtype is torch.float64 else torch.float32
        codes = units.view(torch.int8).view(-1, self.columns // BLOCK_GROUP, BLOCK_GROUP).to(exact)
        scale = scale.to(exact)[..., None]
        if offset is not None:
            torch.addcmul(offset.to(exact)[..., None], codes, scale, out=codes)
        elif self.bits == 4:
            torch.addcmul(-8 * scale, codes, scale, out=codes)
        else:
            codes.mul_(scale)
        return codes.view(-1, self.columns).to(self._work.dtype)


class NativeLinear(_Blocked):
    """[..., in] -> [..., out]; see `pluglm.contracts.BlockedLinear`."""

    bias: Tensor | None

    def __init__(self, blocks: RowBlocks, bias: Tensor | None, work: Work) -> None:
        super().__init__(blocks, work)
        self.register_buffer("bias", bias)

    def grouped_bias(self) -> Tensor | None:
        """[out] in the compute dtype, or None."""
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the compute dtype. Returns [..., out] in the same."""
        return self._times(x, self.bias)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"in={self.columns}, out={self.rows}, bits={self.bits}, offset={self.offset is not None}"


class NativeEmbedding(_Blocked):
    """A token table [V, C]; see `pluglm.contracts.BlockedEmbedding`. A look-up unpacks the rows that it asks for."""

    def __init__(self, blocks: RowBlocks, work: Work, dtype: torch.dtype) -> None:
        super().__init__(blocks, work)
        self._dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] whole numbers -> [..., C] in the compute dtype. Raises: IndexError for ids that the table lacks."""
        ids = token_ids.flatten()
        inside = (ids >= 0) & (ids < self.rows)
        block = ids.div(BLOCK_ROWS, rounding_mode="floor")
        row = torch.where(inside, ids % BLOCK_ROWS, BLOCK_ROWS)  # no block has such a row
        units = self.codes[block, :, row].view(torch.int32).squeeze(-1)  # [ids, units]
        offset = None if self.offset is None else self.offset[block, :, row]
        numbers = self._numbers(units, self.scale[block, :, row], offset)
        return numbers.to(self._dtype).view(*token_ids.shape, self.columns)

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [..., C] in the compute dtype, bias: [V]. Returns x @ table.T + bias, [..., V] in the same."""
        return self._times(x, bias)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"{self.rows}, {self.columns}, bits={self.bits}, offset={self.offset is not None}"


def _by_row(groups: Tensor) -> Tensor:
    """[blocks, groups, 16] -> [rows, groups]."""
    return groups.transpose(1, 2).flatten(0, 1)
