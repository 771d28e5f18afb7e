"""Writes a new plugin from templates: a package that builds, installs and passes the conformance kit as it stands.

A template is a folder of files that end in `.tmpl`; `$name`, `$package` and the like are filled in. Files of `common`
are part of every kind's plugin, and `facts.toml` goes into the pyproject.toml.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from pluglm.errors import InputError, SaveError
from pluglm.kinds import KINDS

_TEMPLATES = Path(__file__).parent / "templates"
_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def kinds() -> tuple[str, ...]:
    """The kinds there is a template for."""
    return tuple(kind for kind in KINDS if (_TEMPLATES / kind).is_dir())


@dataclass(frozen=True)
class Scaffold:
    """One plugin to be written.

    Attributes:
        kind: one of `kinds()`. name: what users will type: lower-case words and digits with hyphens between them.
    Raises: InputError if either is of no use.
    """

    kind: str
    name: str

    def __post_init__(self) -> None:
        if self.kind not in kinds():
            known = "" if self.kind in KINDS else f", and pluglm has no such kind (it has {', '.join(KINDS)})"
            raise InputError(
                f"there is no template for a plugin of kind {self.kind!r}{known}.",
                fix=f"There are templates for {', '.join(kinds())}. For another kind start from one of these, or from "
                "a first-party plugin of that kind; docs/reference has the hooks.",
                argument="kind",
            )
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"{self.name!r} cannot name a plugin.",
                why="the name becomes part of a distribution, of a package and of what users type.",
                fix='Write lower-case letters and digits, with hyphens between words, such as "my-attention".',
                argument="name",
            )

    @property
    def distribution(self) -> str:
        """As it will be installed."""
        return f"pluglm-{self.kind}-{self.name}"

    @property
    def package(self) -> str:
        """As it will be imported."""
        return self.distribution.replace("-", "_")

    def values(self) -> dict[str, str]:
        """What the templates may use."""
        kind = KINDS[self.kind]
        major = int(kind.version.partition(".")[0])
        return {
            "kind": self.kind, "name": self.name, "distribution": self.distribution, "package": self.package,
            "class_name": "".join(word.capitalize() for word in self.name.split("-")),
            "module": self.kind, "group": kind.group, "api": f">={kind.version},<{major + 1}",
        }  # fmt: skip

    def files(self) -> Iterator[tuple[Path, str]]:
        """Relative path and text of every file but the manifest."""
        values = self.values()
        values["facts"] = _filled(_TEMPLATES / self.kind / "facts.toml.tmpl", values).strip()
        for root in (_TEMPLATES / "common", _TEMPLATES / self.kind):
            for path in sorted(root.rglob("*.tmpl")):
                if path.name != "facts.toml.tmpl":
                    place = str(path.relative_to(root)).removesuffix(".tmpl").replace("package", self.package)
                    yield Path(place), _filled(path, values)

    def write(self, folder: Path) -> Path:
        """Write the plugin, whole or not at all. Returns the folder.

        Raises: SaveError if the folder holds anything, or cannot be written.
        """
        from pluglm.manifest_build import build_manifest

        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise SaveError(
                    f"{folder} exists and is not an empty folder; nothing was written.",
                    why="a plugin is written into a folder of its own, and nothing is ever overwritten.",
                    fix="Name another one with --path, or move it away.",
                    path=str(folder),
                )
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
                draft = Path(place) / "draft"
                for path, text in self.files():
                    (draft / path).parent.mkdir(parents=True, exist_ok=True)
                    (draft / path).write_text(text, "utf-8")
                build_manifest(draft)
                if folder.is_dir():
                    folder.rmdir()
                shutil.move(draft, folder)
        except OSError as error:
            raise SaveError(
                f"{folder} was not written.", why=str(error), fix="Name another place with --path.", path=str(folder)
            ) from error
        return folder


def _filled(path: Path, values: dict[str, str]) -> str:
    return Template(path.read_text("utf-8")).substitute(values)
