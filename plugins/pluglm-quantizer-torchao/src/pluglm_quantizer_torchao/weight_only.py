"""int8 weights with one float32 scale a row (absmax, symmetric), dequantized inside the product by torchao.

Source: torchao 0.18, `Int8WeightOnlyConfig` and `Int8Tensor`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pluglm import CheckpointError, ConfigError, UnsupportedRequestError
from pluglm.contracts import QuantizerRequest

#: What `torchao` and `torchao:int8` mean.
VARIANTS = ("int8",)
TENSORS = ("qdata", "scale", "zero_point")


class PackedLinear(nn.Module):
    """A linear layer whose weight is a torchao tensor. [..., in] -> [..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] in the compute dtype."""
        y: Tensor = self.linear(x)
        return y


class TorchaoQuantizer:
    """See `pluglm.contracts.Quantizer`."""

    name = "torchao"
    bits = 8.0

    def __init__(self, dtype: torch.dtype, biased: frozenset[str] = frozenset()) -> None:
        self._dtype = dtype
        self._biased = set(biased)

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """Every linear layer is taken, but the head: its rows are few a token and its error shows in every logit."""
        return "the head stays in full precision" if name == "head" else None

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """weight: [out, in]; bias: [out] or None."""
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        linear = _linear(weight, bias)
        holder = nn.Sequential(linear)  # quantize_ replaces the weights of children
        quantize_(holder, Int8WeightOnlyConfig())
        if bias is not None:
            self._biased.add(name)
        return PackedLinear(linear)

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        """qdata int8 [out, in], scale [out, 1], zero_point [out, 1], and bias where there is one."""
        assert isinstance(module, PackedLinear)
        weight: Any = module.linear.weight
        tensors = {name: getattr(weight, name).detach() for name in TENSORS}
        if module.linear.bias is not None:
            tensors["bias"] = module.linear.bias.detach()
        return tensors

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """Names of `pack` for one layer."""
        return (*TENSORS, "bias") if name in self._biased else TENSORS

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer that `pack` was given."""
        from torchao.quantization import Int8Tensor

        _check_packed(name, tensors)
        qdata, bias = tensors["qdata"], tensors.get("bias")
        facts = {
            "block_size": [1, qdata.shape[1]], "dtype": self._dtype, "act_quant_kwargs": None, "reduce_range": False,
        }  # fmt: skip
        weight = Int8Tensor.__tensor_unflatten__({n: tensors[n] for n in TENSORS}, facts, None, None)
        return PackedLinear(_linear(weight, None if bias is None else bias.to(self._dtype)))

    def config(self) -> dict[str, Any]:
        """Written beside packed weights, and read back by `check` and `make`."""
        return {
            "quant_method": "torchao", "quant_type": "int8_weight_only", "packing": "pluglm",
            "dtype": str(self._dtype).removeprefix("torch."), "biased": sorted(self._biased),
        }  # fmt: skip


def check(request: QuantizerRequest) -> None:
    """Refuse what this package cannot do, with every reason.

    Raises: UnsupportedRequestError; ConfigError for a packed checkpoint in a layout that is not this package's.
    """
    reasons = [f"option {name!r} is unknown" for name, _ in request.options]
    if request.variant not in (None, *VARIANTS):
        reasons.append(f"variant {request.variant!r} is unknown; there is {', '.join(VARIANTS)}")
    if request.dtype not in ("float32", "bfloat16"):
        reasons.append(f"compute dtype {request.dtype} has no int8 product in torchao; float32 and bfloat16 have")
    if reasons:
        raise UnsupportedRequestError(
            "the torchao quantizer cannot honour this request.", why="; ".join(reasons),
            fix='Write quantizer="torchao" or "torchao:int8".', reasons=tuple(reasons),
        )  # fmt: skip
    config = request.config
    if config is not None and (config.get("quant_type"), config.get("packing")) != ("int8_weight_only", "pluglm"):
        raise ConfigError(
            f"this checkpoint is packed by torchao as {config.get('quant_type')!r}.",
            why="this package reads int8_weight_only in the layout that `lm.save` writes.",
            fix="Load the plain weights and pack them with quantizer='torchao:int8'.",
            key="quantization_config",
        )


def make(request: QuantizerRequest) -> TorchaoQuantizer:
    """The quantizer of a checked request."""
    _import_quietly()
    config = request.config or {}
    dtype = getattr(torch, request.dtype)
    return TorchaoQuantizer(dtype, frozenset(config.get("biased", ())))


def _check_packed(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError unless shapes and dtypes are those that `pack` gives."""
    rows = tensors["qdata"].shape[0] if tensors["qdata"].ndim == 2 else "out"
    expected: dict[str, tuple[tuple[torch.dtype, ...], list[Any]]] = {
        "qdata": ((torch.int8,), [rows, tensors["qdata"].shape[1] if rows != "out" else "in"]),
        "scale": ((torch.float32,), [rows, 1]), "zero_point": ((torch.int8,), [rows, 1]),
        "bias": ((torch.float32, torch.bfloat16), [rows]),
    }  # fmt: skip
    for short, tensor in tensors.items():
        dtypes, shape = expected[short]
        if tensor.dtype not in dtypes or list(tensor.shape) != shape:
            wanted = f"{dtypes[0]} [{', '.join(map(str, shape))}]"
            raise CheckpointError(
                f"the packed weight of {name!r} does not fit: "
                f"{short} is {tensor.dtype} {list(tensor.shape)}, not {wanted}.",
                why="quantization_config says torchao int8, one scale a row.",
                fix="Save the model again from its plain weights.", tensor=f"{name}.{short}",
            )  # fmt: skip


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _import_quietly() -> None:
    """Import torchao without its remarks on CUDA libraries that a CPU build of torch cannot load."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.quantization  # noqa: F401
    finally:
        logging.disable(level)
