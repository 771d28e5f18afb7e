"""Imports go one way, and nothing of ours runs code that came as data.

Both gates read the syntax tree of every module in core, plugins and contrib. Beside each stands a table of planted
offenders: a gate that misses one of them is itself broken.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CORE = "pluglm"
#: What plugins of one kind share. Libraries import the core alone, not each other.
LIBRARIES = {"pluglm_blocks", "pluglm_decoding_blocks"}

REFUSED_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
REFUSED_CALLS = {
    "torch.load": "it unpickles; read safetensors",
    "torch.serialization.load": "it unpickles; read safetensors",
    "builtins.eval": "it runs text as code",
    "builtins.exec": "it runs text as code",
    "eval": "it runs text as code",
    "exec": "it runs text as code",
    "os.system": "it runs text in a shell",
    "os.popen": "it runs text in a shell",
    "subprocess.getoutput": "it runs text in a shell",
    "subprocess.getstatusoutput": "it runs text in a shell",
}
REFUSED_WORDS = {
    "trust_remote_code": "code from the Hub is vendored as a plugin instead: design, section 7",
    "load_setuptools_entrypoints": "pluggy would import every plugin before the policy is asked",
}

#: (package, word or call) -> why it may stand there.
ALLOWED = {
    ("pluglm_hf", "trust_remote_code"): "an argument of the library whose face it is, refused wherever it is true",
    ("pluglm_hf", "exec"): "runs a method's files, once their digests were compared with those that were consented to",
}


def packages() -> dict[str, Path]:
    """Import name → folder, for every distribution of the repository."""
    found = {CORE: ROOT / "core" / CORE}
    for kind in ("plugins", "contrib"):
        found.update({path.name: path for path in (ROOT / kind).glob("*/src/pluglm_*") if path.is_dir()})
    return found


def modules() -> Iterator[tuple[str, Path]]:
    """(import name of the package, module file), for every module that a wheel ships."""
    for name, folder in packages().items():
        for path in sorted(folder.rglob("*.py")):
            yield name, path


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute module) for each import statement, and for each `import_module` of a fixed name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def called(node: ast.Call) -> str:
    """The last name of what a call calls."""
    function = node.func
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def wrong_way(package: str, source: str) -> list[str]:
    """Each import that `package` may not make.

    The core imports no plugin. Plugins and contrib import the core, the libraries and third parties; what they need of
    each other they reach through hooks.
    """
    allowed = {package, CORE} | (LIBRARIES if package not in LIBRARIES | {CORE} else set())
    return [
        f"line {line}: {package} imports {module}"
        for line, module in imported(ast.parse(source))
        if (top := module.partition(".")[0]) == CORE or top.startswith(CORE + "_")
        if top not in allowed
    ]


def refused(source: str) -> list[str]:
    """Each place that could run code which came as data, or that uses a refused word."""
    tree = ast.parse(source)
    aliases = bound_names(tree)
    prose = set(mentions(tree))
    found = []
    for line, module in imported(tree):
        if module.partition(".")[0] in REFUSED_MODULES:
            found.append(f"line {line}: imports {module}; data is read as safetensors or JSON")
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            name = dotted(node, aliases)
            if name in REFUSED_CALLS:
                found.append(f"line {node.lineno}: {name}: {REFUSED_CALLS[name]}")
        if isinstance(node, ast.keyword) and node.arg == "shell" and not is_false(node.value):
            found.append(f"line {node.value.lineno}: shell=…: it runs text in a shell; pass a list")
        for word in words(node, prose) & REFUSED_WORDS.keys():
            found.append(f"line {getattr(node, 'lineno', '?')}: {word}: {REFUSED_WORDS[word]}")
    return found


def bound_names(tree: ast.AST) -> dict[str, str]:
    """Local name → dotted name, for every import of a module: `import torch as t` gives t → torch."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound.update({alias.asname: alias.name for alias in node.names if alias.asname})
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return bound


def dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """`a.b.c` of a chain of attributes, imports resolved; "" for anything else, such as `model.to(x).eval`."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, aliases)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def mentions(tree: ast.AST) -> Iterator[int]:
    """The ids of strings that only speak of something: docstrings, and keys of a table that gives each a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            yield id(node.value)
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield id(key)


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def words(node: ast.AST, prose: set[int]) -> set[str]:
    """The identifiers that a node introduces or uses, and its text if it is a string that is no mere mention."""
    match node:
        case ast.Name(id=word) | ast.Attribute(attr=word) | ast.keyword(arg=str(word)) | ast.arg(arg=word):
            return {word}
        case ast.Constant(value=str(word)) if id(node) not in prose:
            return {word}
        case ast.alias(name=name, asname=asname):
            return {name, asname or name}
        case ast.FunctionDef(name=word) | ast.AsyncFunctionDef(name=word):
            return {word}
    return set()


