"""AWQ files, as AutoAWQ writes them: 4 bits, eight codes a word.

`gemm` packs along the rows, in an order of its own; `gemv` along the columns, in theirs.

Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"; the layouts
are those of AutoAWQ, awq/modules/linear/gemm.py and gemv.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pluglm_quantizer_published.bit_stream import unpack
from pluglm_quantizer_published.form import FLOATS, Fields, Form
from pluglm_quantizer_published.reader import Reader
from pluglm_quantizer_published.scaled import ScaledWeight
from pluglm_quantizer_published.settings import Settings

BITS, CODES = 4, 8
#: gemm: nibble i of a word holds row ORDER[i] of its eight, so row j is in nibble NIBBLE[j].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLE = tuple(ORDER.index(row) for row in range(CODES))
IGNORED = (
    "quant_method", "modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "backend",
    "exllama_config",
)  # fmt: skip


@dataclass(frozen=True)
class GemmForm(Form):
    """Codes and zero points lie along the rows of the weight."""

    group_size: int = 128

    required = ("qweight", "qzeros", "scales")

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """qweight is [in, out / 8]."""
        in_features, words = tensors["qweight"].shape
        return in_features, words * CODES

    def fields(self, in_features: int, out_features: int) -> Fields:
        """qweight, qzeros [groups, out / 8], scales [groups, out], bias [out]."""
        groups, words = _groups(in_features, self.group_size), out_features // CODES
        return {
            "qweight": ((torch.int32,), (in_features, words)), "qzeros": ((torch.int32,), (groups, words)),
            "scales": (FLOATS, (groups, out_features)), "bias": (FLOATS, (out_features,)),
        }  # fmt: skip

    def scaled(self, tensors: Mapping[str, Tensor], in_features: int, *, regular: bool) -> ScaledWeight:
        """Put the rows of each word in order."""
        out_features = self.sizes(tensors)[1]
        codes, zero = (_in_order(unpack(tensors[n], BITS, out_features)).T for n in ("qweight", "qzeros"))
        group = _group(in_features, self.group_size)
        return ScaledWeight(codes.contiguous(), BITS, tensors["scales"].T.float(), zero.float(), group)

    def is_regular(self, tensors: Mapping[str, Tensor]) -> bool:
        """Always: `fields` refuses groups that do not fit."""
        return True


@dataclass(frozen=True)
class GemvForm(Form):
    """Codes and zero points lie along the columns; zero points and scales are filled up with zeros."""

    group_size: int = 128

    required = ("qweight", "qzeros", "scales")

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """qweight is [out, in / 8]."""
        out_features, words = tensors["qweight"].shape
        return words * CODES, out_features

    def fields(self, in_features: int, out_features: int) -> Fields:
        """qweight, qzeros [out, words], scales [out, words * 8], bias [out]; words hold the groups, filled up."""
        words = -(-_groups(in_features, self.group_size) // CODES)
        multiple = {64: 2, 32: 4}.get(self.group_size, 1)
        words = -(-words // multiple) * multiple
        return {
            "qweight": ((torch.int32,), (out_features, in_features // CODES)),
            "qzeros": ((torch.int32,), (out_features, words)),
            "scales": (FLOATS, (out_features, words * CODES)), "bias": (FLOATS, (out_features,)),
        }  # fmt: skip

    def scaled(self, tensors: Mapping[str, Tensor], in_features: int, *, regular: bool) -> ScaledWeight:
        """Nothing is out of order."""
        groups = _groups(in_features, self.group_size)
        codes, zero = unpack(tensors["qweight"], BITS, in_features), unpack(tensors["qzeros"], BITS, groups)
        scale = tensors["scales"][:, :groups].float()
        return ScaledWeight(codes, BITS, scale, zero.float(), _group(in_features, self.group_size))

    def is_regular(self, tensors: Mapping[str, Tensor]) -> bool:
        """Always: `fields` refuses groups that do not fit."""
        return True


class AwqReader(Reader):
    """quant_method "awq"."""

    name = "awq"

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        settings = Settings(config)
        for key in ("bits", "w_bit"):
            settings.one_of(key, (BITS,), BITS, "AutoAWQ packs 4 bits only.")
        group_size = settings.take("group_size", int) or settings.take("q_group_size", int, 128)
        settings.take("q_group_size", int)
        assert group_size is not None, "its default is not None"
        if group_size != -1 and group_size < 1:
            raise settings.refused("group_size", f"it is {group_size}", "expected a number of columns, or -1 for all.")
        settings.one_of("zero_point", (True,), True, "these layouts always have zero points.")
        known = ("gemm", "gemv", "GEMM", "GEMV")
        version = settings.one_of(
            "version", known, settings.one_of("format", known, "gemm"), "only gemm and gemv are read."
        )
        settings.empty("sym", "these layouts always have zero points.")
        settings.empty("desc_act", "these layouts keep the order of the columns.")
        settings.done(IGNORED)
        self._form = (GemvForm if version.lower() == "gemv" else GemmForm)(group_size=group_size)
        self.bits = BITS + (16 + BITS) / group_size if group_size > 0 else float(BITS)

    def form(self, place: str) -> Form | None:
        """One for all. Which layers stay plain (modules_to_not_convert) shows in the file."""
        return self._form


def _group(in_features: int, group_size: int) -> int:
    return in_features if group_size == -1 else group_size


def _groups(in_features: int, group_size: int) -> int:
    group = _group(in_features, group_size)
    if not in_features or in_features % group or in_features % CODES:
        raise ValueError(f"{in_features} columns are not made of groups of {group_size}")
    return in_features // group


def _in_order(codes: Tensor) -> Tensor:
    """[n, out], eight and eight out of order -> in order."""
    eights = codes.view(codes.shape[0], -1, CODES)
    return eights[:, :, torch.tensor(NIBBLE, device=codes.device)].flatten(1)
