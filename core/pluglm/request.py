"""The arguments of `load`, checked as far as that needs no plugin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pluglm.build import SKIP
from pluglm.errors import InputError
from pluglm.plan import Plan
from pluglm.planner import AUTO, Wanted, wish

#: Parts a user may name, with what "nothing said" means. None: the part is absent unless named.
PARTS: Mapping[str, str | None] = {
    "architecture": AUTO, "attention": AUTO, "cache": AUTO, "decoding": AUTO, "executor": AUTO, "tokenizer": AUTO,
    "format": AUTO, "constraint": AUTO, "quantizer": None,
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
    packed_cache: bool = False
    parts: Mapping[str, Wanted] = field(default_factory=dict)
    #: Made from a plan: names of parts are what was found then, not a wish of the user's.
    replay: bool = False

    def wanted(self, kind: str) -> Wanted:
        """What was asked for of one kind."""
        return self.parts.get(kind, Wanted(PARTS[kind] or AUTO))


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
    if not isinstance(kept := rest.get("packed_cache", False), bool):
        raise InputError(f"packed_cache is {kept!r}.", fix="Write packed_cache=True.", argument="packed_cache")
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
