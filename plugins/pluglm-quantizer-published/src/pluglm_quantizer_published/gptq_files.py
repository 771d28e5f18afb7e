"""GPTQ files, as AutoGPTQ and GPT-QModel write them: codes along the columns, zero points along the rows.

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"; the
layout is that of AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pluglm_quantizer_published.bit_stream import WORD, unpack
from pluglm_quantizer_published.form import FLOATS, Fields, Form
from pluglm_quantizer_published.reader import Reader
from pluglm_quantizer_published.scaled import ScaledWeight
from pluglm_quantizer_published.settings import ROOT, Settings, refused

BITS = (2, 3, 4, 8)
#: How the weights were found, or how another program runs them: no number depends on it.
IGNORED = (
    "quant_method", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "model_name_or_path",
    "model_file_base_name", "dataset", "tokenizer", "batch_size", "pad_token_id", "model_seqlen", "max_input_length",
    "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "use_cuda_fp16",
    "use_exllama", "exllama_config", "disable_exllama", "cache_block_size", "backend", "meta", "quantizer", "version",
    "lm_head", "mse", "act_group_aware", "parallel_packing", "offload_to_disk", "device", "nsamples",
    "hessian_chunk_size", "fail_safe", "v2", "v2_alpha", "v2_memory_device", "gptaq", "autoround_version", "iters",
    "lr", "minmax_lr", "seqlen", "train_bs", "enable_quanted_input", "enable_minmax_tuning", "low_gpu_mem_usage",
    "low_cpu_mem_usage", "scale_dtype", "provider",
)  # fmt: skip


@dataclass(frozen=True)
class GptqForm(Form):
    """bits, group_size (-1: one group), and what the file's zero points lack of the true ones."""

    bits: int = 4
    group_size: int = 128
    zero_shift: int = 1
    #: Columns in the order of their importance: each one's group must be told.
    ordered: bool = False

    required = ("qweight", "qzeros", "scales")
    optional = ("g_idx", "bias")

    def names(self) -> tuple[str, ...]:
        """Very old files have no g_idx; they can do without if the columns are in their own order."""
        return (*self.required, "g_idx") if self.ordered else self.required

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """qweight is [in * bits / 32, out]."""
        rows, out_features = tensors["qweight"].shape
        return rows * WORD // self.bits, out_features

    def fields(self, in_features: int, out_features: int) -> Fields:
        """qweight, qzeros [groups, out * bits / 32], scales [groups, out], g_idx [in], bias [out]."""
        if in_features * self.bits % WORD or out_features * self.bits % WORD or not in_features or not out_features:
            raise ValueError(f"{in_features} columns and {out_features} rows do not fill words of 32 bits")
        groups = -(-in_features // self._group(in_features))
        return {
            "qweight": ((torch.int32,), (in_features * self.bits // WORD, out_features)),
            "qzeros": ((torch.int32,), (groups, out_features * self.bits // WORD)),
            "scales": (FLOATS, (groups, out_features)),
            "g_idx": ((torch.int32, torch.int64), (in_features,)),
            "bias": (FLOATS, (out_features,)),
        }

    def check_values(self, tensors: Mapping[str, Tensor]) -> str | None:
        """g_idx must point at groups that exist."""
        groups = tensors["scales"].shape[0]
        index = tensors.get("g_idx")
        if index is not None and (int(index.min()) < 0 or int(index.max()) >= groups):
            return f"g_idx has groups from {int(index.min())} to {int(index.max())}, there are {groups}"
        return None

    def scaled(self, tensors: Mapping[str, Tensor], in_features: int, *, regular: bool) -> ScaledWeight:
        """A stored zero point of `gptq` is one less than the true one; that of `gptq_v2` is the true one."""
        out_features = tensors["qweight"].shape[1]
        codes = unpack(tensors["qweight"].T, self.bits, in_features)
        zero = unpack(tensors["qzeros"], self.bits, out_features).T.float() + self.zero_shift
        index = None if regular or "g_idx" not in tensors else tensors["g_idx"].long()
        return ScaledWeight(codes, self.bits, tensors["scales"].T.float(), zero, self._group(in_features), index)

    def is_regular(self, tensors: Mapping[str, Tensor]) -> bool:
        """Are the columns in their own order, in groups of one size?"""
        in_features, index = self.sizes(tensors)[0], tensors.get("g_idx")
        group = self._group(in_features)
        return in_features % group == 0 and (
            index is None or torch.equal(index.long(), torch.arange(in_features, device=index.device) // group)
        )

    def _group(self, in_features: int) -> int:
        return in_features if self.group_size == -1 else self.group_size


class GptqReader(Reader):
    """quant_method "gptq"."""

    name = "gptq"

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        settings = Settings(config)
        shift = settings.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq"
        settings.one_of("pack_dtype", ("int32",), "int32")
        settings.one_of("method", ("gptq",), "gptq")
        settings.one_of("data_type", ("int",), "int")
        settings.one_of("format", ("gptq", "gptq_v2"), "gptq_v2" if not shift else "gptq")
        settings.empty("is_marlin_format", "Marlin's own order of weights is not read here.")
        for key in ("adapter", "rotation", "hyb_act"):
            settings.empty(key, "the model is more than its packed weights then.")
        settings.take("sym", bool)
        base = self._form(settings, GptqForm(zero_shift=int(shift)), required=True)
        self._base = base
        self._rules = [self._rule(pattern, rule) for pattern, rule in settings.parts("dynamic").items()]
        settings.done(IGNORED)
        self.bits = base.bits + (16 + base.bits) / base.group_size if base.group_size > 0 else float(base.bits)

    def form(self, place: str) -> Form | None:
        """By the first rule of `dynamic` that matches, else the config's own."""
        for pattern, form in self._rules:
            if pattern.match(place):
                return form
        return self._base

    def _rule(self, pattern: str, rule: Settings) -> tuple[re.Pattern[str], GptqForm | None]:
        """ "-:" leaves layers plain; "+:" or nothing packs them otherwise."""
        plain = pattern.startswith("-:")
        try:
            compiled = re.compile(pattern.removeprefix("-:").removeprefix("+:"))
        except re.error as e:
            raise refused(f"{ROOT}.dynamic", f"{pattern!r} is no pattern", f"{e}.") from e
        form = None if plain else self._form(rule, self._base, required=False)
        rule.done(() if not plain else ("bits", "group_size", "desc_act", "sym"))
        return compiled, form

    @staticmethod
    def _form(settings: Settings, base: GptqForm, *, required: bool) -> GptqForm:
        bits = settings.one_of("bits", BITS, None if required else base.bits)
        group_size = settings.take("group_size", int, base.group_size)
        ordered = settings.take("desc_act", bool, base.ordered)
        settings.take("sym", bool)
        assert group_size is not None and ordered is not None, "their defaults are not None"
        if group_size != -1 and group_size < 1:
            raise settings.refused("group_size", f"it is {group_size}", "expected a number of columns, or -1 for all.")
        return GptqForm(bits=bits, group_size=group_size, zero_shift=base.zero_shift, ordered=ordered)
