"""`pluglm new` writes plugins that build, install, keep their contract and do the work; and refuses bad wishes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import border_kit
import pytest

from pluglm import InputError, SaveError, scaffold

KINDS = scaffold.kinds()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """kind -> folder, written by the command line in one process."""
    place = tmp_path_factory.mktemp("new")
    scenes = {
        kind: border_kit.scene("cli", [], arguments=["new", kind, "my-own", "--path", str(place / kind)])
        for kind in KINDS
    }
    for kind, result in border_kit.play(scenes).items():
        assert (result["code"], result["torch"]) == (0, False), result
        assert f"Wrote pluglm-{kind}-my-own to {place / kind}." in result["out"]
    return {kind: place / kind for kind in KINDS}


@pytest.fixture(scope="module")
def installed(written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of them installed from their wheels."""
    site = tmp_path_factory.mktemp("site")
    for wheel in border_kit.build(list(written.values())):
        border_kit.unpack(wheel, site)
    return site


def test_there_are_templates_for_the_kinds_that_authors_begin_with() -> None:
    assert {"attention", "cache", "decoding"} <= set(KINDS)


def test_the_manifest_is_there_and_no_placeholder_is_left(written: dict[str, Path]) -> None:
    for kind, folder in written.items():
        package = folder / "src" / f"pluglm_{kind}_my_own"
        assert {"__init__.py", "pluglm.json", "py.typed"} <= {path.name for path in package.iterdir()}
        texts = [path.read_text() for path in folder.rglob("*") if path.is_file()]
        assert not any("$" in text for text in texts)


def test_what_is_written_is_as_tidy_as_what_is_here(written: dict[str, Path]) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--line-length=120"]
    for folder in written.values():
        border_kit.run([*ruff, "--select=E,F,I,B,UP,SIM,RUF"], cwd=folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_tests_of_a_new_plugin_pass(written: dict[str, Path], installed: Path, kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(written[kind] / "tests")]
    done = border_kit.run(command, environment={"PYTHONPATH": str(installed)}, cwd=tmp_path)
    assert " passed" in done.stdout


def test_new_plugins_are_chosen_by_name_and_give_the_same_tokens(
    written: dict[str, Path], installed: Path, llama: Path
) -> None:
    plain = {"model": str(llama), "ids": border_kit.PROMPT}
    chosen = {kind: border_kit.scene("load", [installed], **plain, **{kind: "my-own"}) for kind in KINDS
              if kind != "architecture"}  # fmt: skip
    told = border_kit.play({"alone": border_kit.scene("load", [], **plain), **chosen})
    for kind in chosen:
        result: dict[str, Any] = told[kind]
        assert "error" not in result, result["traceback"]
        assert result["parts"][kind] == f"pluglm-{kind}-my-own:{kind}/my-own"
        if kind != "quantizer":
            assert result["tokens"] == told["alone"]["tokens"]


@pytest.mark.parametrize("name", ["", "My-Own", "my own", "../up", "2fast", "my--own", "-my", "my_own", "é"])
def test_a_name_that_cannot_be_one_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot name a plugin") as caught:
        scaffold.Scaffold("attention", name).write(tmp_path / "new")
    assert "lower-case letters and digits" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "word"), [("attenton", "no such kind"), ("engine", "no template")])
def test_a_kind_without_a_template_is_refused_with_those_that_have_one(kind: str, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        scaffold.Scaffold(kind, "mine")
    assert "There are templates for " + ", ".join(KINDS) in str(caught.value)


def test_a_folder_that_holds_something_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "work.txt").write_text("of weeks")
    (tmp_path / "file").write_text("a file")
    for name in ("mine", "file"):
        with pytest.raises(SaveError, match="exists and is not an empty folder") as caught:
            scaffold.Scaffold("attention", "x").write(tmp_path / name)
        assert "--path" in str(caught.value)
    assert (tmp_path / "mine" / "work.txt").read_text() == "of weeks"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_an_empty_folder_is_filled_and_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = scaffold.Scaffold("cache", "x").write(tmp_path / "empty")
    assert (folder / "pyproject.toml").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="was not written"):
        scaffold.Scaffold("cache", "x").write(tmp_path / "file" / "below")


def test_the_command_line_prints_the_error_and_exits_with_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pluglm.cli", "new", "engine", "mine"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "InputError: there is no template" in done.stderr
