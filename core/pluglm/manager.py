"""Activates providers: policy, import, registration, one call of their hook, and the check of what comes back.

This is the only module that imports plugin code, and pluggy never scans entry points. What goes wrong in a plugin is
kept with its stage and cause (quarantine) and ends at that plugin: the rest of the system goes on without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import pluggy

from pluglm import hookspecs
from pluglm.errors import PluginDisabledError, PluglmError, QuarantinedError
from pluglm.kinds import KINDS
from pluglm.provider import Provider
from pluglm.registry import Registry
from pluglm.scores import Scores, load_scores

#: What a manager knows of speed when it is told nothing.
NO_SCORES = Scores()


@dataclass(frozen=True)
class Quarantine:
    """Why a provider was set aside. stage: import, register, build or contract."""

    provider: Provider
    stage: str
    cause: BaseException

    def __str__(self) -> str:
        return f"quarantined at {self.stage}: {type(self.cause).__name__}: {self.cause}"


class Manager:
    """One session's plugins. Independent managers share nothing but Python's imported modules.

    Attributes:
        registry: which providers there are.
        scores: what was measured on this machine, for the order of `auto`.
        quarantine: provider id -> why it was set aside, for the life of this manager.
    """

    def __init__(self, registry: Registry, scores: Scores = NO_SCORES) -> None:
        self.registry = registry
        self.scores = scores
        self.quarantine: dict[str, Quarantine] = {}
        self._pluggy = pluggy.PluginManager("pluglm")
        for spec in hookspecs.SPECS:
            self._pluggy.add_hookspecs(spec)
        self._activated: dict[str, Any] = {}
        self._denied: dict[str, str | None] = {}
        self._start_observers()

    @classmethod
    def installed(cls) -> Manager:
        """Everything that is installed here, with this machine's scores."""
        return cls(Registry.installed(), load_scores())

    def _start_observers(self) -> None:
        from pluglm import __version__

        for provider in self.registry.of("hooks"):
            if self.registry.refusal(provider) is None:
                try:
                    plugin = self._activate(provider)
                    self._bound(plugin, "pluglm_configure")(version=__version__)
                except QuarantinedError:
                    pass  # kept in self.quarantine; shown by the plan and by `pluglm plugins doctor`
                except Exception as e:
                    self._set_aside(provider, "build", e)

    def audit(self, event: str, **data: Any) -> None:
        """Tell observers of a life-cycle event. What they raise is theirs to lose."""
        for impl in list(self._pluggy.hook.pluglm_audit.get_hookimpls()):
            try:
                impl.function(*({"event": event, "data": data}[name] for name in impl.argnames))
            except Exception as e:
                self.quarantine.setdefault(f"audit:{impl.plugin_name}", Quarantine(self._owner(impl), "build", e))

    def _owner(self, impl: Any) -> Provider:
        for provider in self.registry.of("hooks"):
            if self._activated.get(provider.id) is impl.plugin:
                return provider
        raise AssertionError(f"hook implementation of an unknown plugin {impl.plugin_name}")

    def refusal(self, provider: Provider) -> str | None:
        """Why this provider may not be used: switched off, denied by a policy hook, or quarantined. None: it may."""
        if provider.id in self.quarantine:
            return str(self.quarantine[provider.id])
        if reason := self.registry.refusal(provider):
            return reason
        if provider.id not in self._denied:
            self._denied[provider.id] = self._policy(provider)
        return self._denied[provider.id]

    def _policy(self, provider: Provider) -> str | None:
        if provider.kind == "hooks":
            return None  # observers are governed by the user's settings; they cannot be asked about themselves
        try:
            answers: list[Any] = list(self._pluggy.hook.pluglm_check_policy(provider=provider) or ())
        except Exception as e:  # governance fails closed
            answers = [f"a policy hook failed: {type(e).__name__}: {e}"]
        denials = [str(answer) for answer in answers if answer is not None]
        if not denials:
            return None
        self.audit("denied", provider=provider.id, reasons=tuple(denials))
        return "denied by policy: " + "; ".join(denials)

    def rank(self, kind: str, candidates: tuple[Provider, ...]) -> tuple[str, ...]:
        """Ids in the order an observer wishes, or () if none does. A failing observer abstains and is set aside."""
        for impl in reversed(self._pluggy.hook.pluglm_rank.get_hookimpls()):
            values = {"kind": kind, "candidates": candidates}
            try:
                answer = impl.function(*(values[name] for name in impl.argnames))
            except Exception as e:
                self._set_aside(self._owner(impl), "build", e)
                continue
            if isinstance(answer, list | tuple):
                return tuple(str(i) for i in answer)
            if answer is not None:
                self._set_aside(self._owner(impl), "contract", TypeError("pluglm_rank returned no list of ids"))
        return ()

    def plan_ready(self, plan: Any) -> None:
        """Tell observers of a finished plan; what they raise stops the load."""
        self._pluggy.hook.pluglm_plan_ready(plan=plan)

    def call(self, provider: Provider, hook: str, **arguments: Any) -> Any:
        """Activate `provider` if need be and call one of its hooks.

        Raises: UnsupportedRequestError and errors about the user's model or input as the plugin raised them;
            PluginDisabledError if it may not be used; QuarantinedError, with the cause, for anything else.
        """
        if provider.id in self.quarantine:
            raise self.failure_of(provider)
        if reason := self.refusal(provider):
            raise PluginDisabledError(
                f"{provider.id} {provider.version} may not be used.",
                why=reason,
                fix="Change the setting or the policy, or choose another provider.",
                plugin=provider.id,
                by="policy",
            )
        plugin = self._activate(provider)
        try:
            result = self._bound(plugin, hook)(**arguments)
        except (PluglmError, KeyboardInterrupt):
            raise  # a typed error speaks of the user's model or request, not of a broken plugin
        except BaseException as e:
            self._set_aside(provider, "build", e)
            raise self.failure_of(provider) from e
        if result is None:
            self.reject(provider, TypeError(f"{hook} returned None"))
        self.audit("built", provider=provider.id, hook=hook)
        return result

    def reject(self, provider: Provider, cause: Exception) -> None:
        """Quarantine a provider whose result breaks its contract, and raise."""
        self._set_aside(provider, "contract", cause)
        raise self.failure_of(provider) from cause

    def _activate(self, provider: Provider) -> Any:
        if provider.id in self._activated:
            return self._activated[provider.id]
        stage = "import"
        try:
            module_name, _, attribute = provider.target.partition(":")
            plugin: Any = importlib.import_module(module_name)
            for name in filter(None, attribute.split(".")):
                plugin = getattr(plugin, name)
            stage = "register"
            self._register(provider, plugin)
        except KeyboardInterrupt:
            raise
        except BaseException as e:  # a plugin may raise anything, SystemExit included
            self._set_aside(provider, stage, e)
            raise self.failure_of(provider) from e
        self._activated[provider.id] = plugin
        self.audit("imported", provider=provider.id, version=provider.version, target=provider.target)
        return plugin

    def _register(self, provider: Provider, plugin: Any) -> None:
        kind = KINDS[provider.kind]
        if not self._pluggy.is_registered(plugin):  # several providers may share one module
            try:
                self._pluggy.register(plugin, name=f"{provider.distribution}={provider.target}")
                self._pluggy.check_pending()
                self._check_defaults(plugin)
                self._check_observing(provider, plugin)
            except BaseException:  # pluggy keeps half of a plugin that it refuses: its other hooks would be called
                if self._pluggy.is_registered(plugin):
                    self._pluggy.unregister(plugin)
                raise
        missing = [hook for hook in kind.hooks if not self._implements(plugin, hook)]
        if missing:
            unmarked = [name for name in missing if callable(getattr(plugin, name, None))]
            hint = f" ({', '.join(unmarked)} lacks the @hookimpl mark)" if unmarked else ""
            raise TypeError(f"{provider.target!r} does not implement {', '.join(missing)}{hint}")

    def _check_observing(self, provider: Provider, plugin: Any) -> None:
        """Governance is announced: only an entry point in the group of observers may observe."""
        if any(p.target == provider.target for p in self.registry.of("hooks")):
            return
        observing = [name for name in vars(hookspecs.ObserverHooks) if name.startswith("pluglm_")]
        taken = [name for name in observing if self._implements(plugin, name)]
        if taken:
            raise TypeError(
                f"{provider.target!r} implements {', '.join(taken)} without an entry point in {KINDS['hooks'].group!r}"
            )

    def _check_defaults(self, plugin: Any) -> None:
        for caller in self._pluggy.get_hookcallers(plugin) or ():
            for impl in caller.get_hookimpls():
                if impl.plugin is plugin and impl.kwargnames:
                    name = impl.kwargnames[0]
                    raise TypeError(
                        f"{caller.name} has a default for {name!r}, which older versions of pluggy then pass in "
                        "place of the caller's value; hook arguments have none"
                    )

    def _implements(self, plugin: Any, hook: str) -> bool:
        return any(impl.plugin is plugin for impl in getattr(self._pluggy.hook, hook).get_hookimpls())

    def _bound(self, plugin: Any, hook: str) -> Any:
        others = [p for p in self._pluggy.get_plugins() if p is not plugin]
        return self._pluggy.subset_hook_caller(hook, remove_plugins=others)

    def _set_aside(self, provider: Provider, stage: str, cause: BaseException) -> None:
        self.quarantine[provider.id] = Quarantine(provider, stage, cause)
        self.audit("quarantined", provider=provider.id, stage=stage, cause=f"{type(cause).__name__}: {cause}")

    def failure_of(self, provider: Provider) -> QuarantinedError:
        """The error that says why a quarantined provider was set aside."""
        entry = self.quarantine[provider.id]
        verb = {
            "import": "cannot be imported", "register": "does not fit its hooks", "build": "failed while building",
            "contract": "returned something that breaks its contract",
        }[entry.stage]  # fmt: skip
        return QuarantinedError(
            f"{provider.kind} {provider.name!r}, of {provider.distribution} {provider.version}, {verb}.",
            why=f"{type(entry.cause).__name__}: {entry.cause}",
            fix=f"Report this to the authors of {provider.distribution}, install another version, or choose another "
            f"{provider.kind}. Everything else works.",
            plugin=provider.id, stage=entry.stage,
        )  # fmt: skip


