"""The ways in which a plugin is broken, each an edit of the sources of a good one, with what must come of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import border_kit


@dataclass(frozen=True)
class Victim:
    """A good plugin to break.

    Attributes:
        kind, distribution: of it. name: the provider's, in the broken copies: one that `auto` would choose.
    """

    kind: str
    distribution: str
    name: str

    @property
    def hook(self) -> str:
        return f"pluglm_build_{self.kind}"


VICTIMS = {
    "attention": Victim("attention", "acme-attention", "groups"),
    "cache": Victim("cache", "acme-cache", "chunks"),
    "decoding": Victim("decoding", "acme-decoding", "greedy"),  # the other strategies are used only when named
    "quantizer": Victim("quantizer", "acme-quantizer", "rows8"),
}


@dataclass(frozen=True)
class Copy:
    """Sources of one broken plugin: what an edit works on."""

    folder: Path
    victim: Victim

    @property
    def package(self) -> Path:
        (package,) = (self.folder / "src").iterdir()
        return package

    def change(self, old: str, new: str, *, file: str = "__init__.py") -> None:
        """Replace a text that must be there."""
        path = self.folder / file if file == "pyproject.toml" else self.package / file
        text = path.read_text()
        assert old in text, f"{path} has no {old!r}"
        path.write_text(text.replace(old, new))

    def prepend(self, line: str) -> None:
        """A first line of the package."""
        path = self.package / "__init__.py"
        path.write_text(line + "\n" + path.read_text())

    def first_act(self, statement: str) -> None:
        """A first statement of the hook."""
        self.change(f"def {self.victim.hook}(request):\n", f"def {self.victim.hook}(request):\n    {statement}\n")

    def manifest(self, text: Callable[[str], str]) -> None:
        """Change pluglm.json after it was made; the build will not make it again."""
        from pluglm.manifest_build import build_manifest

        path = build_manifest(self.folder)
        path.write_text(text(path.read_text()))
        (self.folder / "keep-manifest").touch()


@dataclass(frozen=True)
class Break:
    """One way to be broken.

    Attributes:
        edit: makes it so.
        error: class of the error for a user who named the plugin. stage: of the quarantine, if it is that.
        words: all of them stand in the message, `{hook}`, `{package}` and `{id}` filled in.
        auto: stands in the plan as the reason why another was chosen.
        doctor: exit code of `pluglm plugins doctor`, which sees what can be seen without an import.
    """

    edit: Callable[[Copy], None]
    error: str
    words: tuple[str, ...]
    auto: str
    stage: str | None = None
    doctor: int = 0


def quarantined(edit: Callable[[Copy], None], stage: str, *words: str) -> Break:
    """One that is set aside: the cause stands in the error and in the plan alike."""
    return Break(edit, "QuarantinedError", words, f"quarantined at {stage}: {words[0]}", stage)


def _swap_mark(copy: Copy) -> None:
    copy.change("@hookimpl\n", "")


def _return(value: str) -> Callable[[Copy], None]:
    return lambda copy: copy.first_act(f"return {value}")


def _target(new: str) -> Callable[[Copy], None]:
    def edit(copy: Copy) -> None:
        package = copy.package.name
        copy.change(f'= "{package}"', f'= "{new.format(package=package)}"', file="pyproject.toml")

    return edit


BREAKS: dict[str, Break] = {
    "import-error": quarantined(
        lambda c: c.prepend("import no_such_module_anywhere"), "import",
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    "syntax-error": quarantined(lambda c: c.prepend("def def"), "import", "SyntaxError: invalid syntax"),
    "exits-at-import": quarantined(lambda c: c.prepend("raise SystemExit(3)"), "import", "SystemExit: 3"),
    "no-object": quarantined(_target("{package}:missing"), "import", "AttributeError: ", "'missing'"),
    "no-module": quarantined(
        _target("{package}.missing"), "import", "ModuleNotFoundError: No module named '{package}.missing'"
    ),
    "wrong-signature": quarantined(
        lambda c: c.change("(request):", "(question):"), "register", "PluginValidationError: ", "question", "{hook}"
    ),
    "default-argument": quarantined(
        lambda c: c.change("(request):", "(request=None):"), "register",
        "TypeError: {hook} has a default for 'request'",
    ),
    "misspelt-hook": quarantined(
        lambda c: c.change("def pluglm_build_", "def pluglm_biuld_"), "register",
        "PluginValidationError: unknown hook 'pluglm_biuld_",
    ),
    "unmarked-hook": quarantined(
        _swap_mark, "register", "TypeError: '{package}' does not implement {hook} ({hook} lacks the @hookimpl mark)"
    ),
    "raises-in-build": quarantined(
        lambda c: c.first_act("raise ZeroDivisionError('no blocks')"), "build", "ZeroDivisionError: no blocks"
    ),
    "exits-in-build": quarantined(lambda c: c.first_act("raise SystemExit"), "build", "SystemExit"),
    "returns-none": quarantined(_return("None"), "contract", "TypeError: {hook} returned None"),
    "returns-dict": quarantined(_return("{}"), "contract", "TypeError: returned dict, which has no name, "),
    "refuses": Break(
        lambda c: c.first_act("raise UnsupportedRequestError('it cannot.', reasons=('too wide', 'too deep'))"),
        "UnsupportedRequestError", ("it cannot.",), "refused: too wide; too deep",
    ),
    "other-api": Break(
        lambda c: c.change('api = ">=', 'api = ">=9.0,>=', file="pyproject.toml"), "IncompatiblePluginError",
        ("needs API >=9.0,", "have {api}", "made for {kind} API {api}"), "needs API >=9.0,", doctor=1,
    ),
    "malformed-manifest": Break(
        lambda c: c.manifest(lambda text: text[:-9]), "ManifestError", ("is malformed", "pluglm.json"),
        "its pluglm.json is not valid", doctor=1,
    ),
    "wrong-facts": Break(
        lambda c: c.manifest(lambda text: text.replace('"summary"', '"sumary"')), "ManifestError",
        ("sumary: there is no such field",), "its pluglm.json is not valid", doctor=1,
    ),
}  # fmt: skip

#: What only some kinds can get wrong.
OWN_BREAKS: dict[str, dict[str, Break]] = {
    "attention": {
        "raises-an-error-of-pluglm": Break(
            lambda c: c.first_act("from pluglm import CacheError; raise CacheError('no room.')"), "CacheError",
            ("no room.",), "failed: CacheError: no room.",
        ),
        "views-none": quarantined(
            lambda c: c.change('views = ("dense",)', "views = None", file="groups.py"), "contract",
            "TypeError: GroupsAttention.views is None; it should be a tuple of str",
        ),
        "attend-missing": quarantined(
            lambda c: c.change("def attend(", "def attent(", file="groups.py"), "contract",
            "TypeError: returned GroupsAttention, which has no attend",
        ),
        "refusals-raises": quarantined(
            lambda c: c.change("        return refusals(spec)", "        return 1 // 0", file="groups.py"), "contract",
            "ZeroDivisionError: ",
        ),
    },
    "cache": {
        "new-is-no-method": quarantined(
            lambda c: c.change("    def new(self, *,", "    new = 3\n    def other(self, *,", file="chunks.py"),
            "contract", "TypeError: ChunksLayout.new is 3; it should be callable",
        ),
    },
    "decoding": {
        "fields-a-list": quarantined(
            lambda c: c.change('fields = frozenset({"max_new_tokens"})', 'fields = ["max_new_tokens"]', file="banned.py"),
            "contract", "TypeError: Banned.fields is ['max_new_tokens']; it should be a set of str",
        ),
    },
}  # fmt: skip


def breaks_of(kind: str) -> dict[str, Break]:
    """All ways for one kind."""
    return {**BREAKS, **OWN_BREAKS.get(kind, {})}


def make(kind: str, name: str, place: Path) -> Path:
    """Sources of a broken plugin: a distribution and a package of its own, which `auto` would try first."""
    victim = VICTIMS[kind]
    folder = border_kit.sources(victim.distribution, place / f"{kind}-{name}")
    old, new = victim.distribution, f"{victim.distribution}-{name}"
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            text = path.read_text().replace(old, new).replace(old.replace("-", "_"), new.replace("-", "_"))
            path.write_text(text.replace('tier = "reference"', 'tier = "tuned"').replace("banned = ", "greedy = "))
    pyproject = folder / "pyproject.toml"
    pyproject.write_text(re.sub('name = "banned"', 'name = "greedy"', pyproject.read_text()))
    (folder / "src" / old.replace("-", "_")).rename(folder / "src" / new.replace("-", "_"))
    breaks_of(kind)[name].edit(Copy(folder, victim))
    return folder


def provider_id(kind: str, name: str) -> str:
    """Of the provider that `make` made."""
    victim = VICTIMS[kind]
    return f"{victim.distribution}-{name}:{kind}/{victim.name}"
