"""The code blocks of README.md, and of a few more pages, run, and say what the page says they say.

In the order of the page, in one empty folder and one namespace:

- ```` ```python ```` runs; with `>>>` prompts it is a doctest;
- ```` ```console ````, ```` ```bash ````, ```` ```sh ````: each command that starts with `pluglm` (after an optional `$ `)
  runs and must exit 0; `pip install ./folder` installs into a folder of the test's own; other commands, such as
  `git clone` and `make demo`, are for the reader;
- ```` ```toml ```` and ```` ```json ```` are parsed.

A comment on the line before a block says more: `<!-- output -->` on any block: it is what the block before it printed;
on a console block: what its commands print below them is compared as well; `<!-- file: NAME -->`: the block is written
to that file instead of run; `<!-- not run: REASON -->`. In compared text `...` stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
#: Pages that are read from top to bottom; what other pages show is run by the tests of the kind they are about.
HOW_TO = ROOT / "docs" / "how-to"
PAGES = (
    README,
    *(HOW_TO / f"{name}.md" for name in ("swap-a-part", "write-an-architecture", "choose-a-cache", "reuse-a-prompt")),
    HOW_TO / "publish-a-decoding-method.md",
    HOW_TO / "use-a-kernel-from-the-hub.md",
    HOW_TO / "choose-a-decoding-strategy.md",
    HOW_TO / "order-of-processors.md",
    HOW_TO / "constrain-the-output.md",
    HOW_TO / "stream-text.md",
    HOW_TO / "quantize-a-model.md",
)
SHELLS = ("console", "bash", "sh", "shell")
FENCE = re.compile(
    r"^(?P<ticks>`{3,})(?P<language>[\w+-]*)[^\n]*\n(?P<text>.*?)^(?P=ticks)\s*$", re.MULTILINE | re.DOTALL
)
COMMENT = re.compile(r"<!--\s*(?P<word>output|file|not run)\b:?\s*(?P<value>.*?)\s*-->\s*\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, text and first line, and the comment before it (word and value, or empty)."""

    language: str
    text: str
    line: int
    word: str = ""
    value: str = ""


def blocks(page: str) -> Iterator[Block]:
    for match in FENCE.finditer(page):
        comment = COMMENT.search(page, 0, match.start())
        word, value = (comment["word"], comment["value"]) if comment else ("", "")
        yield Block(match["language"], match["text"], page.count("\n", 0, match.start()) + 1, word, value)


def commands(text: str) -> Iterator[tuple[str, str]]:
    """(command, the text below it) for each `$ ` line; without a prompt every line is a command."""
    text = text.replace("\\\n", " ")
    if not re.search(r"^\$ ", text, re.MULTILINE):
        yield from ((line, "") for line in text.splitlines() if line.strip() and not line.startswith("#"))
        return
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


def same(expected: str, printed: str) -> bool:
    """Whether two texts agree but for space at line ends, where `...` stands for anything."""
    tidy = [re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip() for text in (expected, printed)]
    return re.fullmatch(".*".join(re.escape(part) for part in tidy[0].split("...")), tidy[1], re.DOTALL) is not None


