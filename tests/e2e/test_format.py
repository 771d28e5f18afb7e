"""A format plugin reads files that the core does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import pluglm
from pluglm import PlanError, PluginNotFoundError, QuarantinedError, hookimpl
from pluglm.checkpoint import open_folder
from pluglm.manager import Manager
from pluglm.registry import Registry
from pluglm.testing.isolation import fake_provider


class Renamed:
    """Reads `weights.bin`, which is safetensors under another name, by way of a copy."""

    opened = 0

    @hookimpl
    def pluglm_build_format(self, path: str) -> Any:
        type(self).opened += 1
        folder = Path(path).parent / "unpacked"
        shutil.copytree(path, folder, dirs_exist_ok=True)
        (folder / "weights.bin").rename(folder / "model.safetensors")
        return open_folder(folder)


class Broken:
    @hookimpl
    def pluglm_build_format(self, path: str) -> Any:
        return load_file  # no checkpoint


def manager(plugin: Any) -> Manager:
    return Manager(Registry([*Registry.installed().providers, fake_provider("format", "renamed", plugin)]))


def renamed(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(folder, target)
    (target / "model.safetensors").rename(target / "weights.bin")
    return target


def test_a_named_format_opens_the_checkpoint_and_stands_in_the_plan(
    folder: Path, tmp_path: Path, lm: pluglm.LanguageModel
) -> None:
    target = renamed(folder, tmp_path)
    other = pluglm.load(target, format="renamed", dtype="float32", manager=manager(Renamed()))
    assert Renamed.opened == 1
    assert other.plan["format"].provider == "acme-test:format/renamed"
    assert other.generate([3, 4, 5], max_new_tokens=6) == lm.generate([3, 4, 5], max_new_tokens=6)
    with pytest.raises(PlanError, match="no part 'format'"):
        lm.plan["format"]


def test_an_unknown_format_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(PluginNotFoundError, match="no plugin provides format 'gguf'"):
        pluglm.load(folder, format="gguf")


def test_a_format_that_returns_no_checkpoint_is_quarantined(folder: Path) -> None:
    with pytest.raises(QuarantinedError, match="which has no path, config, tensors"):
        pluglm.load(folder, format="renamed", manager=manager(Broken()))
