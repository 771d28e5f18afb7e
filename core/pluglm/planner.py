"""The planner: facts → candidates → reasons → choices that fit together. Builds nothing, reads no weight.

`auto` considers providers with static facts only and keeps every failing predicate of each. What the user named is
honoured or refused; it is never replaced.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any

from pluglm.contracts.decoding import GenerationConfig
from pluglm.contracts.model import ModelDescription
from pluglm.contracts.runtime import KERNEL_OPS
from pluglm.contracts.slots import slot_kinds
from pluglm.errors import (
    IncompatiblePluginError,
    InputError,
    ManifestError,
    PlanError,
    PluginDisabledError,
    PluginNotFoundError,
    PluglmError,
)
from pluglm.kinds import KINDS
from pluglm.manager import Manager
from pluglm.metadata import installed_versions
from pluglm.plan import Choice, Rejected
from pluglm.provider import Provider
from pluglm.static_filter import ANY, TIERS, static_refusals, unmet_packages

AUTO = "auto"
#: What `decoding="auto"` may choose, in this order: the first that honours every field of the call, and of which the
#: call says one of these fields, if there are any. The other strategies change what is generated for the same fields,
#: so they are used only when named.
AUTO_DECODING: Mapping[str, frozenset[str]] = {
    "greedy": frozenset(), "sampling": frozenset(),
    "beam": frozenset({"num_beams"}), "beam-sampling": frozenset({"num_beams"}),
    "diverse-beam": frozenset({"num_beams", "num_beam_groups"}),
    "constrained-beam": frozenset({"force_words_ids", "constraints"}),
    "prompt-lookup": frozenset({"prompt_lookup_num_tokens"}), "assisted": frozenset({"assistant_model"}),
    "early-exit": frozenset({"assistant_early_exit"}),
    "contrastive-search": frozenset({"penalty_alpha"}), "dola": frozenset({"dola_layers"}),
}  # fmt: skip
#: Kinds of which `auto` chooses only what gives back everything as it was given (numerics `bitwise`, no feature
#: `forgets`): a cache that compresses or forgets changes what is generated.
LOSSLESS = ("cache",)


@dataclass(frozen=True)
class Wanted:
    """What a user asked for one kind. text: a reference or "auto". options: keyword options of that part."""

    text: str = AUTO
    options: tuple[tuple[str, Any], ...] = ()


def wish(kind: str, text: object, options: tuple[tuple[str, Any], ...] = ()) -> Wanted:
    """What a user passed for one kind. Raises InputError for what cannot be a name at all."""
    if not isinstance(text, str) or not text:
        raise InputError(f"{kind}={text!r} is not a name.", fix=f'Write {kind}="auto" or a provider.', argument=kind)
    return Wanted(text, options)


@dataclass(frozen=True)
class Demand:
    """What a part of one kind must offer for this model, in the words of `pluglm.json`."""

    device: str | None = None
    dtype: str | None = None
    features: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    head_dims: tuple[int, ...] = ()


@dataclass
class Candidates:
    """One kind's candidates, sorted: those that may do the work, best first, and those that may not, with reasons.

    Attributes:
        ranked: an observer gave the order. times: provider id -> measured milliseconds a token, where there is a score.
    """

    kind: str
    wanted: Wanted
    able: list[Provider] = field(default_factory=list)
    variant: str | None = None
    rejected: list[Rejected] = field(default_factory=list)
    ranked: bool = False
    times: Mapping[str, float] = field(default_factory=dict)

    def choice(self, provider: Provider, reason: str, skipped: Mapping[str, str] = {}) -> Choice:
        """The plan's entry for `provider`; other able ones are "next in line", or in `skipped` with why not."""
        others = [
            Rejected(p.id, p.version, (skipped.get(p.id, "next in line"),)) for p in self.able if p.id != provider.id
        ]
        return Choice(
            self.kind, self.wanted.text, provider.id, provider.version, reason,
            self.variant, self.wanted.options, tuple(others + self.rejected),
        )  # fmt: skip


