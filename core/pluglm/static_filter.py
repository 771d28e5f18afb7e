"""Decides from facts alone, without importing anything of a plugin, why a provider cannot serve a request.

Used by the planner and by `pluglm plugins why`. Every failing predicate is reported, not only the first.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluglm.manifest import ProviderFacts

TIERS = ("tuned", "portable", "reference")
"""The tiers in the order in which `auto` tries them."""

ANY = "*"
"""Among a decoding strategy's features: it takes settings of any name, and refuses what it has no use for itself."""

_SIMPLE = re.compile(r"(>=|<=|>|<|==|!=)\s*(\d+(?:\.\d+)*)")
_COMPARE = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


def static_refusals(
    facts: ProviderFacts | Mapping[str, Any],
    *,
    device: str | None,
    dtype: str | None,
    torch_version: str | None,
    api_version: str,
    features: Iterable[str] = (),
    views: Iterable[str] = (),
    slots: Iterable[str] = (),
    operations: Iterable[str] = (),
    head_dim: int | None = None,
) -> tuple[str, ...]:
    """Say why a provider cannot serve a request; empty if nothing speaks against it.

    What is None or empty in the request is not asked about.

    Args:
        facts: the provider's facts, validated or as read; parts of the wrong form are a refusal.
        device: "cuda" or "cuda:0"; only the part before the colon counts.
        dtype: "bfloat16" or "torch.bfloat16".
        torch_version: the version that is installed; "" if none is.
        api_version: the version of the kind's API, "major.minor".
        features, slots, operations: the provider must offer all of these.
        views: the provider must offer at least one of these.
        head_dim: channels of one attention head.
    """
    raw: Mapping[str, Any] = facts if isinstance(facts, Mapping) else facts.model_dump(by_alias=True)
    if not raw:
        return ("its manifest cannot be read",)
    refused: list[str] = []
    requires = raw.get("requires", {})
    if not isinstance(requires, Mapping):
        refused.append("its facts are malformed: 'requires' should be a table")
        requires = {}
    refused += _versions(raw, requires, api_version, torch_version)
    refused += _one_of(requires, "devices", "device", device and device.partition(":")[0])
    refused += _one_of(requires, "dtypes", "dtype", dtype and dtype.removeprefix("torch."))
    refused += _head_dim(requires.get("head_dim"), head_dim)
    for key, word, wanted in (
        ("features", "feature", features),
        ("slots", "layer kind", slots),
        ("operations", "operation", operations),
    ):
        offered = _texts(raw, key, refused)
        missing = [] if ANY in offered and key == "features" else [name for name in wanted if name not in offered]
        refused += [f"lacks the {word} {name}" for name in missing]
    refused += _views(_texts(raw, "views", refused), tuple(views))
    return tuple(dict.fromkeys(refused))


def _texts(raw: Mapping[str, Any], key: str, refused: list[str]) -> tuple[str, ...]:
    value = raw.get(key, ())
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return tuple(value)
    refused.append(f"its facts are malformed: {key!r} should be a list of text")
    return ()


def _versions(raw: Mapping[str, Any], requires: Mapping[str, Any], api: str, torch: str | None) -> Iterable[str]:
    wanted = raw.get("api")
    if not isinstance(wanted, str):
        yield "its facts are malformed: 'api' is missing"
    elif not satisfies(api, wanted):
        yield f"needs API {wanted}, have {api}"
    wanted = requires.get("torch", "")
    if not isinstance(wanted, str):
        yield "its facts are malformed: 'torch' should be text"
    elif wanted and torch is not None and not (torch and satisfies(torch, wanted)):
        yield f"needs torch {wanted}, have {torch or 'none'}"


def _one_of(requires: Mapping[str, Any], key: str, word: str, have: str | None) -> list[str]:
    refused: list[str] = []
    allowed = _texts(requires, key, refused)
    if have and allowed and have not in allowed:
        refused.append(f"needs {word} {' or '.join(allowed)}, have {have}")
    return refused


def _views(offered: tuple[str, ...], wanted: tuple[str, ...]) -> list[str]:
    if not wanted or set(offered) & set(wanted):
        return []
    return [f"knows the KV views {', '.join(offered) or '(none stated)'}, not {' or '.join(wanted)}"]


def _head_dim(limits: Any, have: int | None) -> Iterable[str]:
    if limits is None:
        return
    if not isinstance(limits, Mapping):
        yield "its facts are malformed: 'head_dim' should be a table"
        return
    largest, multiple, values = limits.get("max"), limits.get("multiple_of"), limits.get("values") or ()
    numbers = (
        *(n for n in (largest, multiple) if n is not None),
        *(values if isinstance(values, (list, tuple)) else [""]),
    )
    if any(type(number) is not int or number < 1 for number in numbers):
        yield "its facts are malformed: 'head_dim' should hold whole numbers above 0"
        return
    if have is None:
        return
    if largest is not None and have > largest:
        yield f"needs head_dim up to {largest}, have {have}"
    if multiple is not None and have % multiple:
        yield f"needs head_dim in multiples of {multiple}, have {have}"
    if values and have not in values:
        yield f"needs head_dim {' or '.join(map(str, values))}, have {have}"


@lru_cache(maxsize=1024)
def satisfies(version: str, specifier: str) -> bool:
    """True if `version` lies in the PEP 440 `specifier`; False if either is malformed.

    Plain numbers are compared here: importing packaging takes longer than a whole `plugins list`.
    """
    if re.fullmatch(r"\d+(\.\d+)*", version):
        clauses = [_SIMPLE.fullmatch(clause.strip()) for clause in specifier.split(",")]
        if None not in clauses:
            return all(_COMPARE[c[1]](_numbers(version), _numbers(c[2])) for c in clauses if c is not None)
    from packaging.specifiers import InvalidSpecifier, SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(specifier).contains(Version(version), prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return False


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def unmet_packages(requirements: Iterable[str], installed: Mapping[str, str]) -> tuple[str, ...]:
    """Say which PEP 508 `requirements` are not met by `installed` (normalised name → version).

    A requirement whose marker does not hold here counts as met, and one that cannot be read as unmet.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    from pluglm.metadata import normalise

    unmet = []
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            unmet.append(f"states the requirement {text!r}, which cannot be read")
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        have = installed.get(normalise(requirement.name))
        if have is None or (requirement.specifier and not satisfies(have, str(requirement.specifier))):
            unmet.append(f"needs {requirement.name}{requirement.specifier}, have {have or 'none'}")
    return tuple(unmet)
