"""Makes installed plugins out of nothing: the metadata a wheel would leave, in a temporary site directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

CORE = Path(__file__).resolve().parents[2] / "core"


class Site:
    """A directory of installed distributions, whose packages fail when they are imported."""

    def __init__(self, path: Path, libraries: Path) -> None:
        self.path = path
        self.libraries = libraries
        self.cache = path.parent / "cache"
        self.config = path.parent / "config"
        path.mkdir()

    def install(
        self,
        distribution: str = "acme-fa3",
        *,
        version: str = "1.0",
        points: Mapping[str, str] | None = None,
        providers: Sequence[Mapping[str, Any]] | None = ({},),
        manifest: str | None = None,
        requires: Sequence[str] = (),
        suffix: str = "dist-info",
    ) -> Path:
        """Install one; `points` is kind/name → target, `providers` overrides usual facts, None leaves the file out."""
        package = distribution.replace("-", "_").lower()
        points = {"attention/fa3": package} if points is None else points
        source = self.path / package
        source.mkdir(exist_ok=True)
        (source / "__init__.py").write_text("raise SystemExit('imported')\n")
        facts = {"kind": "attention", "name": "fa3", "summary": "Fast.", "api": ">=1.0,<2", "tier": "tuned"}
        if manifest is None and providers is not None:
            described = [{**facts, **provider} for provider in providers]
            manifest = json.dumps({"schema": 1, "distribution": distribution, "providers": described})
        if manifest is not None:
            (source / "pluglm.json").write_text(manifest)
        info = self.path / f"{package}-{version}.{suffix}"
        info.mkdir(exist_ok=True)
        groups = {"attention": "attention", "cache": "caches", "decoding": "decoding"}
        lines = []
        for key, target in points.items():
            kind, _, name = key.partition("/")
            lines.append(f"[pluglm.{groups.get(kind, kind)}]\n{name} = {target}\n")
        (info / "entry_points.txt").write_text("".join(lines))
        head = [f"Name: {distribution}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
        (info / ("METADATA" if suffix == "dist-info" else "PKG-INFO")).write_text("\n".join(head) + "\n\nText\n")
        return info

    def environment(self) -> dict[str, str]:
        """Variables under which this site, and this test's cache and configuration, are what pluglm sees."""
        own = {"PYTHONPATH": os.pathsep.join([str(CORE), str(self.path), str(self.libraries)])}
        return {**os.environ, **own, "PLUGLM_CACHE_DIR": str(self.cache), "PLUGLM_CONFIG_DIR": str(self.config)}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `pluglm` in a process of its own."""
        return self.python("-m", "pluglm.cli", *arguments)

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the interpreter without its site directory, so that installed plugins change no result."""
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.environment(), check=False)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The modules of this environment without their metadata."""
    folder = tmp_path_factory.mktemp("libraries")
    for entry in Path(click.__file__).parents[1].iterdir():
        if entry.suffix not in (".dist-info", ".egg-info", ".pth"):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture
def site(tmp_path: Path, libraries: Path) -> Site:
    return Site(tmp_path / "site", libraries)
