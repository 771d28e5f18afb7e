"""docs/tutorials/your-first-plugin.md does what it says, block by block, in a fresh folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "your-first-plugin.md"
BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def steps() -> list[tuple[str, str]]:
    """("file NAME" or a command, its text or what it prints) in order."""
    found = []
    for block in BLOCK.finditer(PAGE.read_text("utf-8")):
        if block["file"]:
            found.append((f"file {block['file']}", block["text"]))
            continue
        assert block["language"] == "console", f"a {block['language']} block that no test runs"
        for part in re.split(r"^\$ ", block["text"], flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def matches(wanted: str, printed: str) -> bool:
    """`...` stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, wanted.strip().split("..."))), printed.strip(), re.DOTALL) is not None


@pytest.mark.slow
def test_the_first_plugin_tutorial_works_as_written(tmp_path: Path) -> None:
    site = tmp_path / "installed"
    environment = {**os.environ, "PYTHONPATH": str(site), "COLUMNS": "160", "OMP_NUM_THREADS": "2"}
    # Where the reader installs into an environment of their own, the test installs beside this one.
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site)]
    programs = {"pluglm": ["-m", "pluglm.cli"], "python": []}
    for command, wanted in steps():
        name, *words = shlex.split(command)
        if name == "file":
            (tmp_path / words[0]).write_text(wanted)
            continue
        arguments = [*pip, words[-1]] if name == "pip" else [*programs[name], *words]
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"`{command}` exits with {done.returncode}:\n{done.stdout}{done.stderr}"
        assert matches(wanted, done.stdout), f"`{command}` prints:\n{done.stdout}\nThe page says:\n{wanted}"


def test_the_comparison_has_teeth() -> None:
    assert matches("a ... c\n", "a b\nb c")
    assert not matches("a ... c", "a b d")
    assert len(steps()) >= 8
