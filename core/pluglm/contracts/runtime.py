"""How a built model is run (executors), and single operations done faster (kernels)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pluglm.contracts.cache import Cache, CacheLayout
from pluglm.contracts.model import ForwardInput, ForwardOutput, ModelDescription, ModelModule

if TYPE_CHECKING:
    from torch import Tensor


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
class Draw:
    """How tokens are drawn, the same for all rows; everything but the seeds is off by default.

    The token number i of a row with seed s is the one that lies, in the order of the ids, at u in [0, 1) of the
    cumulative distribution, taken in float64. u has the upper 27 and 26 bits of the first two words of Philox4x32-10
    with key s and counter (i, 0) (Salmon et al. 2011). Before that, in this order and in float32: scores are divided by
    the temperature; what is below the k-th best is forbidden; then the least likely whose mass together is at most
    1 - top_p; then what is less likely than min_p times the best. Whoever cannot say for certain which token that is,
    because two orders of adding up could give two, hands over the logits.

    Attributes:
        seeds: one a row, each a whole number of 64 bits, with a sign. first: the number of the run's first token.
        temperature: above 0. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    """

    seeds: tuple[int, ...]
    first: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class DecodeRun:
    """Several tokens of every row, one after the other, each chosen from the pass that the one before went through.

    Attributes:
        token_ids: [B, 1] int64, each row's last token, which the cache does not hold yet.
        cache: as in `ForwardInput`; the cells follow its last one, at `Cache.next_positions`.
        count: tokens of a row at most, one or more; the cache has room for as many cells.
        ends: the ids that end a row. A run is over as soon as a row has ended that had not.
        ended: rows that had ended before; None: none. They are fed `pad`, and `pad` is what they get.
        holes: cells of ended rows have the position -1, so that these rows can go on later.
        draw: None: the most likely token, of equal ones the first.
    """

    token_ids: Tensor
    cache: Cache
    count: int
    ends: tuple[int, ...] = ()
    ended: tuple[bool, ...] | None = None
    pad: int = 0
    holes: bool = False
    draw: Draw | None = None


@dataclass(frozen=True)
class Decoded:
    """What a run has made.

    Attributes:
        token_ids: [B, n] int64, `pad` in ended rows. n may be less than was asked for.
        logits: [B, V] of the token after these, where its choice is the caller's: the scores of a row that goes on are
            not finite, or the draw is too close to call. The cache then holds all n tokens; else the last one not yet.
    """

    token_ids: Tensor
    logits: Tensor | None = None


@runtime_checkable
class DecodesAhead(Protocol):
    """An executor that chooses tokens as well. What is chosen is what a strategy would choose, token by token."""

    def decode(self, run: DecodeRun) -> Decoded | None:
        """Feed and choose up to `run.count` tokens a row; one pass a token, and each pass counts as one.

        Returns: what was made, one token or the logits at least. None: this cache cannot be written ahead, or has too
        many rows; nothing has happened, and the caller goes on with `run`, pass by pass.
        Raises: what `Executor.run` raises, with the cache as it was.
        """
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
