"""mxfp4, as gpt-oss is published: stacks of experts in 4-bit floating point, 32 values with a power of two in common.

The experts here are no linear layers, so they are unpacked while they are read and run in the model's dtype. Nothing is
lost (each value is exact in bfloat16), but they take four times the memory of the file.

Source: Open Compute Project 2023, "OCP Microscaling Formats (MX) Specification" 1.0, sections 5.3.3 and 5.4; OpenAI
2025, "gpt-oss-120b & gpt-oss-20b Model Card", section 2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pluglm.contracts import Checkpoint
from pluglm.errors import CheckpointError
from pluglm_quantizer_published.form import misfit
from pluglm_quantizer_published.reader import Reader, cannot_pack
from pluglm_quantizer_published.settings import Settings

BLOCKS, SCALES = "_blocks", "_scales"
#: E2M1, codes 0 … 7; 8 … 15 are the same below zero.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: A block of 32 values is 16 bytes.
BYTES = 16
NAN, BIAS = 255, 127
IGNORED = ("quant_method", "modules_to_not_convert", "dequantize")


@dataclass(frozen=True)
class PlainInfo:
    """What a checkpoint says of a tensor."""

    shape: tuple[int, ...]
    dtype: str


class Mxfp4Reader(Reader):
    """quant_method "mxfp4". See `pluglm.contracts.UnpackingQuantizer`."""

    name = "mxfp4"
    bits = 4 + 8 / 32

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        Settings(config).done(IGNORED)

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """All of them: only experts are packed."""
        return "mxfp4 packs experts, which are no linear layers here"

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Raises UnsupportedRequestError: no linear layer is packed."""
        raise cannot_pack(self.name)

    def unpacked(self, checkpoint: Checkpoint) -> Checkpoint:
        """`X_blocks` and `X_scales` become X."""
        return UnpackedCheckpoint(checkpoint, torch.bfloat16 if self._dtype is torch.bfloat16 else torch.float32)


class UnpackedCheckpoint:
    """A checkpoint whose packed stacks look plain: [E, in, out], as the model without quantization stores them."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._packed, self._dtype = checkpoint, dtype
        self.config, self.generation_config = checkpoint.config, checkpoint.generation_config
        self.path, self.fingerprint = checkpoint.path, checkpoint.fingerprint
        found = [name.removesuffix(BLOCKS) for name in checkpoint.tensors if name.endswith(BLOCKS)]
        if not found:
            raise CheckpointError(
                f"{checkpoint.path} holds no packed tensor.", why="its quantization_config says mxfp4.",
                fix="Take quantization_config out of config.json if the weights are plain.",
                path=str(checkpoint.path), tensor=None,
            )  # fmt: skip
        self._names = frozenset(found)
        taken = {name + end for name in found for end in (BLOCKS, SCALES)}
        self._infos = {name: info for name, info in checkpoint.tensors.items() if name not in taken}
        self._infos |= {name: self._info(name) for name in found}

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Names, shapes and dtypes as if nothing were packed."""
        return self._infos

    def tensor(self, name: str) -> Tensor:
        """Unpacked if it is packed. Raises CheckpointError for scales that are no numbers."""
        if name not in self._names:
            return self._packed.tensor(name)
        blocks, scales = self._packed.tensor(name + BLOCKS), self._packed.tensor(name + SCALES)
        if bool((scales == NAN).any()):
            raise misfit(name, SCALES[1:], "it holds scales that are no numbers")
        return unpack_stack(blocks, scales, self._dtype).mT

    def file(self, name: str) -> Path | None:
        """A file beside the weights, or None."""
        return self._packed.file(name)

    def _info(self, name: str) -> PlainInfo:
        """blocks [E, out, in / 32, 16] and scales [E, out, in / 32], uint8."""
        infos = self._packed.tensors
        blocks, scales = infos[name + BLOCKS], infos.get(name + SCALES)
        if scales is None:
            raise misfit(name, SCALES[1:], "it is missing")
        shape = tuple(blocks.shape)
        if blocks.dtype != "U8" or len(shape) != 4 or shape[3] != BYTES:
            raise misfit(
                name, BLOCKS[1:], f"it is {blocks.dtype} {list(shape)}, not U8 [experts, out, in / 32, {BYTES}]"
            )
        if scales.dtype != "U8" or tuple(scales.shape) != shape[:3]:
            raise misfit(name, SCALES[1:], f"it is {scales.dtype} {list(scales.shape)}, not U8 {list(shape[:3])}")
        return PlainInfo((shape[0], shape[2] * BYTES * 2, shape[1]), "BF16" if self._dtype is torch.bfloat16 else "F32")


def unpack_stack(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, out, in]: the value of each code times two to the power of its block's scale - 127.

    Args:
        blocks: [E, out, n, 16] uint8, two codes a byte, the lower half first. scales: [E, out, n] uint8.
        dtype: bfloat16 or float32; both hold every product but those below 2^-126 exactly.
    """
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], dtype=dtype)
    out = torch.empty(*blocks.shape[:3], BYTES, 2, dtype=dtype)
    for expert, (codes, exponents) in enumerate(zip(blocks, scales, strict=True)):  # one at a time, to stay small
        factors = torch.exp2(exponents.float() - BIAS).to(dtype)[..., None]
        out[expert, ..., 0] = table[(codes & 15).int()] * factors
        out[expert, ..., 1] = table[(codes >> 4).int()] * factors
    return out.flatten(2)