class Planner:
    """Sorts candidates for one load.

    Args:
        manager: knows what may be used.
        excluded: provider id -> why it failed when it was built for this load; it is not tried again.
    """

    def __init__(self, manager: Manager, excluded: Mapping[str, str] = {}) -> None:
        self.manager = manager
        self.excluded = dict(excluded)
        self._versions: Mapping[str, str] | None = None

    def candidates(self, kind: str, wanted: Wanted, demand: Demand) -> Candidates:
        """All that could play `kind`. A named part that cannot is an error; `auto` may come back empty-handed."""
        found = Candidates(kind, wanted)
        if wanted.text != AUTO:
            provider, found.variant = self.manager.registry.find(kind, wanted.text)
            self._insist(provider, demand)
            found.able = [provider]
            return found
        for provider in self.manager.registry.of(kind):
            reasons = self.reasons(provider, demand)
            if kind in LOSSLESS and loses(provider):
                reasons = (*reasons, "changes what is generated; works when named")
            if provider.facts is None and self._malformed(provider) is None:
                reasons = (*reasons, "has no pluglm.json; works when named")
            if reasons:
                found.rejected.append(Rejected(provider.id, provider.version, reasons))
            else:
                found.able.append(provider)
        scores = self.manager.scores
        times = {p.id: scores.of(p, device=demand.device, dtype=demand.dtype) for p in found.able}
        found.able.sort(key=lambda p: (_tier(p), (s := times[p.id]) is None, s.token_ms if s else 0.0, p.id))
        found.times = {name: score.token_ms for name, score in times.items() if score is not None}
        order = self.manager.rank(kind, tuple(found.able)) if len(found.able) > 1 else ()
        if order:
            place = {name: i for i, name in enumerate(order)}
            found.able.sort(key=lambda p: place.get(p.id, len(place)))
            found.ranked = True
        return found

    def reasons(self, provider: Provider, demand: Demand) -> tuple[str, ...]:
        """Every reason why this provider cannot meet the demand, by policy, by failure, by its static facts."""
        reasons: list[str] = []
        if refusal := self.manager.refusal(provider):
            reasons.append(refusal)
        if provider.id in self.excluded:
            reasons.append(self.excluded[provider.id])
        if malformed := self._malformed(provider):
            reasons.append(f"its pluglm.json is not valid: {malformed}")
        elif provider.facts is not None:
            reasons += self._static(provider, demand)
        return tuple(dict.fromkeys(reasons))

    def _malformed(self, provider: Provider) -> str | None:
        """What is wrong with the provider's pluglm.json; None if nothing is, or if there is none."""
        from pluglm.manifest import parse_facts

        if provider.facts is None:
            about = (p for p in self.manager.registry.problems if p.stage == "manifest")
            return next((p.message for p in about if p.subject == provider.manifest_path), None)
        try:
            parse_facts(provider.facts, plugin=provider.id, path=provider.manifest_path)
        except PluglmError as e:
            return e.why or e.what
        return None

    def _static(self, provider: Provider, demand: Demand) -> list[str]:
        facts = provider.facts or {}
        reasons: list[str] = []
        for head_dim in demand.head_dims or (None,):
            for reason in static_refusals(
                facts, device=demand.device, dtype=demand.dtype, torch_version=_torch_version(),
                api_version=KINDS[provider.kind].version, features=demand.features, views=demand.views,
                slots=demand.slots, operations=demand.operations, head_dim=head_dim,
            ):  # fmt: skip
                if reason not in reasons:
                    reasons.append(reason)
        if packages := facts.get("requires", {}).get("packages"):
            reasons += unmet_packages(packages, self._installed())
        return reasons

    def _installed(self) -> Mapping[str, str]:
        """Installed distributions and their versions, read once a planner."""
        if self._versions is None:
            self._versions = installed_versions(sys.path)
        return self._versions

    def _insist(self, provider: Provider, demand: Demand) -> None:
        """Raise the error that tells why a named provider cannot be used, if it cannot."""
        if provider.id in self.manager.quarantine:
            raise self.manager.failure_of(provider) from self.manager.quarantine[provider.id].cause
        if refusal := self.manager.refusal(provider):
            raise PluginDisabledError(
                f"{provider.id} {provider.version} was asked for by name and may not be used.",
                why=refusal, fix="Change the setting or the policy, or choose another provider.",
                plugin=provider.id, by="policy",
            )  # fmt: skip
        if malformed := self._malformed(provider):
            raise ManifestError(
                f"{provider.id} {provider.version} has a pluglm.json that is not valid.",
                why=malformed,
                fix=f"Install {provider.distribution} again or in another version, or choose another {provider.kind}; "
                "without its facts it may be one for another API.",
                plugin=provider.id, path=provider.manifest_path,
            )  # fmt: skip
        reasons = [self.excluded[provider.id]] if provider.id in self.excluded else []
        if provider.facts is not None:
            reasons += self._static(provider, demand)
        if not reasons:
            return
        api = [r for r in reasons if "API" in r]
        if api:
            raise IncompatiblePluginError(
                f"{provider.id} {provider.version} was written for another version of the {provider.kind} API.",
                why="; ".join(api),
                fix=f"Install a {provider.distribution} made for {provider.kind} API {KINDS[provider.kind].version}, "
                "or another pluglm.",
                plugin=provider.id, have=KINDS[provider.kind].version, needs=(provider.facts or {}).get("api"),
            )  # fmt: skip
        able = self.candidates(provider.kind, Wanted(), demand).able
        instead = (
            f"Choose {' or '.join(f'{provider.kind}={p.name!r}' for p in able)}" if able else "Install another provider"
        )
        raise PlanError(
            f"{provider.kind}={provider.name!r} ({provider.id} {provider.version}) cannot do what this model needs.",
            why="\n".join(reasons),
            fix=f'{instead}, or leave it on "auto".',
            plugin=provider.id,
            reasons=tuple(reasons),
        )

    def attention_and_cache(
        self, description: ModelDescription, attention: Wanted, cache: Wanted, *,
        device: str, dtype: str, operations: Sequence[str],
    ) -> tuple[Choice | None, Choice | None]:  # fmt: skip
        """An attention backend that reads a view the cache gives, best pair first; None where the model needs none."""
        specs = description.attention
        features = sorted({name for spec in specs for name in spec.features})
        dims = sorted({spec.head_dim for spec in specs})
        backends = None
        if specs:
            backends = self.candidates(
                "attention", attention, Demand(device, dtype, tuple(features), head_dims=tuple(dims))
            )
        layouts = None
        if description.slots:
            demand = Demand(device, dtype, slots=slot_kinds(description.slots), operations=tuple(operations))
            layouts = self.candidates("cache", cache, demand)
        for group in (backends, layouts):
            if group is not None and not group.able:
                raise self.nothing_able(group)
        if backends is None or layouts is None:
            return (_leader(backends) if backends else None, _leader(layouts) if layouts else None)
        misfit: dict[str, str] = {}
        for layout in layouts.able:
            for backend in backends.able:
                if _share_view(backend, layout):
                    views = ", ".join(v for v in _views(backend) if v in _views(layout)) or "views unknown until built"
                    return (
                        backends.choice(backend, _why(backends, backend, f"reads {views}"), misfit),
                        layouts.choice(layout, _why(layouts, layout, f"gives {views}")),
                    )
                misfit[backend.id] = (
                    f"reads {', '.join(_views(backend))}; {layout.id} gives {', '.join(_views(layout))}"
                )
        raise self._impossible(description, backends, layouts, device=device, dtype=dtype, operations=operations)

    def _impossible(
        self, description: ModelDescription, backends: Candidates, layouts: Candidates, *,
        device: str, dtype: str, operations: Sequence[str],
    ) -> PlanError:  # fmt: skip
        features = sorted({name for spec in description.attention for name in spec.features})
        all_backends = self.candidates("attention", Wanted(), Demand(device, dtype, tuple(features))).able
        all_layouts = self.candidates(
            "cache", Wanted(), Demand(device, dtype, slots=slot_kinds(description.slots), operations=tuple(operations))
        ).able
        pairs = [
            f"attention={a.name!r} with cache={c.name!r}"
            for a in all_backends
            for c in all_layouts
            if _share_view(a, c)
        ]
        a, c = backends.able[0], layouts.able[0]
        return PlanError(
            f"attention={backends.wanted.text!r} and cache={layouts.wanted.text!r} do not fit together.",
            why=f"{a.id} reads {', '.join(_views(a)) or 'no view'}; {c.id} gives {', '.join(_views(c)) or 'no view'}.",
            fix=f"Combinations that work here: {'; '.join(pairs) or 'none of the installed parts'}.",
            attention=a.id,
            cache=c.id,
        )

    def single(self, kind: str, wanted: Wanted, demand: Demand, note: str) -> Choice:
        """The best provider of a kind that need not fit with others. Raises if there is none."""
        found = self.candidates(kind, wanted, demand)
        if not found.able:
            raise self.nothing_able(found)
        return found.choice(found.able[0], _why(found, found.able[0], note))

    def decoding(self, wanted: Wanted, fields: Sequence[str], *, device: str) -> Choice:
        """The strategy for a call that sets these GenerationConfig fields."""
        demand = Demand(device=device, features=tuple(fields))
        said = f"honours {', '.join(fields)}" if fields else "no field asks for more"
        found = self.candidates("decoding", wanted, demand)
        if wanted.text != AUTO:
            return found.choice(found.able[0], _why(found, found.able[0], said))
        for name, asked in AUTO_DECODING.items():
            for provider in found.able:
                if provider.name == name and (not asked or asked & set(fields)):
                    skipped = {
                        p.id: "next in line" if p.name in AUTO_DECODING else "used when named" for p in found.able
                    }
                    return found.choice(provider, _why(found, provider, said), skipped)
        # One that takes any name has not said that it knows these.
        knowing = [p for p in found.able if ANY not in (p.facts or {}).get("features", ())]
        if knowing:
            raise PlanError(
                f'no strategy that "auto" may choose honours {", ".join(fields)}.',
                why='"auto" chooses among '
                + ", ".join(AUTO_DECODING)
                + " only (a search if num_beams or its like is said); the others mean something else by the same call.",
                fix=f"Name one: {' or '.join(f'decoding={p.name!r}' for p in knowing)}.",
            )
        raise self._unknown_fields(found, fields) or self.nothing_able(found)

    def _unknown_fields(self, found: Candidates, fields: Sequence[str]) -> PlanError | None:
        """The error for fields that no installed strategy has ever heard of: a typo, most likely."""
        known = {name for p in self.manager.registry.of("decoding") for name in (p.facts or {}).get("features", ())}
        known |= {f.name for f in dataclasses.fields(GenerationConfig)} - {"extra"}
        unknown = [name for name in fields if name not in known]
        if not unknown or not found.rejected:
            return None
        near = get_close_matches(unknown[0], known, 1)
        return PlanError(
            f"no installed decoding strategy honours {', '.join(unknown)}.",
            why=f"there is {self.manager.registry.names('decoding')}; "
            "a setting that is ignored changes results in silence.",
            fix=(f"Did you mean {near[0]!r}? " if near else "")
            + "Leave it out (of generation_config.json too), or install a strategy that knows it and name it.",
            kind="decoding", fields=tuple(unknown),
        )  # fmt: skip

    def kernels(self, *, device: str, dtype: str) -> list[Choice]:
        """For each op that a tuned kernel covers, the kernel. Ops without one run their reference."""
        chosen = []
        for op in KERNEL_OPS:
            found = self.candidates("kernel", Wanted(), Demand(device, dtype, (op,)))
            if found.able:
                choice = found.choice(found.able[0], _why(found, found.able[0], f"computes {op}"))
                chosen.append(Choice(**{**vars(choice), "kind": f"kernel:{op}"}))
        return chosen

    def nothing_able(self, found: Candidates) -> PlanError | PluginNotFoundError:
        """The error for a kind that `auto` finds nobody for, with each candidate and why it was passed over."""
        considered = "\n".join(f"{r.provider} {r.version}: {'; '.join(r.reasons)}" for r in found.rejected)
        if not found.rejected:
            return PluginNotFoundError(
                f"no {found.kind} plugin is installed.",
                why=f"nothing in this environment declares the entry-point group {KINDS[found.kind].group!r}.",
                fix='Install the first-party ones with `pip install "pluglm[standard]"`, or any other provider.',
                kind=found.kind, name=AUTO,
            )  # fmt: skip
        return PlanError(
            f"none of the installed {found.kind} plugins can do what this model needs.",
            why=considered,
            fix="Install one that can, enable one that is switched off, or name one without static facts.",
            kind=found.kind,
        )


