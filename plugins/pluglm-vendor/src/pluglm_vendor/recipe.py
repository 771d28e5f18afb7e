"""A recipe: a decoding method as the Hub has it, in the folder `custom_generate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pluglm.errors import InputError
from pluglm.static_filter import ANY
from pluglm.vendored import ENTRY, RECORD, REQUIREMENTS, is_recipe_file, read_recipe
from pluglm_vendor.bundle import PAPER, Bundle, read_papers
from pluglm_vendor.sources import FolderSource, HubSource

INIT = '''\
"""{summary}

Made by `pluglm vendor` from {source}. The recipe lies in `recipe`, its digests in `recipe.json`.
"""

from pluglm import hookimpl


@hookimpl
def pluglm_build_decoding(request):
    """Check the recipe against its digests and make it a strategy."""
    from pluglm_hf.recipes import vendored_strategy

    return vendored_strategy(__name__, request)
'''


@dataclass(frozen=True)
class Recipe(Bundle):
    """What was fetched; `files` are what is run, and requirements.txt. The runtime is of this release's siblings."""

    noun: ClassVar[str] = "recipe"
    long: ClassVar[str] = "decoding method"
    kind: ClassVar[str] = "decoding"
    record_name: ClassVar[str] = RECORD
    place: ClassVar[str] = "recipe"
    runtime: ClassVar[tuple[str, ...]] = ("pluglm>=0.1,<0.2", "pluglm-hf>=0.1,<0.2")
    init: ClassVar[str] = INIT

    @property
    def requirements(self) -> str:
        """Text of requirements.txt, "" if there is none. Raises: InputError if it is not UTF-8."""
        try:
            return self.files.get(REQUIREMENTS, b"").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{REQUIREMENTS} of `{self.repo}` is not UTF-8.", why=str(error), fix="Ask its author to save it so.",
                argument="source",
            ) from error  # fmt: skip

    def facts(self) -> Mapping[str, Any]:
        """A recipe's arguments are its own; what it does not take is refused when it is called."""
        return {"features": [ANY]}

    def use(self, name: str) -> str:
        """In a call, or in `load`."""
        return f"decoding={name!r}"


def fetched_recipe(source: HubSource, content: Mapping[str, bytes], left_out: tuple[str, ...]) -> Recipe | None:
    """The recipe among the files of a commit; None if its entry is not among them."""
    if ENTRY not in content:
        return None
    files = {name: data for name, data in content.items() if is_recipe_file(name)}
    papers = {name: data for name, data in content.items() if PAPER.fullmatch(name)}
    return Recipe(str(source), source.repo, source.revision, files, papers, left_out)


def read_folder(source: FolderSource) -> Recipe:
    """The recipe of a folder. Raises: InputError."""
    files = read_recipe(source.path)
    inside = sorted(path.name for path in (source.path / "custom_generate").iterdir() if path.name != "__pycache__")
    left_out = tuple(name for name in inside if f"custom_generate/{name}" not in files)
    return Recipe(str(source), source.repo, None, files, read_papers(source.path, source.repo), left_out)
