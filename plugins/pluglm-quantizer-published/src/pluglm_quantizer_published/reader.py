"""The quantizer that all formats here share: it reads, keeps and writes back, and packs nothing itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pluglm.errors import CheckpointError, UnsupportedRequestError
from pluglm_quantizer_published.form import Form
from pluglm_quantizer_published.layer import PackedLinear, packed_linear


class Reader:
    """See `pluglm.contracts.PublishedQuantizer`. A subclass reads the config and knows each layer's form."""

    name = ""
    #: Bits of a weight and its share of the scales, by the config.
    bits = 0.0

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._config, self._dtype = copy.deepcopy(dict(config)), dtype
        self._sizes: dict[str, tuple[int, int]] = {}
        self._forms: dict[str, Form] = {}
        self._shorts: dict[str, tuple[str, ...]] = {}

    def form(self, place: str) -> Form | None:
        """How the layer that the file calls `place` is packed; None: the config says that it is not."""
        raise NotImplementedError

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """No layer: the file says which are packed. The sizes are kept for `unpack`."""
        self._sizes[name] = in_features, out_features
        return None

    def stored_names(self, name: str, place: str, present: frozenset[str]) -> tuple[str, ...]:
        """What the file has of this layer."""
        form = self.form(place)
        if form is None:
            if packed := sorted(present - {"weight", "bias"}):
                raise CheckpointError(
                    f"the file holds {packed[0]} of {place}, a layer that quantization_config keeps plain.",
                    why="one of the two is wrong, and either reading may give noise.",
                    fix="Check that config.json and the weights belong together.", tensor=f"{place}.{packed[0]}",
                )  # fmt: skip
            return ()
        needed = form.names()
        if not present & (set(needed) - {"weight"}):
            return ()
        names = (*needed, *(short for short in form.optional if short in present and short not in needed))
        self._forms[name], self._shorts[name] = form, names
        return names

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """What `stored_names` found; before that, what the config asks of every layer."""
        if name in self._shorts:
            return self._shorts[name]
        form = self.form(name)
        return () if form is None else form.names()

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer of these tensors. Raises CheckpointError if they do not fit each other, the config or the model."""
        form = self._forms.get(name) or self.form(name)
        assert form is not None, "only packed layers are unpacked"
        form.check(name, tensors, self._sizes.get(name))
        return packed_linear(form, tensors, self._dtype)

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of the file, as they were."""
        assert isinstance(module, PackedLinear), f"a {type(module).__name__} was not unpacked here"
        return module.stored()

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """Raises UnsupportedRequestError: see `cannot_pack`."""
        raise cannot_pack(self.name)

    def config(self) -> dict[str, Any]:
        """The quantization_config of the file."""
        return copy.deepcopy(self._config)


def cannot_pack(name: str, *more: str) -> UnsupportedRequestError:
    """The error of packing plain weights in a format that is only read here."""
    reason = f"{name} only reads weights that others have packed: to pack them takes calibration data and its own tools"
    reasons = (reason, *more)
    return UnsupportedRequestError(
        f"the {name} quantizer cannot honour this request.", why="; ".join(reasons),
        fix='To pack the weights of this model here, write quantizer="native:int8" (pluglm-quantizer-native).',
        reasons=reasons,
    )  # fmt: skip
