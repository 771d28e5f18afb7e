"""Reads Python as text: what it defines, what it imports, which calls deserve a look. Runs nothing.

What is found is information for the person who decides. Code has many ways to do a thing without naming it: an empty
list says nothing about innocence, and there is no sandbox.
"""

from __future__ import annotations

import ast
import io
import tokenize
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pluglm.errors import InputError
from pluglm.vendored import ENTRY, FOLDER

#: Modules by top-level name, and what importing them opens.
MODULES: Mapping[str, str] = {
    **dict.fromkeys(("subprocess", "pty", "multiprocessing"), "starts processes"),
    **dict.fromkeys(
        ("socket", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib",
         "xmlrpc", "websockets", "paramiko", "webbrowser", "huggingface_hub"),
        "uses the network",
    ),
    **dict.fromkeys(("ctypes", "cffi", "_ctypes"), "calls native code"),
    **dict.fromkeys(("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"), "makes objects from data"),
    **dict.fromkeys(("importlib", "runpy", "code", "codeop", "zipimport", "imp"), "imports or runs code by name"),
    **dict.fromkeys(("shutil", "tempfile", "pathlib", "glob"), "touches files"),
    **dict.fromkeys(("builtins", "gc", "inspect", "site", "sysconfig"), "reaches into the interpreter"),
    **dict.fromkeys(("base64", "binascii", "zlib", "lzma", "bz2", "codecs"), "unpacks hidden text or code"),
    **dict.fromkeys(("signal", "atexit", "threading"), "goes on after the call"),
}  # fmt: skip
#: Calls by dotted name; a name that ends in a dot stands for all below it.
CALLS: Mapping[str, str] = {
    **dict.fromkeys(("exec", "eval", "compile", "__import__"), "runs text as code"),
    **dict.fromkeys(("getattr", "setattr", "globals", "vars"), "reaches things by computed name"),
    **dict.fromkeys(("open", "os.open", "io.open"), "opens files"),
    **dict.fromkeys(("os.system", "os.popen", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.kill"),
                    "starts or ends processes"),
    **dict.fromkeys(("os.remove", "os.unlink", "os.rmdir", "os.rename", "os.replace", "os.chmod", "os.makedirs"),
                    "changes files"),
    **dict.fromkeys(("os.environ", "os.getenv", "os.putenv"), "reads or changes the environment"),
    **dict.fromkeys(("sys.path", "sys.modules", "sys.meta_path", "sys.settrace", "sys.setprofile"),
                    "changes what is imported or run"),
    **dict.fromkeys(("torch.load", "torch.hub", "torch.ops.load_library", "torch.utils.cpp_extension"),
                    "loads code or pickles"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Something worth a look. place: "generate.py:12". what: as written ("os.system"). why: what it can do."""

    place: str
    what: str
    why: str


@dataclass(frozen=True)
class Reading:
    """What the code says. imports: top-level names of other packages, sorted. findings: in order of files and lines."""

    imports: tuple[str, ...]
    findings: tuple[Finding, ...]


def read_code(repo: str, files: Mapping[str, bytes]) -> Reading:
    """Read all modules of a recipe.

    Args:
        repo: for messages. files: name → content.
    Raises: InputError for Python that cannot be read as UTF-8, does not parse, imports a file that is not there, or
        does not define `generate`.
    """
    trees = _trees(repo, files)
    for name, tree in trees.items():
        _check_relative(repo, name, tree, files)
    if "generate" not in set(_defined(trees[ENTRY].body)):
        raise InputError(
            f"{ENTRY} of `{repo}` does not define `generate`.",
            why="a recipe is a function of that name at the top of the file; its text was read, and nothing run.",
            fix="Ask its author; def generate(model, input_ids, generation_config=None, **kwargs) is the form.",
            argument="source",
        )
    return _reading(trees, files, FOLDER + "/")


def read_package(repo: str, files: Mapping[str, bytes], folder: str, functions: Sequence[str]) -> Reading:
    """Read all modules of a kernel's package.

    Args:
        repo: for messages. files: name → content; what is no Python is not read.
        folder: of the package's `__init__.py`. functions: names that it must define or import.
    Raises: InputError for Python that cannot be read as UTF-8, does not parse, or lacks a function.
    """
    trees = _trees(repo, files)
    entry = f"{folder}/__init__.py"
    defined = set(_defined(trees[entry].body))
    absent = [name for name in functions if name not in defined]
    if absent and "*" not in defined:  # what a star brings is known when it is imported, and asked for then
        raise InputError(
            f"{entry} of `{repo}` does not define {absent[0]}.",
            why=f"a kernel of attention has the functions {' and '.join(functions)}; nothing of it was run.",
            fix="Take a repository of attention kernels, such as one of flash-attn.",
            argument="source",
        )
    return _reading(trees, files, folder + "/")


def _trees(repo: str, files: Mapping[str, bytes]) -> dict[str, ast.Module]:
    return {name: _parsed(repo, name, data) for name, data in sorted(files.items()) if name.endswith(".py")}


def _reading(trees: Mapping[str, ast.Module], files: Mapping[str, bytes], prefix: str) -> Reading:
    imports: set[str] = set()
    findings: list[Finding] = []
    for name, tree in trees.items():
        imports |= _imports(tree)
        short = name.removeprefix(prefix)
        findings += sorted(set(_findings(short, tree)), key=lambda f: (int(f.place.rpartition(":")[2]), f.what))
        findings += _hidden(short, files[name].decode("utf-8"))
    return Reading(tuple(sorted(imports)), tuple(findings))


def _parsed(repo: str, name: str, data: bytes) -> ast.Module:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        if encoding not in ("utf-8", "utf-8-sig"):
            raise ValueError(f"it declares the encoding {encoding}, so what runs would not be what is shown")
        text = data.decode(encoding)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an author's odd escape in a string is the author's
            return ast.parse(text, name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(
            f"{name} of `{repo}` cannot be read as Python in UTF-8.",
            why=f"{type(error).__name__}: {ascii(str(error))[1:-1]}.",
            fix="Ask its author; nothing of it was run.",
            argument="source",
        ) from error


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names that a module binds at its top, also below `if` and `try`."""
    for node in body:
        match node:
            case ast.FunctionDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                yield name
            case ast.ImportFrom(names=names):
                yield from (alias.asname or alias.name for alias in names)
            case ast.If(body=first, orelse=second):
                yield from _defined([*first, *second])
            case ast.Try(body=first, handlers=handlers, orelse=second, finalbody=third):
                yield from _defined([*first, *(n for h in handlers for n in h.body), *second, *third])


def _imports(tree: ast.Module) -> set[str]:
    """Top-level names of the packages that a module imports."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").partition(".")[0])
    return found


def _check_relative(repo: str, name: str, tree: ast.Module, files: Mapping[str, bytes]) -> None:
    """A relative import of a recipe must find its file. Raises: InputError."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        for module in [node.module] if node.module else [alias.name for alias in node.names]:
            if node.level > 1 or f"{FOLDER}/{module}.py" not in files:
                dots = "." * node.level
                raise InputError(
                    f"{name}, line {node.lineno}, of `{repo}` imports {dots}{module}, which is not there.",
                    why=f"a recipe reaches the files of its own folder, {FOLDER}, and no others of its repository.",
                    fix="Ask its author to put the file beside generate.py.",
                    argument="source",
                )


def _findings(short: str, tree: ast.Module) -> Iterator[Finding]:
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    bound[alias.asname] = alias.name
                yield from _module(short, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            bound.update({alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names})
            yield from _module(short, node.lineno, module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            dotted = _dotted(node, bound).removeprefix("builtins.")
            for name, why in CALLS.items():
                # os.execv, os.spawnl and the like are families
                if dotted == name or (name in ("os.exec", "os.spawn") and dotted.startswith(name)):
                    yield Finding(f"{short}:{node.lineno}", dotted, why)


def _module(short: str, line: int, module: str) -> Iterator[Finding]:
    why = MODULES.get(module.partition(".")[0])
    if why is not None:
        yield Finding(f"{short}:{line}", f"import {module}", why)


def _dotted(node: ast.expr, bound: Mapping[str, str]) -> str:
    """`a.b.c` of a chain of attributes, imports resolved; "" for anything else."""
    if isinstance(node, ast.Name):
        return bound.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, bound)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def _hidden(short: str, text: str) -> Iterator[Finding]:
    """Characters that make a line look like another one (CVE-2021-42574), or draw on a terminal."""
    for number, line in enumerate(text.splitlines(), 1):
        odd = {c for c in line if unicodedata.category(c) in ("Cf", "Cc") and c not in "\t\f\ufeff"}
        if odd:
            names = ", ".join(f"U+{ord(c):04X}" for c in sorted(odd))
            yield Finding(f"{short}:{number}", names, "invisible characters: the line may read otherwise than it runs")
