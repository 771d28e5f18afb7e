"""The quantizer: torchao packs, this keeps names, files and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pluglm import CheckpointError
from pluglm.contracts import QuantizerRequest
from pluglm_quantizer_torchao import published, settings
from pluglm_quantizer_torchao.layer import PackedLinear, packed_linear
from pluglm_quantizer_torchao.probe import COLUMNS, ROWS, probe
from pluglm_quantizer_torchao.settings import Settings, refused
from pluglm_quantizer_torchao.storage import (
    FLOATS,
    Skeleton,
    flattened,
    linear_of,
    misfit,
    quantized,
    skeleton,
    unflattened,
)


class TorchaoQuantizer:
    """See `pluglm.contracts.PublishedQuantizer`."""

    name = "torchao"

    def __init__(self, wanted: Settings, bits: float) -> None:
        self.bits = bits
        self._settings, self._config = wanted, wanted.config()
        self._dtype: torch.dtype = getattr(torch, wanted.dtype)
        self._biased = set[str]()
        self._sizes: dict[str, tuple[int, int]] = {}
        self._skeletons: dict[tuple[int, int], Skeleton] = {}

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """The head stays, for its error shows in every logit, unless the option `head` says otherwise."""
        form, wanted = self._settings.form, self._settings
        if wanted.reads:  # the file says what is packed
            self._sizes[name] = out_features, in_features
            return None
        if name == "head" and not wanted.head:
            return "the head stays in full precision"
        group = wanted.options.get("group_size")
        columns = {"block": 128}.get(group, form.columns) if isinstance(group, str) else group or form.columns
        if in_features % columns or in_features % form.columns:
            return f"its {in_features} columns are no multiple of {max(columns, form.columns)}"
        rows = 128 if group == "block" else form.rows
        return f"its {out_features} rows are no multiple of {rows}" if out_features % rows else None

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """weight: [out, in]; bias: [out] or None."""
        if bias is not None:
            self._biased.add(name)
        linear = quantized(self._config, weight, bias)
        return packed_linear(linear, rounds_input=self._settings.form.rounds_input)

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of torchao's weight under the names of its own files, and bias where there is one.

        Raises: UnsupportedRequestError for a packing that means other things on other machines.
        """
        assert isinstance(module, PackedLinear)
        if not self._settings.form.kept:
            raise refused(f"{self._settings.variant} keeps its weights as this machine's kernels want them: "
                          "elsewhere a file of them would give noise")  # fmt: skip
        tensors = {self._settings.prefix + name: t for name, t in flattened(module.linear.weight).items()}
        if module.linear.bias is not None:
            tensors["bias"] = module.linear.bias.detach()
        return tensors

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """Names of `pack` for a layer that was packed or found here."""
        names = tuple(self._settings.prefix + short for short in self._skeleton(ROWS, COLUMNS).fields)
        return (*names, "bias") if name in self._biased else names

    def stored_names(self, name: str, place: str, present: frozenset[str]) -> tuple[str, ...]:
        """What a file has of this layer; a plain one has its weight."""
        fields = self._skeleton(ROWS, COLUMNS)
        known = {self._settings.prefix + short for short in fields.fields}
        if "weight" in present or not present & known:
            return ()
        if surplus := sorted(s for s in present - known - {"bias"} if s.startswith("_weight_")):
            raise CheckpointError(
                f"the file holds {surplus[0]} of {place}, which {self._settings.form.type} does not make.",
                why="scales of a calibration (AWQ, SmoothQuant) are not read here, and without them the layer differs.",
                fix="Use an unpacked copy of the model.", tensor=f"{place}.{surplus[0]}",
            )  # fmt: skip
        if "bias" in present:
            self._biased.add(name)
        needed = {self._settings.prefix + short for short in fields.required}
        return tuple(sorted(needed | (present & known))) + (("bias",) if "bias" in present else ())

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer that `pack` was given. Raises CheckpointError if the tensors do not fit the config or the model."""
        prefix = self._settings.prefix
        packed = {short.removeprefix(prefix): tensor for short, tensor in tensors.items() if short != "bias"}
        rows, columns = self._sizes.get(name) or self._size(name, packed)
        expected = self._skeleton(rows, columns)
        if (wrong := misfit(packed, expected)) is not None:
            raise self._unfit(name, prefix + wrong[0], wrong[1])
        bias = tensors.get("bias")
        if bias is not None and (bias.dtype not in FLOATS or tuple(bias.shape) != (rows,)):
            raise self._unfit(name, "bias", f"{bias.dtype} {list(bias.shape)}, not {self._dtype} [{rows}]")
        linear = linear_of(unflattened(packed, expected), None if bias is None else bias.to(self._dtype))
        return packed_linear(linear, rounds_input=self._settings.form.rounds_input)

    def config(self) -> dict[str, Any]:
        """Written beside packed weights, and read back by `make`."""
        return published.written(self._settings)

    def _size(self, name: str, packed: Mapping[str, Tensor]) -> tuple[int, int]:
        """(out, in) of a layer of which nobody said it, by its codes."""
        known = self._skeleton(ROWS, COLUMNS)
        short = known.required[0]
        _, shape = known.fields[short]
        tensor = packed[short]
        if tensor.ndim != len(shape) or 0 in tensor.shape:
            raise self._unfit(name, self._settings.prefix + short, f"{tensor.dtype} {list(tensor.shape)}, not "
                              f"{known.fields[short][0]} of {len(shape)} dimensions")  # fmt: skip
        rows = tensor.shape[0] * ROWS // shape[0]
        return rows, tensor.numel() * ROWS * COLUMNS // torch.Size(shape).numel() // rows

    def _skeleton(self, rows: int, columns: int) -> Skeleton:
        if (rows, columns) not in self._skeletons:
            found = skeleton(self._config, rows, columns, self._settings.device, self._dtype)
            self._skeletons[rows, columns] = found
        return self._skeletons[rows, columns]

    def _unfit(self, name: str, short: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"the packed weight of {name!r} does not fit: {short} is {what}.",
            why=f"quantization_config says torchao's {self._settings.form.type}.",
            fix="Check that config.json and the weights belong together, or pack the plain weights again.",
            tensor=f"{name}.{short}",
        )


def make(request: QuantizerRequest) -> TorchaoQuantizer:
    """The quantizer of a request.

    Raises: UnsupportedRequestError with every reason, among them what torchao did when a small layer was tried;
        ConfigError for a packed checkpoint that cannot be read.
    """
    wanted = settings.read(request) if request.config is None else published.read(request)
    try:
        wanted.config()
    except ValueError as e:
        raise refused(f"torchao takes no such options together: {e}") from e
    reason, bits = probe(wanted)
    if reason is not None:
        raise refused(reason)
    return TorchaoQuantizer(wanted, bits)
