"""Source `pystdlib`: a small language model of Python source that lives in this package."""

from __future__ import annotations

from pathlib import Path

from pluglm import InputError, hookimpl
from pluglm.contracts import Source, SourceRequest

CHECKPOINT = Path(__file__).parent / "checkpoint"
#: By name: the model, and the small one that guesses for it (`decoding="assisted"`).
FOLDERS = {"pystdlib": CHECKPOINT, "pystdlib-draft": CHECKPOINT.parent / "draft"}


class PackagedModel:
    """Answers to two names, with the folders inside this package."""

    def __init__(self, name: str) -> None:
        self.name = name

    def resolve(self, request: SourceRequest) -> Path | None:
        """The folder, for one of `FOLDERS`; None for any other name. Raises InputError if a revision is asked for."""
        if request.model not in FOLDERS:
            return None
        if request.revision is not None:
            raise InputError(
                f"{request.model} has no revision {request.revision!r}.", why="the model is part of this package.",
                fix="Leave revision out, or install another version of pluglm-model-pystdlib.", argument="revision",
            )  # fmt: skip
        return FOLDERS[request.model]


@hookimpl
def pluglm_build_source(request: SourceRequest) -> Source:
    """The package is the source; what is asked for is looked at in `resolve`."""
    return PackagedModel(request.model)


def held_out() -> dict[str, str]:
    """The source files that the model was never trained on, by path: what quality is measured with."""
    import json

    text = (CHECKPOINT.parent / "heldout.json").read_text(encoding="utf-8")
    files: dict[str, str] = json.loads(text)
    return files
