"""compressed-tensors, the format of llm-compressor: groups of layers, each with a scheme for weights and inputs.

Source: the library compressed-tensors 0.20, `QuantizationConfig`, `QuantizationScheme` and its compressors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pluglm_quantizer_published.compressed_forms import PackedForm, PlainForm, SchemeForm, Spread
from pluglm_quantizer_published.form import Form
from pluglm_quantizer_published.reader import Reader
from pluglm_quantizer_published.rounding import Rounding
from pluglm_quantizer_published.settings import ROOT, Settings, refused

PACKED = "pack-quantized"
PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
#: How the scales were found: no number depends on it now.
OBSERVED = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
IGNORED = (
    "quant_method",
    "version",
    "global_compression_ratio",
    "run_compressed",
    "dequantize",
    "use_optimized_inference",
)


@dataclass(frozen=True)
class Group:
    """A config group. targets: names of layers, "re:" patterns, or the class Linear."""

    targets: tuple[str, ...]
    form: SchemeForm


class CompressedReader(Reader):
    """quant_method "compressed-tensors"."""

    name = "compressed-tensors"

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        settings = Settings(config)
        self._ignored = _patterns(settings, "ignore")
        states = ("compressed", "frozen")  # earlier versions wrote frozen; `format` says that the file is compressed
        settings.one_of("quantization_status", states, "compressed", "other states hold weights to be rounded.")
        settings.empty("kv_cache_scheme", "caches are a part of their own here; none rounds keys and values so.")
        sparsity = settings.part("sparsity_config")
        if sparsity is not None:
            sparsity.one_of("format", ("dense",), "dense", "weights with places left out are not read here.")
        settings.empty("transform_config", "the model is more than its packed weights then.")
        settings.empty("moe_sparsity_config", "experts that are left out are not read here.")
        common = settings.take("format", str)
        groups = settings.parts("config_groups")
        settings.done(IGNORED)
        if not groups:
            raise settings.refused("config_groups", "it is empty", "nothing says how the weights are packed.")
        self._groups = [_group(group, common) for group in groups.values()]
        self.bits = min(group.form.bits_each() for group in self._groups)

    def form(self, place: str) -> Form | None:
        """By name, then by pattern, then by class; `ignore` goes before all of them."""
        if any(_meets(place, entry) or entry == "Linear" for entry in self._ignored):
            return None
        for kind in ("name", "pattern", "class"):
            for group in self._groups:
                if any(
                    _kind(target) == kind and (kind == "class" or _meets(place, target)) for target in group.targets
                ):
                    return group.form
        return None


def _kind(target: str) -> str:
    return "pattern" if target.startswith("re:") else "class" if target == "Linear" else "name"


def _meets(place: str, target: str) -> bool:
    """Names are met whole, patterns from their beginning."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), place) is not None
    return target == place


def _patterns(settings: Settings, key: str) -> tuple[str, ...]:
    texts = settings.texts(key)
    for text in texts:
        try:
            re.compile(text.removeprefix("re:") if text.startswith("re:") else "")
        except re.error as e:
            raise settings.refused(key, f"{text!r} is no pattern", f"{e}.") from e
    return texts


def _group(settings: Settings, common: str | None) -> Group:
    """One entry of config_groups."""
    targets = _patterns(settings, "targets")
    layout = settings.take("format", str, common)
    settings.empty("output_activations", "outputs are not rounded here.")
    inputs, weights = settings.part("input_activations"), settings.part("weights")
    settings.done(())
    if weights is None:
        raise settings.refused("weights", "it is null", "a group that rounds inputs only is not read here.")
    if layout != PACKED and layout not in PLAIN:
        known = ", ".join((PACKED, *PLAIN))
        raise refused(f"{ROOT}.format", f"it is {layout!r}", f"known are {known}.")
    return Group(
        targets, _weights(weights, packed=layout == PACKED, rounding=None if inputs is None else _inputs(inputs))
    )