def test_every_package_of_the_repository_is_looked_at() -> None:
    folders = {path.parent.name for kind in ("plugins", "contrib") for path in (ROOT / kind).glob("*/pyproject.toml")}
    assert packages().keys() == {CORE} | {folder.replace("-", "_") for folder in folders}
    assert {name for name, _ in modules()} == packages().keys()


def test_no_module_imports_against_the_direction() -> None:
    offences = [
        f"{path.relative_to(ROOT)}, {offence}"
        for package, path in modules()
        for offence in wrong_way(package, path.read_text("utf-8"))
    ]
    assert not offences, "\n".join(offences)


def test_no_module_runs_code_that_came_as_data() -> None:
    offences, excused = [], set()
    for package, path in modules():
        for offence in refused(path.read_text("utf-8")):
            word = offence.split(": ")[1]
            if (package, word) in ALLOWED:
                excused.add((package, word))
            else:
                offences.append(f"{path.relative_to(ROOT)}, {offence}")
    assert excused == set(ALLOWED), "an excuse that nobody needs"
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize(
    ("package", "source"),
    (
        ("pluglm", "import pluglm_blocks"),
        ("pluglm", "from pluglm_attention_sdpa import sdpa"),
        ("pluglm", "def late():\n    import pluglm_tokenizers.templates as t"),
        ("pluglm", "import importlib\nimportlib.import_module('pluglm_caches')"),
        ("pluglm", "if TYPE_CHECKING:\n    from pluglm_blocks.rope import Rope"),
        ("pluglm_attention_sdpa", "from pluglm_attention_eager import mask"),
        ("pluglm_blocks", "import pluglm_arch_llama"),
        ("pluglm_blocks", "import pluglm_decoding_blocks"),
        ("pluglm_decoding_blocks", "from pluglm_decoding_standard import strategies"),
        ("pluglm_decoding_speculative", "from pluglm_decoding_standard.strategies import Greedy"),
        ("pluglm_model_pystdlib", "from pluglm_tokenizers import load"),
    ),
)
def test_a_planted_import_against_the_direction_is_found(package: str, source: str) -> None:
    assert len(wrong_way(package, source)) == 1


@pytest.mark.parametrize(
    ("package", "source"),
    (
        ("pluglm", "import torch, pluggy\nfrom pluglm.errors import PluglmError\nfrom . import kinds"),
        ("pluglm_arch_llama", "import pluglm\nfrom pluglm_blocks import rope\nfrom pluglm_arch_llama import families"),
        ("pluglm_decoding_standard", "from pluglm_decoding_blocks.draw import draw"),
        ("pluglm_model_pystdlib", "from pluglm import hookimpl"),
    ),
)
def test_an_import_in_the_direction_is_allowed(package: str, source: str) -> None:
    assert wrong_way(package, source) == []


@pytest.mark.parametrize(
    "source",
    (
        "import pickle",
        "from pickle import loads",
        "def late():\n    import marshal",
        "import importlib\nimportlib.import_module('pickle')",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "from torch.serialization import load as read\nread('x')",
        "import torch\nread = torch.load",
        "eval('1')",
        "exec('1')",
        "import builtins\nbuiltins.eval('1')",
        "run = exec",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import subprocess\nsubprocess.run('ls', shell=flag)",
        "import os\nos.system('ls')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "f(**{'trust_remote_code': True})",
        "def load(path, trust_remote_code=False): ...",
        "manager.load_setuptools_entrypoints('pluglm')",
        "getattr(manager, 'load_setuptools_entrypoints')('pluglm')",
    ),
)
def test_a_planted_way_to_run_data_is_found(source: str) -> None:
    assert refused(source)


@pytest.mark.parametrize(
    "source",
    (
        "model.eval()",
        "model.to('cpu').eval()",
        "import re\nre.compile('x')",
        "import json\njson.load(file)",
        "from safetensors.torch import load\nload(data)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        '"""There is no trust_remote_code here."""',
        "IGNORED = {'trust_remote_code': 'no code is taken from a model'}",
    ),
)
def test_an_innocent_neighbour_of_a_refused_one_is_allowed(source: str) -> None:
    assert refused(source) == []
