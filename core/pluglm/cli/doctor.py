"""The checks of `pluglm plugins doctor`. They read files and import nothing of a plugin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from pluglm.discovery import Discovery
from pluglm.errors import ManifestError, PluginError
from pluglm.kinds import KINDS
from pluglm.manifest import Manifest, parse_manifest
from pluglm.metadata import MalformedError, installed_versions, read_text, requirements
from pluglm.provider import Provider
from pluglm.state import load_state
from pluglm.static_filter import satisfies, unmet_packages


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong (an error) or odd (a warning), with what it is about."""

    severity: Literal["error", "warning"]
    subject: str
    message: str


def examine(found: Discovery, paths: Sequence[str]) -> list[Finding]:
    """Check all that was discovered; errors first.

    Args:
        found: what is installed.
        paths: the search path, for the versions of what plugins depend on.
    """
    installed = installed_versions(paths)
    findings = [
        Finding("warning" if problem.stage == "path" else "error", problem.subject, problem.message)
        for problem in found.problems
    ]
    findings += _state()
    findings += _clashes(found.providers)
    for _, copies in groupby(sorted(found.providers, key=lambda p: p.location), key=lambda p: p.location):
        findings += _distribution(tuple(copies), installed)
    return sorted(dict.fromkeys(findings), key=lambda finding: (finding.severity, finding.subject))


def _state() -> Iterator[Finding]:
    try:
        load_state()
    except PluginError as error:
        yield Finding("error", str(error.data["path"]), str(error))


def _clashes(providers: Sequence[Provider]) -> Iterator[Finding]:
    by_name = sorted(providers, key=lambda p: (p.kind, p.name))
    for (kind, name), same in groupby(by_name, key=lambda p: (p.kind, p.name)):
        ids = [provider.id for provider in same]
        if len(ids) > 1:
            message = f"claimed by {' and '.join(ids)}; the short name cannot be used, write an id in full."
            yield Finding("warning", f"{kind}/{name}", message)


def _distribution(providers: Sequence[Provider], installed: Mapping[str, str]) -> Iterator[Finding]:
    distribution = providers[0].distribution
    try:
        for reason in unmet_packages(requirements(providers[0].location), installed):
            yield Finding("error", distribution, f"{reason}. Install what it depends on.")
    except (OSError, MalformedError) as error:
        yield Finding("error", distribution, f"its requirements cannot be read: {error}")
    for path in sorted({provider.manifest_path or "" for provider in providers}):
        announced = [provider for provider in providers if (provider.manifest_path or "") == path]
        if path:
            yield from _manifest(path, announced, installed)
        else:
            yield from (
                Finding("warning", p.id, "its package has no pluglm.json; works when named, never chosen by auto.")
                for p in announced
            )


def _manifest(path: str, providers: Sequence[Provider], installed: Mapping[str, str]) -> Iterator[Finding]:
    try:
        manifest = _read(path)
    except (OSError, MalformedError, ManifestError) as error:
        yield Finding("error", providers[0].distribution, str(error))
        return
    described = {(facts.kind, facts.name): facts for facts in manifest.providers}
    announced = {(provider.kind, provider.name): provider for provider in providers}
    for kind, name in sorted(described.keys() - announced.keys()):
        yield Finding("error", providers[0].distribution, f"{path} describes {kind}/{name}, which has no entry point.")
    for key, provider in announced.items():
        facts = described.get(key)
        if facts is None:
            yield Finding(
                "warning", provider.id, f"{path} does not describe it; works when named, never chosen by auto."
            )
            continue
        have = KINDS[provider.kind].version
        if not satisfies(have, facts.api):
            fix = "Install a version of the plugin, or of pluglm, that fits."
            yield Finding(
                "error", provider.id, f"written for {provider.kind} API {facts.api}, this pluglm has {have}. {fix}"
            )
        for reason in unmet_packages(facts.requires.packages, installed):
            yield Finding("warning", provider.id, f"{reason}, so it cannot be used.")


def _read(path: str) -> Manifest:
    try:
        decoded = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path} is not JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise MalformedError(f"{path} does not hold a JSON object.")
    return parse_manifest(decoded, path)
