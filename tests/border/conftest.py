"""Checkpoints and installed plugins are made once a session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Test folders are no packages (importlib mode): the modules beside this file are found by their folder.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    import border_kit

    return border_kit.write_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the architecture that only a third-party plugin reads."""
    import border_kit

    return border_kit.write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the wheels of all plugins of this folder, as a user does."""
    import border_kit

    place = tmp_path_factory.mktemp("border")
    wheels = border_kit.build([border_kit.sources(name, place) for name in border_kit.DISTRIBUTIONS])
    target = place / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    border_kit.run([*pip, "--disable-pip-version-check", "--target", str(target), *map(str, wheels)])
    return target
