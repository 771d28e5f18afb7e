"""The quantizer in its two variants, what it refuses, and what it writes to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pluglm import CheckpointError, ConfigError, UnsupportedRequestError
from pluglm.contracts import Quantizer, QuantizerRequest
from pluglm_kernels_onednn import capability
from pluglm_kernels_onednn.int8 import COLUMNS, Int8Linear, rounded
from pluglm_kernels_onednn.lossless import PackedLinear, WidenedLinear

#: Compute dtypes of each variant; the first variant is the default.
VARIANTS: Mapping[str, tuple[str, ...]] = {"int8": ("bfloat16", "float32"), "bf16": ("bfloat16",)}
OPTIONS: Mapping[str, tuple[str, ...]] = {"int8": ("few_rows", "keep_packed"), "bf16": ()}


class _Packing:
    """What both variants share: which layers have a bias, and the books of a checkpoint."""

    name = "onednn"
    variant: str
    tensors: tuple[str, ...]

    def __init__(self, dtype: torch.dtype, biased: frozenset[str]) -> None:
        self._dtype, self._biased = dtype, set(biased)

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """Names of `pack` for one layer."""
        return (*self.tensors, "bias") if name in self._biased else self.tensors

    def config(self) -> dict[str, Any]:
        """Written beside packed weights and read back by `build`."""
        return {
            "quant_method": "onednn", "quant_type": self.variant, "packing": "pluglm", "biased": sorted(self._biased),
        }  # fmt: skip

    def _note(self, name: str, bias: Tensor | None) -> None:
        if bias is not None:
            self._biased.add(name)

    def _bias(self, name: str, tensors: Mapping[str, Tensor], rows: int) -> Tensor | None:
        bias = tensors.get("bias")
        if bias is None:
            return None
        _check(name, "bias", bias, (torch.bfloat16, torch.float32), [rows])
        return bias.to(self._dtype)


class Int8(_Packing):
    """See `pluglm.contracts.Quantizer`."""

    variant, tensors, bits = "int8", ("codes", "scale"), 8.0

    def __init__(self, dtype: torch.dtype, biased: frozenset[str], options: Mapping[str, Any]) -> None:
        super().__init__(dtype, biased)
        self._keep_packed: bool = options.get("keep_packed", False)
        self._few_rows: int | None = options.get("few_rows")

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """Not the head: its error shows in every logit. And not what the weight-only product cannot read."""
        if name == "head":
            return "the head stays in full precision"
        if in_features % COLUMNS:
            return f"{in_features} columns are no multiple of {COLUMNS}, which torch's int8 product reads at a time"
        return None

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """weight: [out, in]; bias: [out] or None."""
        self._note(name, bias)
        codes, scale = rounded(weight)
        return self._layer(codes, scale, bias)

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        """codes int8 [out, in], scale bfloat16 [out], and bias where there is one."""
        assert isinstance(module, Int8Linear)
        tensors = {"codes": module.codes, "scale": module.scale}
        return tensors if module.bias_ is None else {**tensors, "bias": module.bias_}

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer that `pack` was given. Raises: CheckpointError for tensors that `pack` does not give."""
        codes, scale = tensors["codes"], tensors["scale"]
        _check(name, "codes", codes, (torch.int8,), ["out", "in"])
        if codes.shape[1] % COLUMNS or bool((codes == -128).any()):
            raise _misfit(name, "codes", f"columns no multiple of {COLUMNS} or a code of -128", "-127 … 127")
        _check(name, "scale", scale, (torch.bfloat16,), [codes.shape[0]])
        return self._layer(codes.contiguous(), scale, self._bias(name, tensors, codes.shape[0]))

    def _layer(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> nn.Module:
        return Int8Linear(codes, scale, bias, keep_packed=self._keep_packed, few_rows=self._few_rows)


class Bf16(_Packing):
    """See `pluglm.contracts.Quantizer`. Nothing is lost: a weight is the one that was given."""

    variant, tensors, bits = "bf16", ("values",), 16.0

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """Every linear layer is taken."""
        return None

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """weight: [out, in]; bias: [out] or None; bfloat16."""
        self._note(name, bias)
        return _lossless(weight, bias)

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        """values bfloat16 [out, in] in plain order, and bias where there is one."""
        assert isinstance(module, PackedLinear | WidenedLinear)
        values = module.dense()
        return {"values": values} if module.bias_ is None else {"values": values, "bias": module.bias_}

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer that `pack` was given. Raises: CheckpointError for tensors that `pack` does not give."""
        values = tensors["values"]
        _check(name, "values", values, (torch.bfloat16,), ["out", "in"])
        return _lossless(values, self._bias(name, tensors, values.shape[0]))


def _lossless(weight: Tensor, bias: Tensor | None) -> nn.Module:
    return (PackedLinear if capability.multiplies_bfloat16() else WidenedLinear)(weight, bias)


def build(request: QuantizerRequest) -> Quantizer:
    """Raises: UnsupportedRequestError with every reason; ConfigError for weights that something else has packed."""
    config = request.config
    if config is not None and (config.get("quant_type") not in VARIANTS or config.get("packing") != "pluglm"):
        raise ConfigError(
            f"this checkpoint is packed as {config.get('quant_type')!r} in the packing {config.get('packing')!r}.",
            why=f"this package reads {' and '.join(VARIANTS)} in the packing 'pluglm', which `lm.save` writes.",
            fix="Load the plain weights and pack them with quantizer='onednn:int8'.",
            key="quantization_config",
        )
    saved = None if config is None else str(config["quant_type"])
    variant = request.variant or saved or next(iter(VARIANTS))
    reasons = tuple(_refusals(request, variant, saved))
    if reasons:
        raise UnsupportedRequestError(
            "the onednn quantizer cannot honour this request.", why="; ".join(reasons),
            fix='Write quantizer="onednn:int8" or "onednn:bf16", with device="cpu".', reasons=reasons,
        )  # fmt: skip
    dtype, biased = getattr(torch, request.dtype), frozenset((config or {}).get("biased", ()))
    return Int8(dtype, biased, dict(request.options)) if variant == "int8" else Bf16(dtype, biased)


def _refusals(request: QuantizerRequest, variant: str, saved: str | None) -> Iterator[str]:
    if request.variant is not None and request.variant not in VARIANTS:
        yield f"variant {request.variant!r} is unknown; there is {' and '.join(VARIANTS)}"
    elif saved is not None and variant != saved:
        yield f"the checkpoint is packed as {saved}, not as {variant}"
    known = OPTIONS.get(variant, ())
    for name, value in request.options:
        if name not in known:
            yield f"option {name!r} is unknown" + (f"; {variant} has {' and '.join(known)}" if known else "")
        elif name == "keep_packed" and not isinstance(value, bool):
            yield f"option keep_packed is True or False, not {value!r}"
        elif name == "few_rows" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            yield f"option few_rows is a whole number from 0 on, not {value!r}"
    dtypes = VARIANTS.get(variant, ("bfloat16", "float32"))
    if request.dtype not in dtypes:
        yield f"compute dtype {request.dtype} is not one of {', '.join(dtypes)}"
    if request.device.partition(":")[0] != "cpu":
        yield f"oneDNN's products run on the CPU, not on {request.device}"
    if (reason := capability.missing()) is not None:
        yield reason


def _check(name: str, short: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: list[Any]) -> None:
    """Raises CheckpointError for another dtype or shape; a text in `shape` stands for any size."""
    sizes = tensor.ndim == len(shape) and all(
        isinstance(w, str) or w == s for w, s in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype not in dtypes or not sizes:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise _misfit(name, short, found, f"{dtypes[0]} [{', '.join(map(str, shape))}]")


def _misfit(name: str, short: str, found: str, wanted: str) -> CheckpointError:
    return CheckpointError(
        f"the packed weight of {name!r} does not fit: {short} is {found}, not {wanted}.",
        why="quantization_config says that pluglm-kernels-onednn packed it.",
        fix="Save the model again from its plain weights.", tensor=f"{name}.{short}",
    )  # fmt: skip
