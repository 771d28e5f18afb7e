"""From a plan to objects: each provider's hook is called once, its result checked, and the weights put in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pluglm.contracts.attention import AttentionBackend, AttentionRequest
from pluglm.contracts.cache import CacheLayout, CacheRequest
from pluglm.contracts.decoding import DecodingRequest, DecodingStrategy
from pluglm.contracts.dtypes import torch_dtype
from pluglm.contracts.model import ModelDescription, ModelParts
from pluglm.contracts.quantizer import Quantizer, QuantizerRequest
from pluglm.contracts.runtime import Executor, ExecutorRequest, KernelRequest
from pluglm.contracts.text import Checkpoint, Tokenizer, TokenizerRequest
from pluglm.errors import PlanError, PluglmError, QuarantinedError, UnsupportedRequestError
from pluglm.manager import Manager, check_contract
from pluglm.plan import Choice, Plan
from pluglm.planner import AUTO

if TYPE_CHECKING:
    from torch import nn


#: The option of every quantizer that the core reads: patterns of module names that stay as they are.
SKIP = "skip"


class PartFailedError(Exception):
    """A part that `auto` chose could not be built. provider: its id; reason: one line for the next plan."""

    def __init__(self, provider: str, reason: str) -> None:
        super().__init__(f"{provider}: {reason}")
        self.provider, self.reason = provider, reason


@dataclass(frozen=True)
class LoadContext:
    """What is loaded, and where it will run: known before anything is chosen.

    Attributes:
        model: as the user named it. checkpoint: its files. description: what its architecture said.
        device, dtype: torch names.
    """

    model: str
    checkpoint: Checkpoint
    description: ModelDescription
    device: str
    dtype: str


@dataclass(frozen=True)
class Parts:
    """Everything that is built before the weights."""

    attention: AttentionBackend | None
    layout: CacheLayout | None
    tokenizer: Tokenizer | None
    strategy: DecodingStrategy
    quantizer: Quantizer | None
    kernels: Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Built:
    """A finished load."""

    plan: Plan
    parts: Parts
    module: nn.Module
    executor: Executor


def build(manager: Manager, choice: Choice, hook: str, **arguments: Any) -> Any:
    """Call the hook of a choice's provider and check the result.

    Raises: PartFailedError if `auto` chose the provider; what it raised, if the user named it.
    """
    kind = choice.kind.partition(":")[0]
    provider, _ = manager.registry.find(kind, choice.provider or "")
    try:
        return check_contract(manager, provider, manager.call(provider, hook, **arguments))
    except UnsupportedRequestError as e:
        if choice.requested != AUTO:
            raise
        raise PartFailedError(provider.id, "refused: " + "; ".join(getattr(e, "reasons", (e.what,)))) from e
    except QuarantinedError as e:
        if choice.requested != AUTO:
            raise
        raise PartFailedError(provider.id, str(manager.quarantine[provider.id])) from e
    except PluglmError as e:
        if choice.requested != AUTO or kind == "tokenizer":  # a tokenizer complains of the model's files, not of itself
            raise
        raise PartFailedError(provider.id, f"failed: {type(e).__name__}: {e.what}") from e


def build_parts(manager: Manager, plan: Plan, context: LoadContext) -> Parts:
    """Build all but the module and its executor, and check what only built parts can tell."""
    chosen = {choice.kind: choice for choice in plan.choices}
    description = context.description
    tokenizer = None
    if chosen["tokenizer"].provider is not None:
        request = TokenizerRequest(context.checkpoint.path, description.vocab_size)
        tokenizer = build(manager, chosen["tokenizer"], "pluglm_build_tokenizer", request=request)
    attention = None
    if "attention" in chosen:
        views = _facts(manager, chosen["cache"]).get("views", ()) if "cache" in chosen else ()
        attention = _attention(manager, chosen["attention"], context, tuple(views) or ("dense",))
    layout = None
    if "cache" in chosen:
        layout = _layout(manager, chosen["cache"], chosen["decoding"], context, attention)
    if attention is not None and layout is not None and layout.view not in attention.views:
        raise PlanError(
            f"{chosen['attention'].provider} and {chosen['cache'].provider} do not fit together.",
            why=f"the first reads {', '.join(attention.views)}, the second gives {layout.view}.",
            fix="Choose another of the two; `pluglm explain` lists them.",
        )
    quantizer = None
    if chosen["quantizer"].provider is not None:
        choice = chosen["quantizer"]
        quantizer = build(manager, choice, "pluglm_build_quantizer", request=QuantizerRequest(
            context.device, context.dtype, config=context.checkpoint.config.get("quantization_config"),
            skip=skipped(choice), variant=choice.variant,
            options=tuple(option for option in choice.options if option[0] != SKIP),
        ))  # fmt: skip
    strategy = build_strategy(manager, chosen["decoding"], context, tokenizer)
    return Parts(attention, layout, tokenizer, strategy, quantizer, _kernels(manager, plan, context))


def build_strategy(
    manager: Manager, choice: Choice, context: LoadContext, tokenizer: Tokenizer | None
) -> DecodingStrategy:
    """The strategy of a choice, for this model."""
    strategy: DecodingStrategy = build(manager, choice, "pluglm_build_decoding", request=DecodingRequest(
        context.description.vocab_size, context.device, tokenizer.decode if tokenizer is not None else None,
        choice.variant, choice.options,
        encode=partial(tokenizer.encode, add_special_tokens=False) if tokenizer is not None else None,
    ))  # fmt: skip
    return strategy


def _attention(manager: Manager, choice: Choice, context: LoadContext, views: tuple[str, ...]) -> AttentionBackend:
    specs = context.description.attention
    backend: AttentionBackend = build(manager, choice, "pluglm_build_attention", request=AttentionRequest(
        specs, context.device, context.dtype, views, choice.variant, choice.options
    ))  # fmt: skip
    try:
        reasons = tuple(dict.fromkeys(reason for spec in specs for reason in backend.refusals(spec)))
    except Exception as e:  # a plugin's code may raise anything
        raise _broken(manager, choice, e) from e
    if reasons and choice.requested == AUTO:
        raise PartFailedError(choice.provider or "", "refused: " + "; ".join(reasons))
    if reasons:
        raise UnsupportedRequestError(
            f"attention={choice.requested!r} cannot compute this model.", why="\n".join(reasons),
            fix='Choose another backend, or leave it on "auto".', reasons=reasons,
        )  # fmt: skip
    return backend


def _broken(manager: Manager, choice: Choice, cause: Exception) -> Exception:
    """Quarantine a part that failed its first use: what to raise, by who chose it."""
    provider, _ = manager.registry.find(choice.kind, choice.provider or "")
    try:
        manager.reject(provider, cause)
    except QuarantinedError as e:
        if choice.requested != AUTO:
            return e
    return PartFailedError(provider.id, str(manager.quarantine[provider.id]))


def _layout(
    manager: Manager, choice: Choice, decoding: Choice, context: LoadContext, attention: AttentionBackend | None
) -> CacheLayout:
    description, program = context.description, context.description.program
    needs = tuple(_facts(manager, decoding).get("needs", ()))
    layout: CacheLayout = build(manager, choice, "pluglm_build_cache", request=CacheRequest(
        description.slots, tuple(attention.views) if attention is not None else ("dense",), context.device,
        context.dtype, needs, description.max_seq_len,
        rotations=program.rotations() if program is not None else None,
        learned_positions=program is not None and program.embedding.learned_positions is not None,
        variant=choice.variant, options=choice.options,
    ))  # fmt: skip
    return layout


def _facts(manager: Manager, choice: Choice) -> Mapping[str, Any]:
    provider, _ = manager.registry.find(choice.kind, choice.provider or "")
    return provider.facts or {}


def _kernels(manager: Manager, plan: Plan, context: LoadContext) -> dict[str, Callable[..., Any]]:
    kernels = {}
    for choice in plan.choices:
        kind, _, op = choice.kind.partition(":")
        if kind == "kernel":
            request = KernelRequest(context.device, context.dtype, (("hidden_size", context.description.hidden_size),))
            kernels[op] = build(manager, choice, "pluglm_load_kernel", op=op, request=request)
    return kernels


def build_module(manager: Manager, plan: Plan, context: LoadContext, parts: Parts) -> nn.Module:
    """Build the torch module on the meta device and fill it from the checkpoint."""
    from pluglm.checkpoint import track
    from pluglm.unfilled import unfilled
    from pluglm.weights import load_weights

    choice = plan["architecture"]
    model_parts = ModelParts(context.description, parts.attention, parts.kernels, context.device, context.dtype)
    with unfilled():
        module: nn.Module = build(
            manager,
            replace_requested(choice),
            "pluglm_build_model",
            config=context.checkpoint.config,
            parts=model_parts,
        )
    load_weights(
        module, context.description.weights, context.checkpoint, device=context.device,
        dtype=torch_dtype(context.dtype),
        quantizer=parts.quantizer, packed="quantization_config" in context.checkpoint.config,
        skip=skipped(plan["quantizer"]),
        track=lambda items: track(items, f"loading {context.model}"),
    )  # fmt: skip
    return module.eval()


def skipped(choice: Choice) -> tuple[str, ...]:
    """Patterns of the modules that the quantizer of this choice leaves alone."""
    patterns: tuple[str, ...] = tuple(dict(choice.options).get(SKIP, ()))
    return patterns


def replace_requested(choice: Choice) -> Choice:
    """The architecture is never chosen among several, so its failure is the load's: treat it as named."""
    from dataclasses import replace

    return replace(choice, requested=choice.provider or "")


def build_executor(
    manager: Manager, plan: Plan, context: LoadContext, layout: CacheLayout | None, module: nn.Module
) -> Executor:
    """Build what runs the module, once its weights are in place. layout: of its caches."""
    choice = plan["executor"]
    executor: Executor = build(manager, choice, "pluglm_build_executor", request=ExecutorRequest(
        module, context.description, layout, context.device, context.dtype,  # type: ignore[arg-type]
        choice.variant, choice.options,
    ))  # fmt: skip
    return executor