def _views(provider: Provider) -> tuple[str, ...]:
    return tuple((provider.facts or {}).get("views", ()))


def _share_view(backend: Provider, layout: Provider) -> bool:
    """Whether they can meet. A provider without facts was named; what it reads is asked once it is built."""
    if backend.facts is None or layout.facts is None:
        return True
    return bool(set(_views(backend)) & set(_views(layout)))


def _leader(found: Candidates) -> Choice:
    return found.choice(found.able[0], _why(found, found.able[0], "best of its kind"))


def _why(found: Candidates, provider: Provider, note: str) -> str:
    if found.wanted.text != AUTO:
        return f"asked for by name; {note}"
    how = "first in the order an observer gave" if found.ranked else f"tier {TIERS[_tier(provider)]}"
    if provider.id in found.times and not found.ranked:
        how += f", {found.times[provider.id]:.3g} ms a token measured here"
    return f"{how}; {note}"


def loses(provider: Provider) -> bool:
    """Whether it says that it gives back other numbers than it was given, or not all of them."""
    facts = provider.facts or {}
    numerics, features = facts.get("numerics"), facts.get("features")
    rounds = isinstance(numerics, Mapping) and numerics.get("kind") != "bitwise"
    return rounds or (isinstance(features, list | tuple) and "forgets" in features)


def _tier(provider: Provider) -> int:
    return TIERS.index((provider.facts or {}).get("tier", "portable"))


@cache
def _torch_version() -> str | None:
    """The installed torch's version, without importing it. Read once a process: it takes eight milliseconds."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return None
