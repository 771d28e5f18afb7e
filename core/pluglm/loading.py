"""`load` and `explain`: from a name and some wishes to a plan, and from the plan to a model that runs.

The order is: files → description → plan → parts → weights → executor. Nothing of the weights is read before every
part has agreed to the model; a part that fails under `auto` is put aside with a word and the plan is made again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pluglm.build import SKIP, PartFailedError, Parts, build_executor, build_module, build_parts
from pluglm.contracts.model import ModelDescription
from pluglm.contracts.text import Checkpoint, SourceRequest
from pluglm.errors import (
    ConfigError,
    InputError,
    ModelNotFoundError,
    PlanError,
    PluginNotFoundError,
    UnsupportedRequestError,
)
from pluglm.facts import choose_device, choose_dtype
from pluglm.generation import choosing_fields, defaults
from pluglm.manager import Manager, check_contract
from pluglm.plan import Choice, Plan
from pluglm.planner import AUTO, Demand, Planner, Wanted, wish
from pluglm.registry import Registry

if TYPE_CHECKING:
    from pluglm.lm import LanguageModel

log = logging.getLogger("pluglm")
T = TypeVar("T")

#: Parts a user may name, with what "nothing said" means. None: the part is absent unless named.
PARTS: Mapping[str, str | None] = {
    "architecture": AUTO, "attention": AUTO, "cache": AUTO, "decoding": AUTO, "executor": AUTO, "tokenizer": AUTO,
    "quantizer": None,
}  # fmt: skip


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of `load`, checked. See there."""

    model: str
    revision: str | None = None
    offline: bool | None = None
    token: str | None = None
    device: str = AUTO
    dtype: str = AUTO
    parts: Mapping[str, Wanted] = field(default_factory=dict)
    #: Made from a plan: names of parts are what was found then, not a wish of the user's.
    replay: bool = False

    def wanted(self, kind: str) -> Wanted:
        """What was asked for of one kind."""
        return self.parts.get(kind, Wanted(PARTS[kind] or AUTO))


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
    options: Mapping[str, Mapping[str, Any]] | None = None,
    quantizer_skip: tuple[str, ...] = (),
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
        quantizer: None: as the checkpoint is; or a provider, which packs the linear layers while they are read.
        options: keyword options of single parts: {"cache": {"residual_length": 64}}.
        quantizer_skip: patterns of module names that stay in full precision.
        plan: a plan to replay: its providers and versions are used, or it is refused.
        manager: plugins to use, for tests and embedding; None: those installed here.
    Raises: PlanError, PluginError, ModelError or InputError; each says what happened, why, and what to do.
    """
    named = {
        "architecture": architecture, "attention": attention, "cache": cache, "quantizer": quantizer,
        "decoding": decoding, "executor": executor, "tokenizer": tokenizer,
    }  # fmt: skip
    request = read_request(
        str(model), named, options or {}, revision=revision, offline=offline, token=token, device=device, dtype=dtype,
        skip=quantizer_skip,
    )  # fmt: skip
    if plan is not None:
        if not isinstance(plan, Plan):
            raise InputError(
                f"plan is a {type(plan).__name__}.", fix="Pass a Plan; Plan.from_json(…) makes one.", argument="plan"
            )
        request = replaying(request, plan)
    loader = Loader(request, manager or Manager(Registry.installed()))
    lm = loader.load()
    if plan is not None and lm.plan.hash != plan.hash:
        raise PlanError(
            "this plan cannot be replayed here.",
            why=_difference(plan, lm.plan),
            fix="Install the versions that the plan names, or plan anew without it.",
        )
    return lm


def explain(model: str | Path, *, manager: Manager | None = None, **arguments: Any) -> Plan:
    """The plan that `load` with the same arguments would follow. Reads no weights and builds nothing."""
    known = {"revision", "offline", "token", "device", "dtype"}
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
    return Loader(request, manager or Manager(Registry.installed())).plan()


def read_request(
    model: str, named: Mapping[str, str | None], options: Mapping[str, Mapping[str, Any]], *,
    skip: tuple[str, ...] = (), **rest: Any,
) -> LoadRequest:  # fmt: skip
    """Check the arguments of `load` that need no plugin. Raises InputError.

    Patterns of modules to skip become an option of the quantizer, so that the plan holds them.
    """
    if not isinstance(options, Mapping):
        raise InputError(
            f"options is a {type(options).__name__}.",
            fix="Write options={'cache': {'name': value}}.", argument="options",
        )  # fmt: skip
    if skip:
        if named.get("quantizer") is None:
            raise InputError(
                "quantizer_skip says what a quantizer leaves alone, and none is named.",
                fix="Name one: quantizer=….", argument="quantizer_skip",
            )  # fmt: skip
        options = {**options, "quantizer": {**options.get("quantizer", {}), SKIP: tuple(skip)}}
    for kind, given in options.items():
        if kind not in PARTS or not isinstance(given, Mapping):
            raise InputError(
                f"options={{{kind!r}: …}} does not name a part.",
                fix=f"Write options={{'cache': {{'name': value}}}}; parts are {', '.join(PARTS)}.",
                argument="options",
            )
    parts = {}
    for kind, text in {**dict.fromkeys(PARTS), **named}.items():
        said = tuple(sorted(options.get(kind, {}).items()))
        if text is None:
            text = PARTS[kind]
        if text is None:
            if said:
                raise InputError(
                    f"there are options for the {kind}, but none is chosen.",
                    fix=f"Name one: {kind}=….",
                    argument="options",
                )
            continue
        wanted = wish(kind, text, said)
        if said and text == AUTO:
            raise InputError(
                f"options for the {kind} need a named one.", why='"auto" may choose another that does not know them.',
                fix=f"Write {kind}=… beside them.", argument="options",
            )  # fmt: skip
        parts[kind] = wanted
    return LoadRequest(model, parts=parts, **rest)


def replaying(request: LoadRequest, plan: Plan) -> LoadRequest:
    """The request that names exactly what a plan chose. Raises InputError if the caller also named parts."""
    for name, asked, planned in (("device", request.device, plan.device), ("dtype", request.dtype, plan.dtype)):
        if asked not in (AUTO, planned):
            raise InputError(
                f"a plan already says the {name}, {planned!r}; {name}={asked!r} is another.",
                fix=f"Leave out {name}, or plan anew.", argument=name,
            )  # fmt: skip
    if any(w.text != AUTO for w in request.parts.values()):
        raise InputError(
            "a plan already names every part.", fix="Pass plan= alone, or the parts alone.", argument="plan"
        )
    parts = {
        c.kind: Wanted(c.provider + (f":{c.variant}" if c.variant else ""), c.options)
        for c in plan.choices
        if c.provider is not None and c.kind in PARTS
    }
    return replace(request, parts=parts, device=plan.device, dtype=plan.dtype, replay=True)


def _difference(wanted: Plan, got: Plan) -> str:
    if wanted.fingerprint != got.fingerprint:
        return f"the model's files differ: {got.fingerprint[:12]}… here, {wanted.fingerprint[:12]}… in the plan."
    for w, g in zip(wanted.choices, got.choices, strict=False):
        if (w.provider, w.version, w.variant, w.options) != (g.provider, g.version, g.variant, g.options):
            return f"{w.kind}: the plan has {w.provider} {w.version}, here is {g.provider} {g.version}."
    return f"the plan has {len(wanted.choices)} parts, here are {len(got.choices)}."


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


class Loader:
    """One load: holds what has been read so far, and plans again when a part fails."""

    def __init__(self, request: LoadRequest, manager: Manager) -> None:
        self.request, self.manager = request, manager
        self.excluded: dict[str, str] = {}
        self.checkpoint = self._open()
        self.description, self._architecture = self._describe()
        self.device, self.notes = choose_device(request.device)
        self.dtype, why = choose_dtype(request.dtype, self.checkpoint, self.device)
        self.notes += why

    def _open(self) -> Checkpoint:
        from pluglm.checkpoint import open_folder

        return open_folder(find_model(self.request, self.manager))

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
            _without_settings(choice), requested=wanted.text,
            reason=choice.reason if wanted.text != AUTO else f"reads {model_type}",
        )
        provider, _ = self.manager.registry.find("architecture", choice.provider or "")
        description = self.manager.call(provider, "pluglm_describe_model", config=config)
        if not isinstance(description, ModelDescription):
            self.manager.reject(provider, TypeError(f"pluglm_describe_model returned {type(description).__name__}"))
        return description, choice

    def plan(self) -> Plan:
        """Choose every part. Raises PlanError or PluginError if there is no way."""
        request, description = self.request, self.description
        planner = Planner(self.manager, self.excluded)
        self.base = defaults(description, self.checkpoint.generation_config, eos=None, bos=None, pad=None)
        decoding = planner.decoding(request.wanted("decoding"), self._fields(), device=self.device)
        needs = self._needs(decoding)
        attention, cache = planner.attention_and_cache(
            description, request.wanted("attention"), request.wanted("cache"),
            device=self.device, dtype=self.dtype, operations=needs,
        )  # fmt: skip
        choices: list[Choice] = [self._architecture]
        choices += [c for c in (attention, cache) if c is not None]
        choices += [self._quantizer(planner), decoding, self._tokenizer(planner)]
        demand = Demand(self.device, self.dtype)
        choices.append(planner.single("executor", request.wanted("executor"), demand, f"runs on {self.device}"))
        choices += planner.kernels(device=self.device, dtype=self.dtype)
        plan = Plan(
            request.model, self.checkpoint.fingerprint, description.model_type, self.device, self.dtype,
            tuple(choices), self.notes + tuple(self._setbacks()),
        )  # fmt: skip
        self.manager.plan_ready(plan)
        return plan

    def _fields(self) -> tuple[str, ...]:
        """What the default strategy must honour: what the files say, unless the user named a strategy."""
        return () if self.request.wanted("decoding").text != AUTO else choosing_fields(self.base)

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
        demand = Demand(self.device, self.dtype)
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
                f"pluglm-quantizer-{method.replace('_', '-')}, or use an unpacked copy of the model.",
                kind="quantizer", name=method, path=path,
            ) from e  # fmt: skip

    def _tokenizer(self, planner: Planner) -> Choice:
        wanted = self.request.wanted("tokenizer")
        if wanted.text == AUTO and self.checkpoint.file("tokenizer.json") is None:
            return Choice("tokenizer", AUTO, None, None, "the folder has no tokenizer.json: token ids only")
        return _without_settings(planner.single("tokenizer", wanted, Demand(), "reads tokenizer.json"))

    def load(self) -> LanguageModel:
        """Plan, build, fill, and plan again without each part that fails."""
        from pluglm.lm import LanguageModel

        plan, parts = self._until_built(lambda plan: build_parts(self.manager, plan, self))
        module = build_module(self.manager, plan, self, parts)
        # A failed executor changes no other choice: nothing else in the plan depends on it.
        plan, executor = self._until_built(lambda plan: build_executor(self.manager, plan, self, parts, module))
        self.manager.audit("selected", plan=plan.hash, parts=tuple(c.provider for c in plan.choices if c.provider))
        return LanguageModel._from_parts(self, plan, parts, module, executor)

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


def find_model(request: LoadRequest, manager: Manager) -> Path:
    """The folder of the model a user named: a path, an installed source's, or the Hub's.

    Raises: ModelNotFoundError.
    """
    from pluglm.checkpoint import resolve

    if Path(request.model).expanduser().is_dir():
        return resolve(request.model)
    wish = SourceRequest(request.model, request.revision, request.offline, request.token)
    for provider in manager.registry.of("source"):
        if provider.name == request.model:
            found, _ = manager.registry.find("source", request.model)  # refuses a name that two distributions claim
            source = check_contract(manager, found, manager.call(found, "pluglm_build_source", request=wish))
            folder = source.resolve(wish)
            if folder is None:
                raise ModelNotFoundError(
                    f"{provider.id} {provider.version} does not have its own model {request.model!r}.",
                    fix=f"Install {provider.distribution} again.",
                    model=request.model,
                )
            return Path(folder)
    return resolve(request.model, revision=request.revision, offline=request.offline, token=request.token)


def default_model(registry: Registry) -> str:
    """The model to use when the user names none: that of the one installed source that offers a default.

    Raises: InputError if there is none, or more than one.
    """
    names = [p.name for p in registry.of("source") if "default-model" in (p.facts or {}).get("features", ())]
    names = [n for n in names if registry.refusal(registry.find("source", n)[0]) is None]
    if len(names) != 1:
        raise InputError(
            "no model was named."
            if not names
            else f"no model was named, and {len(names)} sources offer a default: {names}.",
            fix="Pass -m with a folder or org/name"
            + (", or install pluglm-model-pystdlib, which brings a small one." if not names else "."),
            argument="model",
        )
    return names[0]


__all__ = ["LoadRequest", "Loader", "Parts", "default_model", "explain", "find_model", "load"]
