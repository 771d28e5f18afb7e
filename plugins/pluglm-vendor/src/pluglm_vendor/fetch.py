"""Fetches one commit's recipe with the Hub's own client: names and sizes first, then the few files, into memory.

The client's cache keeps files under their own names; a recipe goes to the quarantine instead, which does not.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pluglm.checkpoint.hub import explain_failure
from pluglm.errors import InputError, ModelError, ModelNotFoundError, PluglmError
from pluglm.vendored import MAX_FILE_BYTES, check_names
from pluglm_vendor.quarantine import Quarantine
from pluglm_vendor.recipe import MAX_PAPER_BYTES, PAPER, Recipe, check_papers
from pluglm_vendor.sources import HubSource, not_pinned

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_TIMEOUT_S = 10.0


def fetch(source: HubSource, token: str | None = None, quarantine: Quarantine | None = None) -> Recipe:
    """The recipe of a commit, from the quarantine if it was fetched before.

    Args:
        source: what the user wrote. token: None: the one that the Hub's client has stored.
        quarantine: None: the user's.
    Raises: InputError for anything but a whole commit hash (with the hash, if the Hub can be asked), and for a recipe
        that breaks a rule; ModelError and ModelNotFoundError if the Hub refuses or cannot be reached; SaveError.
    """
    if not source.pinned:
        raise not_pinned(source, _commit_now(source, token), _endpoint())
    quarantine = quarantine or Quarantine(source)
    known = quarantine.load()
    if known is not None:
        return known
    if _offline():
        raise ModelNotFoundError(
            f"{source} was not fetched before.",
            why="HF_HUB_OFFLINE is set, so the Hub is not asked, and the quarantine does not have this commit.",
            fix="Run the same command once with a connection, or vendor a folder.",
            model=source.repo, path=str(quarantine.folder),
        )  # fmt: skip
    try:
        sizes = _listing(source, token)
        names = check_names(source.repo, sizes)
        papers = [name for name in sizes if PAPER.fullmatch(name)]
        check_papers(source.repo, {name: sizes[name] for name in papers})
        content = {name: _download(source, name, token) for name in [*names, *papers]}
    except PluglmError:
        raise
    except Exception as error:
        raise _explained(source, error) from error
    check_names(source.repo, {name: len(content[name]) for name in names})
    others = sorted(n for n in sizes if n.startswith("custom_generate/") and n not in names)
    left_out = tuple(n.removeprefix("custom_generate/") for n in others if "/__pycache__/" not in n)
    return quarantine.store(content, left_out)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or str(constants.ENDPOINT)


def _info(source: HubSource, token: str | None, *, sizes: bool) -> ModelInfo:
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint(), token=token).model_info(
        source.repo, revision=source.revision or None, timeout=_TIMEOUT_S, files_metadata=sizes
    )


def _commit_now(source: HubSource, token: str | None) -> str | None:
    """The commit that a branch, tag or short hash leads to; None if the Hub cannot be asked or does not know it."""
    if _offline():
        return None
    try:
        found = _info(source, token, sizes=False).sha
    except Exception:  # noqa: BLE001 - whatever it is, the reader has another error to read, which says what to do
        return None
    return found if found is not None and HubSource(source.repo, found).pinned else None


def _listing(source: HubSource, token: str | None) -> Mapping[str, int | None]:
    """Name → size in bytes of all files of the commit."""
    info = _info(source, token, sizes=True)
    if info.sha != source.revision:
        raise InputError(
            f"the Hub answered for commit {info.sha}, not for {source.revision}.",
            why="a branch or a tag may bear a name that looks like a commit.",
            fix=f"Look the commit up at {_endpoint()}/{source.repo}/commits/main.",
            argument="source",
        )
    return {file.rfilename: file.size for file in info.siblings or []}


class _Limited(io.BytesIO):
    """Takes at most `limit` bytes, whatever was announced."""

    def __init__(self, name: str, limit: int) -> None:
        super().__init__()
        self._name, self._limit = name, limit

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.tell() + len(data) > self._limit:
            raise InputError(
                f"{self._name} is larger than {self._limit} bytes.",
                why="a recipe is code; the Hub sent more than it had announced.",
                fix="Look at the repository, and at HF_ENDPOINT if that is set.",
                argument="source",
            )
        return super().write(data)


def _download(source: HubSource, name: str, token: str | None) -> bytes:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # documented, not in its __all__

    url = hf_hub_url(source.repo, name, revision=source.revision, endpoint=_endpoint())
    found = get_hf_file_metadata(url, token=token, timeout=_TIMEOUT_S, endpoint=_endpoint())
    if found.commit_hash != source.revision:
        raise InputError(
            f"the Hub answered with {name} of commit {found.commit_hash}, not of {source.revision}.",
            why="the file would not be what the commit names.",
            fix="Try again; look at HF_ENDPOINT if that is set.",
            argument="source",
        )
    target = _Limited(name, MAX_PAPER_BYTES if PAPER.fullmatch(name) else MAX_FILE_BYTES)
    headers = build_hf_headers(token=token)
    http_get(url, target, headers=headers, expected_size=found.size, displayed_filename=name, tqdm_class=_silent())
    return target.getvalue()


def _silent() -> type:
    """A bar that is not drawn: these are a few kilobytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent


def _explained(source: HubSource, error: Exception) -> ModelError:
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{source.repo} has no commit {source.revision}.",
            why="the Hub knows the repository, but not that commit.",
            fix=f"Look it up at {_endpoint()}/{source.repo}/commits/main and copy the whole hash.",
            model=source.repo, path=str(source),
        )  # fmt: skip
    return explain_failure(source.repo, source.revision, error)
