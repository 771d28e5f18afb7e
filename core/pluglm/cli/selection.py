"""The static half of selection, for `pluglm plugins why`: what facts and the user's state say about each provider."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from pluglm.errors import ManifestError
from pluglm.kinds import KINDS
from pluglm.manifest import parse_facts
from pluglm.metadata import installed_versions
from pluglm.provider import Provider
from pluglm.state import State
from pluglm.static_filter import TIERS, static_refusals, unmet_packages


def ranked(
    providers: Iterable[Provider],
    state: State | None,
    kind: str,
    *,
    device: str | None,
    dtype: str | None,
    head_dim: int | None,
) -> list[dict[str, Any]]:
    """The providers of `kind`, usable ones first and in the order `auto` tries them.

    Returns: for each `id`, `version`, `tier`, `order` (1, 2, … or None) and every reason against it, `refusals`.
    """
    installed = installed_versions(sys.path)
    rows = []
    for provider in providers:
        if provider.kind != kind:
            continue
        tier, refusals = "", []
        if state is not None and state.is_disabled(provider):
            refusals.append("disabled by the user")
        if provider.facts is None:
            refusals.append("states no facts: works when named, never chosen by auto")
        else:
            tier, against = _judged(provider, installed, device=device, dtype=dtype, head_dim=head_dim)
            refusals += against
        rows.append({"id": provider.id, "version": provider.version, "tier": tier, "refusals": refusals})
    rows.sort(key=lambda row: (bool(row["refusals"]), _place(row["tier"]), row["id"]))
    usable = sum(not row["refusals"] for row in rows)
    return [{"order": n if n <= usable else None, **row} for n, row in enumerate(rows, 1)]


def _place(tier: object) -> int:
    return TIERS.index(tier) if isinstance(tier, str) and tier in TIERS else len(TIERS)


def _judged(
    provider: Provider, installed: dict[str, str], *, device: str | None, dtype: str | None, head_dim: int | None
) -> tuple[str, list[str]]:
    try:
        facts = parse_facts(provider.facts or {}, plugin=provider.id, path=provider.manifest_path)
    except ManifestError as error:
        return "", [f"its manifest is not valid: {error.why.replace(chr(10), ' ')}"]
    refusals = static_refusals(
        facts,
        device=device,
        dtype=dtype,
        torch_version=installed.get("torch", ""),
        api_version=KINDS[provider.kind].version,
        head_dim=head_dim,
    )
    return facts.tier, [*refusals, *unmet_packages(facts.requires.packages, installed)]
