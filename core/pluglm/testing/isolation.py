"""Managers that cannot discover: a test names the plugins it wants, and what is installed changes no result."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from pluglm.kinds import KINDS
from pluglm.manager import Manager
from pluglm.provider import Provider
from pluglm.registry import Registry

_numbers = itertools.count()


def fake_provider(
    kind: str, name: str, plugin: Any, *,
    facts: Mapping[str, Any] | None = None, distribution: str = "acme-test", version: str = "1.0",
) -> Provider:  # fmt: skip
    """A provider whose entry point leads to `plugin`, an object or module with hookimpls, as if it were installed.

    Args:
        facts: what its pluglm.json would say beyond kind, name, summary and a fitting API range; None: no pluglm.json.
    """
    module = ModuleType(f"pluglm_testing_fake_{next(_numbers)}")
    module.plugin = plugin  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    if facts is not None:
        major = int(KINDS[kind].version.split(".")[0])
        base = {"kind": kind, "name": name, "summary": "a test's own", "api": f">={major}.0,<{major + 1}"}
        facts = {**base, **facts}
    return Provider(kind, name, distribution, version, f"{module.__name__}:plugin", "<test>", facts)


def isolated_manager(*providers: Provider, refusal: Callable[[Provider], str | None] = lambda _: None) -> Manager:
    """A manager that knows these providers and nothing else."""
    return Manager(Registry(providers, refusal=refusal))
