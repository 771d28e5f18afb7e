"""`load` and `explain`: from a name and some wishes to a plan, and from the plan to a model that runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError, PlanError
from pluglm.loader import Loader
from pluglm.manager import Manager
from pluglm.plan import Plan
from pluglm.planner import AUTO
from pluglm.request import PARTS, read_request, replaying

if TYPE_CHECKING:
    from pluglm.lm import LanguageModel


def load(
    model: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    token: str | None = None,
    device: str = AUTO,
    dtype: str = AUTO,
    architecture: str = AUTO,
    attention: str = AUTO,
    cache: str = AUTO,
    quantizer: str | None = None,
    decoding: str = AUTO,
    executor: str = AUTO,
    tokenizer: str = AUTO,
    format: str = AUTO,  # noqa: A002 - the kind's name
    constraint: str = AUTO,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    quantizer_skip: tuple[str, ...] = (),
    packed_cache: bool = False,
    plan: Plan | None = None,
    manager: Manager | None = None,
) -> LanguageModel:
    """Load a model; every part is chosen by the planner or named by you.

    Args:
        model: a folder, a name that an installed source knows, or `org/name` on the Hub.
        revision: of a Hub repository: branch, tag or commit.
        offline: use only what is on this machine; None: as HF_HUB_OFFLINE says.
        token: for gated repositories.
        device: "auto", "cpu", "cuda", "cuda:1" …. dtype: "auto" (the checkpoint's), "float32", "bfloat16", ….
        architecture, attention, cache, decoding, executor, tokenizer: "auto", a provider's name, `name:variant`, or
            its full id `distribution:kind/name`.
        format: "auto": safetensors; or a provider that reads other files.
        constraint: "auto" or a provider: what holds calls with a grammar to it. It is built when the first one comes.
        quantizer: None: as the checkpoint is; or a provider, which packs the linear layers while they are read.
        options: keyword options of single parts: {"cache": {"residual_length": 64}}.
        quantizer_skip: patterns of module names that stay in full precision.
        packed_cache: keep what the quantizer packs on this machine, in `packed` of the cache folder
            ($PLUGLM_CACHE_DIR, else ~/.cache/pluglm), and map it in later loads of the same weights with the same
            settings. Off by default: it takes about as much disk as the packed model, and the first load writes it.
        plan: a plan to replay: its providers and versions are used, or it is refused.
        manager: plugins to use, for tests and embedding; None: those installed here.
    Raises: PlanError, PluginError, ModelError or InputError; each says what happened, why, and what to do.
    """
    named = {
        "architecture": architecture, "attention": attention, "cache": cache, "quantizer": quantizer,
        "decoding": decoding, "executor": executor, "tokenizer": tokenizer, "format": format,
        "constraint": constraint,
    }  # fmt: skip
    request = read_request(
        str(model), named, options or {}, revision=revision, offline=offline, token=token, device=device, dtype=dtype,
        skip=quantizer_skip, packed_cache=packed_cache,
    )  # fmt: skip
    if plan is not None:
        if not isinstance(plan, Plan):
            raise InputError(
                f"plan is a {type(plan).__name__}.", fix="Pass a Plan; Plan.from_json(…) makes one.", argument="plan"
            )
        request = replaying(request, plan)
    from pluglm.lm import LanguageModel

    loader = Loader(request, manager or Manager.installed())
    built = loader.load()
    lm = LanguageModel(
        loader.manager, loader.context, built, request.wanted("decoding"), request.wanted("constraint"), loader.excluded
    )
    if plan is not None and lm.plan.hash != plan.hash:
        raise PlanError(
            "this plan cannot be replayed here.",
            why=_difference(plan, lm.plan),
            fix="Install the versions that the plan names, or plan anew without it.",
        )
    return lm


def explain(model: str | Path, *, manager: Manager | None = None, **arguments: Any) -> Plan:
    """The plan that `load` with the same arguments would follow. Reads no weights and builds nothing."""
    known = {"revision", "offline", "token", "device", "dtype", "packed_cache"}
    named = {k: arguments.pop(k) for k in list(arguments) if k in PARTS}
    options = arguments.pop("options", None) or {}
    skip = arguments.pop("quantizer_skip", ())
    if unknown := sorted(set(arguments) - known):
        raise InputError(
            f"explain takes no argument {unknown[0]!r}.",
            fix=f"It takes {', '.join(sorted(known | set(PARTS)))}.",
            argument=unknown[0],
        )
    request = read_request(str(model), named, options, skip=skip, **arguments)
    return Loader(request, manager or Manager.installed()).plan()


def _difference(wanted: Plan, got: Plan) -> str:
    if wanted.fingerprint != got.fingerprint:
        return f"the model's files differ: {got.fingerprint[:12]}… here, {wanted.fingerprint[:12]}… in the plan."
    for w, g in zip(wanted.choices, got.choices, strict=False):
        if (w.provider, w.version, w.variant, w.options) != (g.provider, g.version, g.variant, g.options):
            return f"{w.kind}: the plan has {w.provider} {w.version}, here is {g.provider} {g.version}."
    return f"the plan has {len(wanted.choices)} parts, here are {len(got.choices)}."
