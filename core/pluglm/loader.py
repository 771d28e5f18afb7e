"""One load, step by step: files → description → plan → parts → weights → executor.

Nothing of the weights is read before every part has agreed to the model; a part that fails under `auto` is put aside
with a word and the plan is made again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from pluglm.build import Built, LoadContext, PartFailedError, build, build_executor, build_module, build_parts
from pluglm.contracts.model import ModelDescription
from pluglm.contracts.text import Checkpoint
from pluglm.errors import ConfigError, InputError, PlanError, PluginNotFoundError, UnsupportedRequestError
from pluglm.facts import choose_device, choose_dtype
from pluglm.generation import choosing_fields, defaults
from pluglm.manager import Manager
from pluglm.plan import Choice, Plan
from pluglm.planner import AUTO, Demand, Planner, Wanted
from pluglm.request import LoadRequest
from pluglm.sources import find_model

log = logging.getLogger("pluglm")
T = TypeVar("T")


class Loader:
    """One load: holds what has been read so far, and plans again when a part fails."""

    def __init__(self, request: LoadRequest, manager: Manager) -> None:
        self.request, self.manager = request, manager
        self.excluded: dict[str, str] = {}
        self.checkpoint, self._format = self._open()
        if request.packed_cache:
            from pluglm.packed_cache import check_cacheable

            named = request.parts.get("quantizer")
            check_cacheable(self.checkpoint, self.checkpoint.config, named.text if named is not None else None)
        description, self._architecture = self._describe()
        device, self.notes = choose_device(request.device)
        dtype, why = choose_dtype(request.dtype, self.checkpoint, device)
        self.notes += why
        self.context = LoadContext(request.model, self.checkpoint, description, device, dtype)

    def _open(self) -> tuple[Checkpoint, Choice | None]:
        """The checkpoint, and the format that reads it if the user named one; safetensors need no plugin."""
        from pluglm.checkpoint import open_folder

        folder = find_model(self.request, self.manager)
        wanted = self.request.wanted("format")
        if wanted.text == AUTO:
            return open_folder(folder), None
        choice = _without_settings(Planner(self.manager).single("format", wanted, Demand(), "reads the files"))
        opened: Checkpoint = build(self.manager, choice, "pluglm_build_format", path=str(folder))
        return opened, choice

    def _describe(self) -> tuple[ModelDescription, Choice]:
        config = self.checkpoint.config
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise ConfigError(
                f"{self.checkpoint.path / 'config.json'} does not say what the model is.",
                why=f"model_type is {model_type!r}.", fix='Add "model_type": "llama", or whatever it is.',
                key="model_type", path=str(self.checkpoint.path),
            )  # fmt: skip
        wanted = self.request.wanted("architecture")
        planner = Planner(self.manager, self.excluded)
        named = wanted if wanted.text != AUTO else Wanted(f"architecture/{model_type}")
        try:
            choice = planner.single("architecture", named, Demand(), f"reads model_type {model_type!r}")
            if wanted.text == AUTO and choice.variant is not None:
                raise InputError("a model_type has no variant.")
        except (PluginNotFoundError, InputError) as e:
            if wanted.text != AUTO:
                raise
            known = ", ".join(sorted({p.name for p in self.manager.registry.of("architecture")})) or "none"
            malformed = "" if isinstance(e, PluginNotFoundError) else f" {e.what}"
            raise PluginNotFoundError(
                f"no installed plugin reads model_type {model_type!r}.",
                why=f"installed architectures: {known}.{malformed}",
                fix='Install a package with an entry point of that name in the group "pluglm.architectures"; nothing '
                "is fetched because a config names it.",
                kind="architecture", name=model_type, path=str(self.checkpoint.path),
            ) from e  # fmt: skip
        choice = replace(
            _without_settings(choice),
            requested=wanted.text,
            reason=choice.reason if wanted.text != AUTO else f"reads {model_type}",
        )
        provider, _ = self.manager.registry.find("architecture", choice.provider or "")
        description = self.manager.call(provider, "pluglm_describe_model", config=config)
        if not isinstance(description, ModelDescription):
            self.manager.reject(provider, TypeError(f"pluglm_describe_model returned {type(description).__name__}"))
        return description, choice

    def plan(self) -> Plan:
        """Choose every part. Raises PlanError or PluginError if there is no way."""
        request, description = self.request, self.context.description
        device, dtype = self.context.device, self.context.dtype
        planner = Planner(self.manager, self.excluded)
        decoding = planner.decoding(request.wanted("decoding"), self._fields(), device=device)
        needs = self._needs(decoding)
        attention, cache = planner.attention_and_cache(
            description, request.wanted("attention"), request.wanted("cache"),
            device=device, dtype=dtype, operations=needs,
        )  # fmt: skip
        choices: list[Choice] = [c for c in (self._format, self._architecture, attention, cache) if c is not None]
        choices += [self._quantizer(planner), decoding, self._tokenizer(planner)]
        demand = Demand(device, dtype)
        choices.append(planner.single("executor", request.wanted("executor"), demand, f"runs on {device}"))
        if (constraint := request.wanted("constraint")).text != AUTO:
            choices.append(planner.single("constraint", constraint, Demand(device), "built when a call has a grammar"))
        choices += planner.kernels(device=device, dtype=dtype)
        plan = Plan(
            request.model, self.checkpoint.fingerprint, description.model_type, device, dtype,
            tuple(choices), self.notes + tuple(self._setbacks()),
        )  # fmt: skip
        self.manager.plan_ready(plan)
        return plan

    def _fields(self) -> tuple[str, ...]:
        """What the default strategy must honour: what the files say, unless the user named a strategy."""
        base = defaults(self.context.description, self.checkpoint.generation_config, eos=None, bos=None, pad=None)
        return () if self.request.wanted("decoding").text != AUTO else choosing_fields(base)

    def _setbacks(self) -> list[str]:
        tried = [f"{name} was tried first: {reason}" for name, reason in self.excluded.items()]
        unseen = [p for p in self.manager.registry.problems if p.stage not in ("path", "manifest")]
        return tried + [f"discovery stepped over {p.subject}: {p.message}" for p in unseen]

    def _needs(self, decoding: Choice) -> tuple[str, ...]:
        provider, _ = self.manager.registry.find("decoding", decoding.provider or "")
        return tuple((provider.facts or {}).get("needs", ()))

    def _quantizer(self, planner: Planner) -> Choice:
        wanted = self.request.parts.get("quantizer")
        packed = self.checkpoint.config.get("quantization_config")
        if packed is None and wanted is None:
            return Choice("quantizer", "none", None, None, "weights stay as they are")
        demand = Demand(self.context.device, self.context.dtype)
        if packed is None:
            assert wanted is not None
            return planner.single("quantizer", wanted, demand, "packs linear layers while they are read")
        method = packed.get("quant_method") if isinstance(packed, Mapping) else None
        if wanted is not None and not self.request.replay:
            raise PlanError(
                f"quantizer={wanted.text!r} cannot be applied: the weights are packed already ({method!r}).",
                fix="Leave out quantizer, or start from the unpacked weights.",
            )
        return self._unpacker(planner, method, demand)

    def _unpacker(self, planner: Planner, method: object, demand: Demand) -> Choice:
        from pluglm.provider import is_name

        path = str(self.checkpoint.path)
        if not isinstance(method, str) or not is_name(method):
            raise ConfigError(
                f"quantization_config of {path} has quant_method {method!r}, which cannot be a plugin's name.",
                why="a config may name an installed plugin; it never names a place to fetch one from.",
                fix="Correct config.json.", key="quantization_config.quant_method", path=path,
            )  # fmt: skip
        try:
            return planner.single("quantizer", Wanted(method), demand, "the checkpoint is packed by it")
        except PluginNotFoundError as e:
            raise PluginNotFoundError(
                f"the weights of {path} are packed by {method!r}, which no installed plugin reads.",
                why="loading them as if they were plain weights would give noise.",
                fix=f'Install a quantizer plugin named {method!r} (entry-point group "pluglm.quantizers"), such as '
                f"{reader_of(method)}, or use an unpacked copy of the model.",
                kind="quantizer", name=method, path=path,
            ) from e  # fmt: skip

    def _tokenizer(self, planner: Planner) -> Choice:
        wanted = self.request.wanted("tokenizer")
        if wanted.text == AUTO and self.checkpoint.file("tokenizer.json") is None:
            return Choice("tokenizer", AUTO, None, None, "the folder has no tokenizer.json: token ids only")
        return _without_settings(planner.single("tokenizer", wanted, Demand(), "reads tokenizer.json"))

    def load(self) -> Built:
        """Plan, build, fill, and plan again without each part that fails."""
        manager, context = self.manager, self.context
        plan, parts = self._until_built(lambda plan: build_parts(manager, plan, context))
        if self.request.packed_cache:
            from pluglm.packed_cache import build_packed

            note, parts, module = build_packed(manager, plan, context, parts)
            self.notes += (note,)
        else:
            module = build_module(manager, plan, context, parts)
        # A failed executor changes no other choice: nothing else in the plan depends on it.
        plan, executor = self._until_built(lambda plan: build_executor(manager, plan, context, parts.layout, module))
        manager.audit("selected", plan=plan.hash, parts=tuple(c.provider for c in plan.choices if c.provider))
        return Built(plan, parts, module, executor)

    def _until_built(self, build: Callable[[Plan], T]) -> tuple[Plan, T]:
        """Plan and build, each time without what failed before, until it works or the planner has nobody left."""
        while True:
            plan = self.plan()
            try:
                return plan, build(plan)
            except PartFailedError as e:
                self._exclude(e)

    def _exclude(self, failure: PartFailedError) -> None:
        log.warning("%s is passed over: %s", failure.provider, failure.reason)
        self.excluded[failure.provider] = failure.reason


def _without_settings(choice: Choice) -> Choice:
    """The choice of a kind whose providers are told of neither variants nor options; it must have none."""
    reasons = [f"option {name!r} is not known" for name, _ in choice.options]
    if choice.variant is not None:
        reasons.insert(0, f"variant {choice.variant!r} is not known")
    if reasons:
        raise UnsupportedRequestError(
            f"{choice.provider} cannot honour the request.", why="\n".join(reasons),
            fix=f"Leave these out: parts of kind {choice.kind} have no settings.", reasons=tuple(reasons),
        )  # fmt: skip
    return choice


def reader_of(method: str) -> str:
    """The distribution that most likely reads weights packed by a method."""
    published = ("gptq", "awq", "compressed-tensors", "fp8", "mxfp4")
    return f"pluglm-quantizer-{'published' if method in published else method.replace('_', '-')}"
