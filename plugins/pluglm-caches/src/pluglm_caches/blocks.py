"""Keys and values of whole blocks of cells, packed: keys a channel at a time, values a token at a time.

Some channels of keys are large in every token, so a group of keys is one channel of one block. Values have no such
channels, so a group of values is a stretch of the channels of one token.

Source: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pluglm.contracts import KVSlot
from pluglm_caches.affine import Fit, decode, encode
from pluglm_caches.packing import pack, unpack
from pluglm_caches.stores import zeros

_BLOCKS, _CELLS = 2, 3  # axes of every tensor here: its blocks, and a block's cells


@dataclass(frozen=True)
class Packed:
    """Keys or values of N blocks. codes: uint8. scale, zero: 16-bit numbers, broadcastable to the unpacked codes."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Blocks:
    """N blocks of g cells, with p = 8 / bits codes a byte; n groups of c channels cover the Dv channels of a value.

    Attributes:
        k: codes [B, K, N, g/p, D], scale and zero [B, K, N, 1, D].
        v: codes [B, K, N, g/p, n, c], scale and zero [B, K, N, g, n, 1].
    """

    k: Packed
    v: Packed

    def named(self) -> dict[str, Tensor]:
        """The six tensors; blocks are axis 2 of each."""
        return {f"{part}.{name}": tensor for part in ("k", "v") for name, tensor in vars(getattr(self, part)).items()}

    def map(self, act: Callable[[Tensor], Tensor]) -> Blocks:
        """The same with every tensor replaced."""
        return Blocks(*(Packed(*map(act, (part.codes, part.scale, part.zero))) for part in (self.k, self.v)))

    def slice(self, start: int, count: int) -> Blocks:
        """The blocks [start, start + count), as views."""
        return self.map(lambda tensor: tensor.narrow(_BLOCKS, start, count))

    @property
    def num(self) -> int:
        """N."""
        return self.k.scale.shape[_BLOCKS]


@dataclass(frozen=True)
class Codec:
    """How the blocks of one slot are packed.

    Attributes:
        bits: of a code: 8, 4 or 2. cells: g, of a block; a multiple of 8 / bits.
        channels: c, of a group of values. dtype: of keys and values. fit: chooses scales and zeros.
    """

    bits: int
    cells: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    channels: int
    dtype: torch.dtype
    fit: Fit

    @classmethod
    def of(cls, slot: KVSlot, dtype: torch.dtype, *, bits: int, group_size: int, fit: Fit) -> Codec:
        """For one slot. Values get groups of equal size, at most `group_size`; the last may be padded."""
        groups = -(-slot.v_head_dim // group_size)
        channels = -(-slot.v_head_dim // groups)
        return cls(bits, group_size, slot.num_kv_heads, slot.head_dim, slot.v_head_dim, channels, dtype, fit)

    @property
    def stored(self) -> torch.dtype:
        """Of scales and zeros: float16 in a float16 cache, otherwise bfloat16, which has the range of float32."""
        return torch.float16 if self.dtype is torch.float16 else torch.bfloat16

    def shapes(self, rows: int, num: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of `num` blocks, by its name."""
        head, packed = (rows, self.num_kv_heads, num), self.cells * self.bits // 8
        groups = -(-self.v_head_dim // self.channels)
        k, v = (*head, 1, self.head_dim), (*head, self.cells, groups, 1)
        return {
            "k.codes": ((*head, packed, self.head_dim), torch.uint8), "k.scale": (k, self.stored),
            "k.zero": (k, self.stored),
            "v.codes": ((*head, packed, groups, self.channels), torch.uint8), "v.scale": (v, self.stored),
            "v.zero": (v, self.stored),
        }  # fmt: skip

    def empty(self, rows: int, num: int, device: torch.device) -> Blocks:
        """Room for `num` blocks."""
        made = [zeros(shape, dtype, device) for shape, dtype in self.shapes(rows, num).values()]
        return Blocks(Packed(*made[:3]), Packed(*made[3:]))

    def encode(self, k: Tensor, v: Tensor) -> Blocks:
        """Pack N · g cells. k: [B, K, N·g, D]; v: [B, K, N·g, Dv]."""
        with torch.no_grad():
            k = torch.unflatten(k, _BLOCKS, (-1, self.cells))  # [B, K, N, g, D]
            padding = -v.shape[-1] % self.channels
            if padding:  # with a channel that is there: a group's least and greatest number stay what they are
                v = torch.cat((v, v[..., -1:].expand(*v.shape[:-1], padding)), dim=-1)
            v = torch.unflatten(v, -1, (-1, self.channels))
            v = torch.unflatten(v, _BLOCKS, (-1, self.cells))  # [B, K, N, g, n, c]
            return Blocks(self._packed(k, _CELLS), self._packed(v, v.dim() - 1))

    def decode(self, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """k [B, K, N·g, D] and v [B, K, N·g, Dv]: a few operations over all cells, whatever the number of blocks."""
        k, v = (
            decode(unpack(part.codes, self.bits, _CELLS), part.scale, part.zero, self.dtype)
            for part in (blocks.k, blocks.v)
        )
        return k.flatten(_BLOCKS, _CELLS), v.flatten(_BLOCKS, _CELLS).flatten(-2)[..., : self.v_head_dim]

    def _packed(self, x: Tensor, axis: int) -> Packed:
        """Every line of `x` along `axis` is a group."""
        levels = 2**self.bits - 1
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scale, zero = self.fit(x, axis, levels, self.stored)
        return Packed(pack(encode(x, scale, zero, levels), self.bits, _CELLS), scale, zero)
