"""Every extension point of pluglm, documented where it is declared.

Build hooks are called by the core on one provider, the one the plan names, while a model is being built; never while it
runs. A plugin implements the hooks of its kind in the module (or object) that its entry point names:

    from pluglm import hookimpl

    @hookimpl
    def pluglm_build_attention(request): ...

If a build hook raises UnsupportedRequestError (with every reason), the provider is passed over for this request. Any
other exception quarantines it for the life of the process: `auto` takes the next candidate with a word about it, a
provider the user named is an error with the original cause. Arguments have no defaults, and an implementation may take
fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from pluglm.contracts import (
        AttentionBackend,
        AttentionRequest,
        CacheLayout,
        CacheRequest,
        Checkpoint,
        Constraint,
        ConstraintRequest,
        DecodingRequest,
        DecodingStrategy,
        Executor,
        ExecutorRequest,
        KernelRequest,
        ModelDescription,
        ModelModule,
        ModelParts,
        Quantizer,
        QuantizerRequest,
        Source,
        SourceRequest,
        Tokenizer,
        TokenizerRequest,
    )
    from pluglm.plan import Plan
    from pluglm.provider import Provider

hookspec = pluggy.HookspecMarker("pluglm")
hookimpl = pluggy.HookimplMarker("pluglm")


class ArchitectureHooks:
    """Kind `architecture`; the provider's name is the `model_type` it reads."""

    @hookspec(firstresult=True)
    def pluglm_describe_model(self, config: Mapping[str, Any]) -> ModelDescription:  # type: ignore[empty-body]
        """Read a config.json. Called once a load, before any weight is read; must not import torch.

        Every key is used, ignored with a reason, or refused with ConfigError (`pluglm.ConfigReader` does the accounts).
        """

    @hookspec(firstresult=True)
    def pluglm_build_model(self, config: Mapping[str, Any], parts: ModelParts) -> ModelModule:  # type: ignore[empty-body]
        """Build the module. Called once a load, after `pluglm_describe_model`, under `torch.device("meta")`.

        Returns an `nn.Module` whose parameter names are the targets of the description's weight map.
        """


class AttentionHooks:
    """Kind `attention`."""

    @hookspec(firstresult=True)
    def pluglm_build_attention(self, request: AttentionRequest) -> AttentionBackend:  # type: ignore[empty-body]
        """Build the attention backend for one model. Called once a load."""


class CacheHooks:
    """Kind `cache`."""

    @hookspec(firstresult=True)
    def pluglm_build_cache(self, request: CacheRequest) -> CacheLayout:  # type: ignore[empty-body]
        """Build the layout that makes this model's caches. Called once a load; the layout's `new` once a generation."""


class QuantizerHooks:
    """Kind `quantizer`."""

    @hookspec(firstresult=True)
    def pluglm_build_quantizer(self, request: QuantizerRequest) -> Quantizer:  # type: ignore[empty-body]
        """Build the quantizer. Called once a load, or once for `lm.quantize`."""


class DecodingHooks:
    """Kind `decoding`."""

    @hookspec(firstresult=True)
    def pluglm_build_decoding(self, request: DecodingRequest) -> DecodingStrategy:  # type: ignore[empty-body]
        """Build the strategy. Called once a load, and once for each other strategy a call names."""


class KernelHooks:
    """Kind `kernel`."""

    @hookspec(firstresult=True)
    def pluglm_load_kernel(self, op: str, request: KernelRequest) -> Callable[..., Any]:  # type: ignore[empty-body]
        """Return the callable for one op of `KERNEL_OPS`. Called once a load for each op the provider lists."""


class ExecutorHooks:
    """Kind `executor`."""

    @hookspec(firstresult=True)
    def pluglm_build_executor(self, request: ExecutorRequest) -> Executor:  # type: ignore[empty-body]
        """Build what runs the model. Called once a load, with the weights in place."""


class SourceHooks:
    """Kind `source`."""

    @hookspec(firstresult=True)
    def pluglm_build_source(self, request: SourceRequest) -> Source:  # type: ignore[empty-body]
        """Build the source. Called when a model is not a folder, on each allowed source, before the Hub is asked."""


class FormatHooks:
    """Kind `format`."""

    @hookspec(firstresult=True)
    def pluglm_build_format(self, path: str) -> Checkpoint:  # type: ignore[empty-body]
        """Open a checkpoint of this format. Called once a load if the user named it; safetensors need no plugin."""


class TokenizerHooks:
    """Kind `tokenizer`."""

    @hookspec(firstresult=True)
    def pluglm_build_tokenizer(self, request: TokenizerRequest) -> Tokenizer:  # type: ignore[empty-body]
        """Build the tokenizer of one model. Called once a load."""


class ConstraintHooks:
    """Kind `constraint`."""

    @hookspec(firstresult=True)
    def pluglm_build_constraint(self, request: ConstraintRequest) -> Constraint:  # type: ignore[empty-body]
        """Build what compiles grammars for a model. Called when a call brings one, once for each set of end tokens."""


class CommandHooks:
    """Kind `command`; the provider's name is the sub-command's."""

    @hookspec(firstresult=True)
    def pluglm_build_command(self) -> click.Command:  # type: ignore[empty-body]
        """Return a click command. Called when the user types its name."""


class ObserverHooks:
    """Group `pluglm.hooks`: life cycle and governance. Many may answer; all are cold."""

    @hookspec
    def pluglm_configure(self, version: str) -> None:
        """Told once, after registration, which pluglm this is. An exception quarantines the observer."""

    @hookspec
    def pluglm_check_policy(self, provider: Provider) -> str | None:
        """May this provider be used? Return why not, or None. Any refusal wins. Called before the provider is imported.

        An exception is a refusal: governance fails closed.
        """

    @hookspec(firstresult=True)
    def pluglm_rank(self, kind: str, candidates: Sequence[Provider]) -> Sequence[str] | None:
        """Order candidates that passed every check: ids, best first; None to abstain. The result stands in the plan."""

    @hookspec
    def pluglm_plan_ready(self, plan: Plan) -> None:
        """Told of every finished plan before anything is built. Raise PlanError to stop; the plan cannot be changed."""

    @hookspec
    def pluglm_audit(self, event: str, data: Mapping[str, Any]) -> None:
        """Told of "imported", "built", "quarantined", "denied" and "selected". An exception harms only the observer."""


SPECS = (
    ArchitectureHooks, AttentionHooks, CacheHooks, QuantizerHooks, DecodingHooks, KernelHooks, ExecutorHooks,
    SourceHooks, FormatHooks, TokenizerHooks, ConstraintHooks, CommandHooks, ObserverHooks,
)  # fmt: skip