def _weights(settings: Settings, *, packed: bool, rounding: Rounding | None) -> SchemeForm:
    """The scheme of the weights."""
    kind = settings.one_of("type", ("int",) if packed else ("int", "float"), "int")
    bits = settings.take("num_bits", int, 8)
    assert bits is not None, "its default is not None"
    if not 1 <= bits <= 8 or (kind == "float" and bits != 8):
        raise settings.refused("num_bits", f"it is {bits}", "expected 1 to 8 for int, 8 for float.")
    symmetric = settings.take("symmetric", bool, True)
    if kind == "float" and not symmetric:
        raise settings.refused("symmetric", "it is false", "float8 weights have no zero points.")
    settings.empty("dynamic", "weights are stored with their scales.")
    ordered = settings.one_of("actorder", (False, "group", "dynamic", "weight", "static"), False) in (
        "group",
        "dynamic",
    )
    spread = _spread(settings)
    settings.done(OBSERVED)
    if ordered and (not packed or spread.kind != "group"):
        raise settings.refused("actorder", "it is 'group'", "only packed weights in groups have an order.")
    if packed and spread.kind == "block":
        raise settings.refused("strategy", "it is 'block'", "packed weights have no blocks.")
    if packed and not symmetric and spread.kind == "tensor":
        raise settings.refused("strategy", "it is 'tensor'", "zero points of packed weights come by row or group.")
    if packed:
        return PackedForm(rounding, spread=spread, bits=bits, symmetric=bool(symmetric), ordered=ordered)
    return PlainForm(rounding, spread=spread, bits=bits, symmetric=bool(symmetric), is_float=kind == "float")


def _spread(settings: Settings) -> Spread:
    """strategy, group_size and block_structure. Without a strategy the size of a group tells it."""
    size = settings.take("group_size", int)
    told = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = settings.one_of("strategy", ("tensor", "channel", "group", "block"), told)
    block = settings.take("block_structure", (list, str))
    if strategy == "group":
        if size is None or size < 1:
            raise settings.refused("group_size", f"it is {size!r}", "a group has columns.")
        return Spread("group", columns=size)
    if size is not None and size > 0:
        raise settings.refused("group_size", f"it is {size}", f"strategy {strategy!r} has no groups.")
    if strategy != "block":
        return Spread(strategy)
    pair = [int(n) if n.isdigit() else 0 for n in block.split("x")] if isinstance(block, str) else block
    if not isinstance(pair, list) or len(pair) != 2 or not all(type(n) is int and n > 0 for n in pair):
        raise settings.refused("block_structure", f"it is {block!r}", "expected [rows, columns].")
    return Spread("block", rows=pair[0], columns=pair[1])


def _inputs(settings: Settings) -> Rounding:
    """The scheme of a layer's input."""
    kind = settings.one_of("type", ("int", "float"), "int")
    bits = settings.take("num_bits", int, 8)
    symmetric = settings.take("symmetric", bool, True)
    assert bits is not None and symmetric is not None, "their defaults are not None"
    if not 2 <= bits <= 8 or (kind == "float" and bits != 8):
        raise settings.refused("num_bits", f"it is {bits}", "expected 2 to 8 for int, 8 for float.")
    if kind == "float" and not symmetric:
        raise settings.refused("symmetric", "it is false", "float8 inputs have no zero points.")
    dynamic = settings.one_of("dynamic", (True, False), False, "only true and false are read.")
    size = settings.take("group_size", int)
    told = "group" if size is not None and size > 0 else "tensor"
    strategy = settings.one_of("strategy", ("token", "group") if dynamic else ("tensor",), told, (
        "a scale found in a whole batch would make each text depend on the others."
        if dynamic else "only one stored scale for all inputs is read."
    ))  # fmt: skip
    settings.empty("actorder", "inputs have no order.")
    settings.empty("block_structure", "inputs have no blocks.")
    settings.done(OBSERVED)
    if strategy == "group" and (size is None or size < 1):
        raise settings.refused("group_size", f"it is {size!r}", "a group has columns.")
    group_size = size if strategy == "group" else None
    return Rounding(None if kind == "float" else bits, symmetric, group_size, static=not dynamic)