#: What an object must have to pass as a part, beyond methods: checked once, when it is built.
CONTRACTS: Mapping[str, tuple[str, ...]] = {
    "attention": ("name", "views", "refusals", "prepare", "attend"),
    "cache": ("name", "operations", "view", "new"),
    "quantizer": ("name", "bits", "refusal", "quantize", "pack", "tensor_names", "unpack", "config"),
    "decoding": ("name", "fields", "needs", "__call__"),
    "executor": ("name", "run"),
    "source": ("name", "resolve"),
    "tokenizer": ("vocab_size", "encode", "decode", "apply_chat_template", "save"),
    "constraint": ("name", "compile"),
    "architecture": ("forward", "embed", "head", "named_parameters"),
    "kernel": ("__call__",),
    "format": ("path", "config", "tensors", "tensor", "file", "fingerprint"),
}


#: What those that are no methods must be; `callable` for what is neither here nor in `_UNCHECKED`.
_TYPES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a str", lambda value: isinstance(value, str)),
    "view": ("a str", lambda value: isinstance(value, str)),
    "bits": ("a number", lambda value: isinstance(value, int | float)),
    "views": ("a tuple of str", lambda value: isinstance(value, tuple) and _all_text(value)),
    **dict.fromkeys(
        ("operations", "fields", "needs"), ("a set of str", lambda value: isinstance(value, Set) and _all_text(value))
    ),
}
_UNCHECKED = frozenset({"vocab_size", "embed", "head", "path", "config", "tensors", "fingerprint"})


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def check_contract(manager: Manager, provider: Provider, part: Any) -> Any:
    """`part`, if it has all that its kind's contract names, of the right type; else its provider is quarantined."""
    try:
        wrong = _wrong(CONTRACTS[provider.kind], part, type(part).__name__)
    except Exception as e:  # a property of the plugin's may raise anything
        manager.reject(provider, e)
        raise
    if wrong is not None:
        manager.reject(provider, TypeError(wrong))
    return part


def _wrong(names: tuple[str, ...], part: Any, owner: str) -> str | None:
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        return f"returned {owner}, which has no {', '.join(missing)}"
    for name in names:
        value = getattr(part, name)
        kind, fits = _TYPES.get(name, ("callable", callable))
        if name not in _UNCHECKED and not fits(value):
            return f"{owner}.{name} is {value!r}; it should be {kind}"
    return None
