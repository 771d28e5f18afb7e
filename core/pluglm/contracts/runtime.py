"""How a built model is run (executors), and single operations done faster (kernels)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pluglm.contracts.cache import CacheLayout
from pluglm.contracts.model import ForwardInput, ForwardOutput, ModelDescription, ModelModule


@dataclass(frozen=True)
class ExecutorRequest:
    """What the planner asks an executor provider to build, once the model has its weights.

    Attributes:
        module: the built module, weights in place, quantized layers replaced.
        description: of the model; an executor that runs the program itself reads `description.program`.
        layout: makes the caches that will be passed in.
        device, dtype: of the model.
        variant, options: as for every part; unknown ones must be refused.
    """

    module: ModelModule
    description: ModelDescription
    layout: CacheLayout
    device: str
    dtype: str
    variant: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


@runtime_checkable
class Executor(Protocol):
    """Runs forward passes. The eager one calls the module; others compile it, capture it, or run the program natively.

    An executor that cannot represent a model says so in its `pluglm_build_executor` with UnsupportedRequestError and
    every reason; the plan then names the next one.
    """

    name: str

    def run(self, inputs: ForwardInput) -> ForwardOutput:
        """One forward pass; the cache has grown by T when it returns and is unchanged if it raises."""
        ...


@dataclass(frozen=True)
class KernelRequest:
    """What a kernel is wanted for.

    Attributes:
        device, dtype: of its tensors. facts: sizes the op's contract names ({"size": 256} for rms_norm).
    """

    device: str
    dtype: str
    facts: tuple[tuple[str, int], ...] = ()


#: Ops a kernel plugin may provide, and the signature that its callable and the reference in pluglm-blocks share.
#: A feature of the provider's `pluglm.json` names each op it has.
KERNEL_OPS: Mapping[str, str] = {
    "rms_norm": "(x [..., C], weight [C] | None, eps: float, offset: float) -> [..., C] in x's dtype",
    "layer_norm": "(x [..., C], weight [C] | None, bias [C] | None, eps: float) -> [..., C] in x's dtype",
    "rope": "(x [B, H, T, D], cos [B or 1, T, dim/2], sin [B or 1, T, dim/2], interleaved: bool) -> [B, H, T, D]",
    "gated_act": "(gate [..., F], up [..., F], activation: str) -> [..., F]",
}
