"""Quantizers: linear layers become smaller ones, one at a time, while loading or afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pluglm.contracts.text import Checkpoint


@dataclass(frozen=True)
class QuantizerRequest:
    """What the planner asks a quantizer provider to build.

    Attributes:
        device, dtype: where and in which compute dtype the layers run.
        config: the `quantization_config` of the checkpoint if its weights are packed already, else None.
        skip: patterns (`fnmatch`) of module names the user keeps in full precision.
        variant: what the user wrote after the colon ("torchao:int4"). options: keyword options, unknown ones refused.
    """

    device: str
    dtype: str
    config: Mapping[str, Any] | None = None
    skip: tuple[str, ...] = ()
    variant: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


@runtime_checkable
class Quantizer(Protocol):
    """Replaces `nn.Linear` modules. The core walks the model; the quantizer sees one weight at a time.

    While loading, the core calls `quantize` as soon as a linear layer's weight is read and drops the original, so that
    never more than one layer is held in full precision beside the packed model.
    """

    name: str
    #: Bits a weight takes, scales included, for reports.
    bits: float

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """Why this layer stays as it is, or None if it is to be replaced. Called before its weight is read."""
        ...

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The replacement for one linear layer.

        Args:
            name: the module's place in the model. weight: [out, in]; bias: [out] or None; in the compute dtype.
        Returns: a module that maps [..., in] to [..., out] and has no parameter of its own called `weight` or `bias`
            (a child may), so that packed and plain layers can be told apart when a model is saved.
        """
        ...

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        """A replacement's tensors under short names, plain enough for safetensors."""
        ...

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """The short names `pack` uses for the layer `name`: what a packed checkpoint must hold."""
        ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The inverse of `pack`."""
        ...

    def config(self) -> dict[str, Any]:
        """The `quantization_config` to write beside packed weights; `quant_method` names the provider."""
        ...


@runtime_checkable
class TableQuantizer(Quantizer, Protocol):
    """A quantizer that also packs the token table of a tied head; see `pluglm.contracts.packed.TableReader`.

    `pack` takes its tables, too. `tensor_names` is asked of a table after `table_refusal`.
    """

    def table_refusal(self, name: str, columns: int, rows: int) -> str | None:
        """Why this table stays as it is, or None if it is to be replaced. Called before its weight is read.

        Args:
            name: the embedding's place in the model. columns, rows: C and V, in the order of `refusal`.
        """
        ...

    def quantize_table(self, name: str, weight: Tensor) -> nn.Module:
        """The replacement, a `BlockedEmbedding`. weight: [V, C] in the compute dtype.

        Returns: a module that has no parameter of its own called `weight`, as `quantize` does.
        """
        ...

    def unpack_table(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The inverse of `pack`, for a table."""
        ...


@runtime_checkable
class PublishedQuantizer(Quantizer, Protocol):
    """A quantizer of files that others wrote: what a layer has there shows in the file, not beforehand."""

    def stored_names(self, name: str, place: str, present: frozenset[str]) -> tuple[str, ...]:
        """The short names of one layer's tensors in this file; asked instead of `tensor_names`, after `refusal`.

        Args:
            name: the module's place in the model. place: the layer's name as the file spells it, which is what lists of
                layers in a quantization_config mean. present: short names of all tensors that the file keeps there.
        Returns: what `unpack` is to be given, a bias included; () if the file keeps this layer plain.
        Raises: ConfigError or CheckpointError if the file contradicts its quantization_config.
        """
        ...


@runtime_checkable
class UnpackingQuantizer(Quantizer, Protocol):
    """A quantizer of files whose packed tensors belong to no linear layer (stacks of experts): they become plain ones.

    The core loads what `unpacked` gives as if nobody had packed it, asks for nothing else, and saves plain weights.
    """

    def unpacked(self, checkpoint: Checkpoint) -> Checkpoint:
        """The same checkpoint with plain tensors in the place of packed ones, each unpacked when it is asked for.

        Raises: CheckpointError before a tensor is read, if names, shapes or dtypes do not fit.
        """
        ...
