"""Packers written from the definitions of the formats, code by code: slow, obvious, and nothing of the package in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class Numbers:
    """A weight before it is packed: (codes - zero[group]) * scale[group], all as whole numbers from 0 and float16."""

    codes: np.ndarray  # [out, in]
    zero: np.ndarray  # [out, groups]
    scale: np.ndarray  # [out, groups] float16
    group: np.ndarray  # [in], the group of each column

    def dense(self) -> torch.Tensor:
        """[out, in] float64."""
        weight = np.zeros(self.codes.shape)
        for i, g in enumerate(self.group):
            weight[:, i] = (self.codes[:, i] - self.zero[:, g]) * self.scale[:, g].astype(np.float64)
        return torch.from_numpy(weight)


def numbers(
    out_features: int, in_features: int, bits: int, group_size: int, seed: int, *, shuffled: bool = False,
    symmetric: bool = False, least_zero: int = 0,
) -> Numbers:  # fmt: skip
    """Random ones. group_size -1: one group. shuffled: columns belong to groups in no order."""
    rng = np.random.default_rng(seed)
    size = in_features if group_size == -1 else group_size
    groups = -(-in_features // size)
    codes = rng.integers(0, 1 << bits, (out_features, in_features))
    zero = rng.integers(least_zero, 1 << bits, (out_features, groups))
    zero = np.full_like(zero, 1 << (bits - 1)) if symmetric else zero
    scale = (rng.uniform(0.5, 1.5, (out_features, groups)) * 0.3 / (1 << bits)).astype(np.float16)
    group = np.arange(in_features) // size
    return Numbers(codes, zero, scale, rng.permutation(group) if shuffled else group)


def stream(codes: Any, bits: int) -> np.ndarray:
    """Codes one behind the other, from the lowest bit of the first word: int32 words."""
    whole = 0
    for i, code in enumerate(codes):
        assert 0 <= code < 1 << bits
        whole |= int(code) << (i * bits)
    words = -(-len(codes) * bits // 32)
    return np.frombuffer(whole.to_bytes(words * 4, "little"), dtype="<i4")


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def gptq(n: Numbers, bits: int, *, v2: bool = False, index: bool = True) -> dict[str, torch.Tensor]:
    """Codes of a row of the weight run down a column of qweight; zero points of a group along a row of qzeros."""
    stored = n.zero if v2 else n.zero - 1
    packed = {
        "qweight": tensor(np.stack([stream(row, bits) for row in n.codes], axis=1)),
        "qzeros": tensor(np.stack([stream(stored[:, g], bits) for g in range(stored.shape[1])])),
        "scales": tensor(n.scale.T),
    }
    return packed | ({"g_idx": tensor(n.group.astype(np.int32))} if index else {})


def awq_gemm(n: Numbers) -> dict[str, torch.Tensor]:
    """Eight rows a word; nibble i holds row 0, 2, 4, 6, 1, 3, 5, 7 of them."""

    def words(column: np.ndarray) -> np.ndarray:
        ordered = [column[start + row] for start in range(0, len(column), 8) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
        return stream(ordered, 4)

    return {
        "qweight": tensor(np.stack([words(n.codes[:, i]) for i in range(n.codes.shape[1])])),
        "qzeros": tensor(np.stack([words(n.zero[:, g]) for g in range(n.zero.shape[1])])),
        "scales": tensor(n.scale.T),
    }


def awq_gemv(n: Numbers, words: int) -> dict[str, torch.Tensor]:
    """Eight columns a word, in order; zero points and scales are filled up to `words` words of eight."""
    filled = [(0, 0), (0, words * 8 - n.zero.shape[1])]
    return {
        "qweight": tensor(np.stack([stream(row, 4) for row in n.codes])),
        "qzeros": tensor(np.stack([stream(row, 4) for row in np.pad(n.zero, filled)])),
        "scales": tensor(np.pad(n.scale, filled)),
    }


def pack_quantized(n: Numbers, bits: int, *, symmetric: bool, index: bool = False) -> dict[str, torch.Tensor]:
    """Codes from 0 run along the columns; zero points from 0 along the rows."""
    packed = {
        "weight_packed": tensor(np.stack([stream(row, bits) for row in n.codes])),
        "weight_scale": tensor(n.scale),
        "weight_shape": torch.tensor(n.codes.shape),
    }
    if not symmetric:
        zeros = [stream(n.zero[:, g], bits) for g in range(n.zero.shape[1])]
        packed["weight_zero_point"] = tensor(np.stack(zeros, axis=1))
    if index:
        packed["weight_g_idx"] = tensor(n.group.astype(np.int32))
    return packed
