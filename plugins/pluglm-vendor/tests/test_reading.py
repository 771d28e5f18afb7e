"""What is read from a recipe's text, and that reading runs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from pluglm_vendor.reading import read_code

from pluglm.errors import InputError

GENERATE = b"def generate(model, input_ids, **kwargs):\n    return input_ids\n"


def read(code: bytes = b"", **others: bytes) -> list[tuple[str, str]]:
    files = {"custom_generate/generate.py": GENERATE + code}
    files |= {f"custom_generate/{name}.py": text for name, text in others.items()}
    return [(finding.place, finding.what) for finding in read_code("org/name", files).findings]


def test_reading_runs_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    assert read(f"open({str(marker)!r}, 'w')\nraise SystemExit\n".encode()) == [("generate.py:3", "open")]
    assert not marker.exists()


@pytest.mark.parametrize(
    "code",
    [
        b"def generate(model): ...",
        b"from .helper import generate",
        b"from .helper import search as generate",
        b"generate = None",
        b"generate: object = print",
        b"if True:\n    def generate(model): ...",
        b"try:\n    import x\nexcept ImportError:\n    from .helper import generate",
        b"\xef\xbb\xbfdef generate(model): ...",
        b"# -*- coding: utf-8 -*-\ndef generate(model): ...",
        b"s = '\\d'\ndef generate(model): ...",
    ],
)
def test_every_way_to_define_generate_is_seen(code: bytes) -> None:
    read_code("org/name", {"custom_generate/generate.py": code, "custom_generate/helper.py": b""})


@pytest.mark.parametrize(
    "code",
    [b"", b"x = 'def generate(): ...'", b"class A:\n    def generate(self): ...", b"def f():\n    def generate(): ...",
     b"async def generate(model): ...", b"generate: object", b"def Generate(): ..."],
)  # fmt: skip
def test_a_recipe_without_generate_is_refused(code: bytes) -> None:
    with pytest.raises(InputError, match="does not define `generate`") as caught:
        read_code("org/name", {"custom_generate/generate.py": code})
    assert "def generate(model" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (b"def generate(:", "SyntaxError"),
        (b"\xff\xfedef generate(): ...", "invalid"),
        (b"s = 'caf\xe9'\ndef generate(): ...", "invalid"),
        (b"# coding: latin-1\ndef generate(): ...", "declares the encoding iso-8859-1"),
        (b"# coding: utf-7\n+AGQAZQBm generate(): ...", "declares the encoding utf-7"),
        (b"# coding: nonsense\ndef generate(): ...", "unknown encoding"),
        (b"def generate(): ...\0", "null byte"),
        (b"x = " + b"(" * 5000 + b")" * 5000, ""),
    ],
)
def test_what_is_no_python_in_utf8_is_refused(code: bytes, word: str) -> None:
    with pytest.raises(InputError, match="cannot be read as Python in UTF-8") as caught:
        read_code("org/name", {"custom_generate/generate.py": code})
    assert word in str(caught.value)
    assert "nothing of it was run" in str(caught.value)


@pytest.mark.parametrize(
    ("code", "name"),
    [(b"from .gone import x", ".gone"), (b"from . import gone", ".gone"), (b"from ..up import x", "..up"),
     (b"from .. import helper", "..helper"), (b"from .helper.deep import x", ".helper.deep")],
)  # fmt: skip
def test_an_import_of_a_file_that_is_not_there_is_refused(code: bytes, name: str) -> None:
    with pytest.raises(InputError, match="which is not there") as caught:
        read_code("org/name", {"custom_generate/generate.py": GENERATE + code, "custom_generate/helper.py": b""})
    assert f"line 3, of `org/name` imports {name}" in caught.value.what


def test_imports_are_listed_by_top_level_name() -> None:
    code = b"import torch.nn.functional as F, numpy\nfrom transformers.generation import x\nfrom .helper import y\n"
    files = {"custom_generate/generate.py": GENERATE + code, "custom_generate/helper.py": b"def f():\n    import late"}
    assert read_code("org/name", files).imports == ("late", "numpy", "torch", "transformers")


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (b"exec('1')", ["exec"]),
        (b"run = eval", ["eval"]),
        (b"import builtins as b\nb.exec('1')", ["import builtins", "exec"]),
        (b"import os\nos.system('ls')", ["os.system"]),
        (b"import os as o\no.popen('ls')", ["os.popen"]),
        (b"from os import system as go\ngo('ls')", ["os.system"]),
        (b"import os\nos.execv('/x', [])", ["os.execv"]),
        (b"import subprocess", ["import subprocess"]),
        (b"from subprocess import run", ["import subprocess"]),
        (b"import socket", ["import socket"]),
        (b"import urllib.request", ["import urllib.request"]),
        (b"import ctypes", ["import ctypes"]),
        (b"import pickle", ["import pickle"]),
        (b"import torch\ntorch.load('x')", ["torch.load"]),
        (b"import importlib", ["import importlib"]),
        (b"__import__('os')", ["__import__"]),
        (b"import sys\nsys.path.append('x')", ["sys.path"]),
        (b"import os\nos.environ['x']", ["os.environ"]),
        (b"import base64", ["import base64"]),
        (b"getattr(model, 'x')", ["getattr"]),
        (b"# \xe2\x80\xae reversed", ["U+202E"]),
        (b"# \x1b[2J", ["U+001B"]),
    ],
)
def test_calls_that_deserve_a_look_are_found(code: bytes, what: list[str]) -> None:
    assert [found for _, found in read(code)] == what


@pytest.mark.parametrize(
    "code", [b"model.eval()", b"x.open()", b"import re\nre.compile('x')", b"import torch\ntorch.exp(x)"]
)
def test_innocent_neighbours_are_not(code: bytes) -> None:
    assert read(code) == []


def test_helpers_are_read_too_and_places_are_told() -> None:
    assert read(b"import torch", helper=b"\n\nimport socket\n") == [("helper.py:3", "import socket")]
