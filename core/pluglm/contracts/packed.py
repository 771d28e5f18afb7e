"""How packed weights meet kernels: a quantizer's layer may say what its weight is, so that an executor can run it.

Both forms are optional. A layer that offers neither runs through its own `forward`; an executor that cannot use what a
layer offers refuses the model and says which layer. A token table that is packed has one form, `BlockedEmbedding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Rows of one block and columns of one group of `RowBlocks`.
BLOCK_ROWS = 16
BLOCK_GROUP = 32


@dataclass(frozen=True)
class GroupedWeight:
    """A weight as whole numbers with a scale and an offset for each group of columns.

    The weight is scale[o, g] * codes[o, i] + offset[o, g] with g = i // group_size.

    Attributes:
        bits: of a code, 1 to 8. group_size: columns of a group; divides `in`.
        codes: [out, in], uint8 (0 … 2^bits - 1) or int8 (symmetric, -2^(bits-1) … 2^(bits-1) - 1).
        scale: [out, in / group_size] float32. offset: the same, or None where it is 0.
    """

    bits: int
    group_size: int
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def dense(self) -> Tensor:
        """[out, in] float32."""
        scale = self.scale.repeat_interleave(self.group_size, dim=1)
        weight = self.codes.float() * scale
        return weight if self.offset is None else weight + self.offset.repeat_interleave(self.group_size, dim=1)


@dataclass(frozen=True)
class RowBlocks:
    """A weight of 4 or 8 bits in groups of 32 columns, laid out as kernels read it: 16 rows abreast, nothing copied.

    Rows are filled up to whole blocks of 16 with zeros of every tensor; `columns` is a multiple of 32. The weight is
    scale * code + offset; without offsets a code of 4 bits means code - 8.

    Attributes:
        bits: 4 or 8. rows, columns: of the weight.
        codes: [blocks, columns / 4, 16, 4] int8 for 8 bits: four columns of a row side by side, the unit of the integer
            dot products of CPUs. For 4 bits [blocks, columns / 8, 16, 4] uint8: byte i of unit j holds column 8j + i in
            its low half and 8j + 4 + i in its high half, both 0 … 15.
        scale: [blocks, columns / 32, 16] float16. offset: the same, or None.
    """

    bits: int
    rows: int
    columns: int
    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None

    @classmethod
    def of(cls, weight: GroupedWeight) -> RowBlocks:
        """Lay out a weight. Scales and offsets are rounded to float16.

        Args:
            weight: of 4 or fewer bits as uint8 with offsets or int8 without, or of 8 bits as int8; its groups must be
                made of whole groups of 32 (their scales are repeated).
        Raises: ValueError for any other weight.
        """
        import torch

        reason = unfit(weight)
        if reason is not None:
            raise ValueError(reason)
        rows, columns = weight.codes.shape
        blocks, bits = -(-rows // BLOCK_ROWS), 4 if weight.bits <= 4 else 8
        times = weight.group_size // BLOCK_GROUP

        def groups(tensor: Tensor) -> Tensor:
            out = torch.zeros(blocks * BLOCK_ROWS, columns // BLOCK_GROUP, dtype=torch.float16, device=tensor.device)
            out[:rows] = tensor.repeat_interleave(times, dim=1) if times > 1 else tensor
            return out.view(blocks, BLOCK_ROWS, -1).transpose(1, 2).contiguous()

        codes, offset = weight.codes, weight.offset
        if codes.dtype is torch.uint8 and weight.bits > 4:  # 0 … 255 becomes -128 … 127
            assert offset is not None
            codes, offset = (codes.to(torch.int16) - 128).to(torch.int8), offset + 128 * weight.scale
        elif codes.dtype is torch.int8 and weight.bits <= 4:
            codes = (codes + 8).to(torch.uint8)
        filled = torch.zeros(blocks * BLOCK_ROWS, columns, dtype=codes.dtype, device=codes.device)
        filled[:rows] = codes
        units = filled.view(blocks, BLOCK_ROWS, -1, 4).transpose(1, 2)  # [blocks, columns / 4, 16, 4]
        packed = units if bits == 8 else units[:, ::2] | units[:, 1::2] << 4
        return cls(
            bits, rows, columns, packed.contiguous(), groups(weight.scale), None if offset is None else groups(offset)
        )

    def grouped(self) -> GroupedWeight:
        """The same weight row by row: a copy."""
        import torch

        def groups(tensor: Tensor) -> Tensor:
            return tensor.transpose(1, 2).reshape(-1, tensor.shape[1])[: self.rows].float()

        units, offset = self.codes, self.offset
        if self.bits == 4:
            units = torch.stack((units & 15, units >> 4), dim=2).flatten(1, 2)
        codes = units.transpose(1, 2).reshape(-1, self.columns)[: self.rows]
        if self.bits == 4 and offset is None:
            codes = codes.to(torch.int8) - 8
        return GroupedWeight(
            self.bits, BLOCK_GROUP, codes, groups(self.scale), None if offset is None else groups(offset)
        )


def unfit(weight: GroupedWeight) -> str | None:
    """Why `RowBlocks` cannot hold a weight, or None."""
    import torch

    signed = weight.codes.dtype is torch.int8
    if weight.group_size % BLOCK_GROUP:
        return f"groups of {weight.group_size} columns are not made of groups of {BLOCK_GROUP}"
    if weight.codes.shape[1] % BLOCK_GROUP:
        return f"{weight.codes.shape[1]} columns are no multiple of {BLOCK_GROUP}"
    if signed and weight.offset is not None and weight.bits <= 4:
        return "signed codes of 4 bits have no offset here"
    if not signed and weight.offset is None:
        return "unsigned codes need an offset"
    return None


@runtime_checkable
class GroupedLinear(Protocol):
    """A quantizer's layer whose weight can be taken over by other code."""

    def grouped(self) -> GroupedWeight:
        """The weight, unpacked anew at each call."""
        ...

    def grouped_bias(self) -> Tensor | None:
        """[out] in the compute dtype, or None."""
        ...


@runtime_checkable
class BlockedLinear(GroupedLinear, Protocol):
    """A quantizer's layer that keeps its weight as kernels read it: they share its storage."""

    @property
    def blocks(self) -> RowBlocks:
        """The tensors that the layer itself holds."""
        ...


@runtime_checkable
class BlockedEmbedding(Protocol):
    """A quantizer's token table [V, C], which is looked up and, where the head is tied, multiplied by."""

    @property
    def blocks(self) -> RowBlocks:
        """The tensors that the table itself holds: a row for each token."""
        ...

    def grouped(self) -> GroupedWeight:
        """The table, unpacked anew at each call."""
        ...

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] whole numbers -> [..., C] in the compute dtype."""
        ...

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ table.T + bias: [..., C] -> [..., V] in x's dtype, which is the compute dtype. bias: [V] in the same."""
        ...


@runtime_checkable
class TableReader(Protocol):
    """A module that reads a token table which another one owns: a tied head.

    That is how the core finds tables that are worth packing. Those that are only looked up stay plain: a pass reads a
    row of them.
    """

    @property
    def table(self) -> nn.Module:
        """The `nn.Embedding`, or what has replaced it."""
        ...

    def take_table(self, table: nn.Module) -> None:
        """Read this table from now on, a `BlockedEmbedding` of the same size, and let go of the one before."""
        ...
