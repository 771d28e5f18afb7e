"""Turns the files of a recipe into a function, in modules that nobody else can import by accident."""

from __future__ import annotations

import ast
import hashlib
import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pluglm.vendored import ENTRY, FOLDER, REQUIREMENTS
from pluglm_hf.recipes.facade import RecipeImportError, serving
from pluglm_hf.recipes.failures import RecipeError
from pluglm_hf.recipes.requirements import check_requirements
from pluglm_hf.recipes.signature import Takes, takes


@dataclass(frozen=True)
class Recipe:
    """A recipe whose code has run once.

    Attributes:
        name: as users type it. function: `generate` of generate.py. signature: of it.
        names: identifiers and texts in its files: what it can read of arguments and settings.
    """

    name: str
    function: Callable[..., Any]
    signature: Takes
    names: frozenset[str]


def load_recipe(files: Mapping[str, bytes], name: str) -> Recipe:
    """Run a recipe's modules and take its function.

    Args:
        files: "custom_generate/generate.py" -> content; helpers and requirements.txt beside it. They are trusted by the
            caller: whoever vendored them has read them.
        name: for messages.
    Raises: RecipeError if requirements are not met, a file is no Python, a module fails, or there is no `generate`.
    """
    if ENTRY not in files:
        raise RecipeError(f"`{name}` has no {ENTRY}.", fix="A recipe is this file, and helpers beside it.", recipe=name)
    # First: what is not installed explains an import that fails.
    check_requirements(files.get(REQUIREMENTS, b"").decode("utf-8", "replace"), name)
    modules = _Modules(files, name)
    function = getattr(modules.get("generate"), "generate", None)
    if not callable(function):
        raise RecipeError(
            f"`{name}` defines no function `generate`.", why=f"{ENTRY} is run and its `generate` is called.",
            fix="Define def generate(model, input_ids, …, **kwargs).", recipe=name,
        )  # fmt: skip
    return Recipe(name, function, takes(function), modules.names)


class _Modules:
    """The modules of one recipe: a package of a name of its own, each module run when it is first imported."""

    def __init__(self, files: Mapping[str, bytes], name: str) -> None:
        self._files = {
            path.removeprefix(FOLDER + "/").removesuffix(".py"): content
            for path, content in files.items() if path.endswith(".py")
        }  # fmt: skip
        self._name = name
        digest = hashlib.sha256(b"\0".join(k.encode() + b"\0" + files[k] for k in sorted(files))).hexdigest()
        self._package = f"_pluglm_recipe_{digest[:16]}"
        self._trees = {stem: self._parse(stem, source) for stem, source in self._files.items()}
        self.names = frozenset(word for tree in self._trees.values() for word in _words(tree))
        package = ModuleType(self._package)
        package.__path__ = []
        # dataclasses and typing look classes up by their module's name, so these have to be there.
        for known in [known for known in sys.modules if known.partition(".")[0] == self._package]:
            del sys.modules[known]
        sys.modules[self._package] = package
        self._builtins = serving(self._relative)

    def get(self, stem: str) -> ModuleType:
        """A module by its file's name."""
        full = f"{self._package}.{stem}"
        if full in sys.modules:
            return sys.modules[full]
        module = ModuleType(full)
        module.__package__, module.__file__ = self._package, self._path(stem)
        vars(module)["__builtins__"] = self._builtins
        sys.modules[full] = module
        try:
            exec(compile(self._trees[stem], self._path(stem), "exec", dont_inherit=True), vars(module))  # noqa: S102 - what recipes are
        except RecipeError:
            del sys.modules[full]
            raise
        except Exception as e:  # a recipe may fail in any way
            del sys.modules[full]
            raise RecipeError(
                f"{self._path(stem)} failed while it was loaded.", why=f"{type(e).__name__}: {e}",
                fix="Install what it imports, or ask its author.", recipe=self._name,
            ) from e  # fmt: skip
        setattr(sys.modules[self._package], stem, module)
        return module

    def _relative(self, name: str, wanted: Sequence[str]) -> ModuleType:
        """`from .name import …`, or `from . import wanted`."""
        if name in self._files:
            module = self.get(name)
            missing = [word for word in wanted if word != "*" and not hasattr(module, word)]
            if missing:
                raise self._absent(f"{missing[0]} from .{name}", f"{self._path(name)} does not define it.")
            return module
        if name or any(word not in self._files for word in wanted):
            what = f".{name}" if name else f".{next(word for word in wanted if word not in self._files)}"
            raise self._absent(what, f"beside generate.py there is {', '.join(sorted(self._files))}.")
        for word in wanted:
            self.get(word)
        return sys.modules[self._package]

    def _absent(self, what: str, why: str) -> RecipeImportError:
        return RecipeImportError(
            f"the recipe `{self._name}` imports {what}, which is not there.", why=why,
            fix="Vendor all files of its folder; only imports from the same folder exist.", module=what, missing=what,
        )  # fmt: skip

    def _parse(self, stem: str, source: bytes) -> ast.Module:
        path = self._path(stem)
        try:
            text = source.decode("utf-8-sig")
            tree = ast.parse(text, path)
        except (SyntaxError, ValueError) as e:
            raise RecipeError(f"{path} is no Python.", why=str(e), fix="Ask its author.", recipe=self._name) from e
        # So that tracebacks show its lines.
        linecache.cache[path] = (len(text), None, text.splitlines(keepends=True), path)
        return tree

    def _path(self, stem: str) -> str:
        return f"<recipe {self._name}>/{FOLDER}/{stem}.py"


def _words(tree: ast.AST) -> set[str]:
    """Every identifier, and every text that could be one: `kwargs.get("pad_token")`, `config.dola_layers`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        for word in (
            getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None),
            node.value if isinstance(node, ast.Constant) else None,
        ):  # fmt: skip
            if isinstance(word, str) and word.isidentifier():
                found.add(word)
    return found