class Reader:
    """Does what a page says, block by block, in the current folder."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""
        self.site = Path("installed").resolve()

    def read(self, block: Block) -> None:
        if block.word == "not run":
            assert block.value, "`<!-- not run: REASON -->` without a reason"
        elif block.word == "file":
            Path(block.value).parent.mkdir(parents=True, exist_ok=True)
            Path(block.value).write_text(block.text, "utf-8")
        elif block.language == "python":
            self.python(block)
        elif block.language in SHELLS:
            self.shell(block)
        elif block.word == "output":
            assert same(block.text, self.printed), (
                f"the page says:\n{block.text}\nbut this was printed:\n{self.printed}"
            )
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "json":
            json.loads(block.text)

    def python(self, block: Block) -> None:
        if re.search(r"^>>> ", block.text, re.MULTILINE):
            found = doctest.DocTestParser().get_doctest(block.text, self.namespace, "README", "README.md", block.line)
            report = io.StringIO()
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            failed = runner.run(found, out=report.write, clear_globs=False).failed
            self.namespace.update(found.globs)
            assert not failed, report.getvalue()
            return
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * block.line + block.text, "README.md", "exec"), self.namespace)
        self.printed = output.getvalue()

    def shell(self, block: Block) -> None:
        self.printed = ""
        for command, output in commands(block.text):
            words = shlex.split(command, comments=True)
            if words[:2] == ["pip", "install"]:
                self.install(words[2:])
            if not words or words[0] != "pluglm":
                continue
            environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "PLUGLM_PROGRESS": "0"}
            environment["PYTHONPATH"] = str(self.site)
            result = subprocess.run(
                [sys.executable, "-m", "pluglm.cli", *words[1:]],
                env=environment, capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert result.returncode == 0, f"`{command}` exits {result.returncode}:\n{result.stdout}{result.stderr}"
            self.printed += result.stdout
            if block.word == "output":
                assert same(output, result.stdout), (
                    f"`{command}` prints:\n{result.stdout}\nbut the page says:\n{output}"
                )

    def install(self, packages: list[str]) -> None:
        """`pip install ./folder`, into a folder of this test's own, without the network."""
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--upgrade", "--target", str(self.site)]
        command = [sys.executable, "-m", "pip", "install", *options, *packages]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, f"`pip install {shlex.join(packages)}`:\n{result.stdout}{result.stderr}"


def read_page(page: str) -> Reader:
    reader = Reader()
    for block in blocks(page):
        try:
            reader.read(block)
        except BaseException as error:
            error.add_note(f"in the {block.language or 'plain'} block at line {block.line}")
            raise
    return reader


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "installed")  # python blocks import what a page has installed


def test_the_readme_shows_python_and_a_command() -> None:
    found = list(blocks(README.read_text("utf-8")))
    assert [block for block in found if block.language == "python" and not block.word]
    assert [line for block in found if block.language in SHELLS for line, _ in commands(block.text) if "pluglm" in line]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_block_of_a_page_does_what_the_page_says(page: Path) -> None:
    read_page(page.read_text("utf-8"))


def test_python_blocks_share_one_namespace_and_their_output_is_compared() -> None:
    page = (
        "```python\na = 6\n```\ntext\n```python\nprint(a * 7, 'or so')\n```\n\n<!-- output -->\n```text\n42 ...\n```\n"
    )
    assert read_page(page).namespace["a"] == 6


def test_a_file_block_is_written_and_can_be_read() -> None:
    read_page("<!-- file: d/x.toml -->\n```toml\na = 1\n```\n")
    assert Path("d/x.toml").read_text() == "a = 1\n"


@pytest.mark.parametrize(
    "page",
    (
        "```python\nraise ValueError\n```\n",
        "```python\nprint(1)\n```\n<!-- output -->\n```\n2\n```\n",
        "```python\n>>> 1 + 1\n3\n```\n",
        "```console\n$ pluglm no-such-command\n```\n",
        "```bash\npluglm no-such-command\n```\n",
        "```console\n$ make demo\n$ pluglm --no-such-option\n```\n",
        "<!-- output -->\n```console\n$ pluglm --version\nno such version\n```\n",
        "```toml\na = \n```\n",
        "<!-- not run: -->\n```python\n1\n```\n",
    ),
)
def test_a_page_that_is_wrong_fails(page: str) -> None:
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a block may raise anything
        read_page(page)
    assert "block at line" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    "page",
    (
        "```console\n$ make demo\n$ git clone nowhere\n```\n",
        "<!-- not run: needs a GPU -->\n```python\nraise ValueError\n```\n",
        "```python\n>>> x = 2\n>>> x + 1\n3\n```\n```python\nassert x == 2\n```\n",
        "```text\nanything\n```\n",
    ),
)
def test_a_page_that_is_right_passes(page: str) -> None:
    read_page(page)
