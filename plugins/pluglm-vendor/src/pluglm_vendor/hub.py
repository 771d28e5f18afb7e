"""Asks the Hub with its own client: which files a commit has, and their bytes, into memory.

The client's cache keeps files under their own names; what is fetched here goes to the quarantine, which does not.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping

from pluglm.checkpoint.hub import explain_failure
from pluglm.errors import InputError, ModelError, ModelNotFoundError
from pluglm_vendor.sources import HubSource

_TIMEOUT_S = 10.0


def offline() -> bool:
    """Whether the user has said that the Hub is not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """Address of the Hub."""
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or str(constants.ENDPOINT)


def commit_now(source: HubSource, token: str | None, *, kernel: bool = False) -> str | None:
    """The commit that a branch, tag or short hash leads to; None if the Hub cannot be asked or does not know it.

    Args:
        kernel: look for a repository of kernels, of either type.
    """
    if offline():
        return None
    for repo_type in _types() if kernel else (None,):
        try:
            found = _commit(source, token, repo_type)
        except Exception:  # noqa: BLE001, S112 - whatever it is, the reader has another error, which says what to do
            continue
        return found if found is not None and HubSource(source.repo, found).pinned else None
    return None


def listing(source: HubSource, token: str | None) -> Mapping[str, int | None]:
    """Name → size in bytes of all files of the commit."""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint(), token=token).model_info(
        source.repo, revision=source.revision, timeout=_TIMEOUT_S, files_metadata=True
    )
    _check_commit(source, info.sha)
    return {file.rfilename: file.size for file in info.siblings or []}


def kernel_listing(source: HubSource, token: str | None) -> tuple[str | None, dict[str, int | None]]:
    """The Hub's type of a repository of kernels, and name → size in bytes of all files of the commit.

    Such repositories have a type of their own since 2026; older ones are models.

    Raises: InputError if the Hub answers for another commit; what its client raises.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    types = _types()
    for repo_type in types:
        try:
            _check_commit(source, _commit(source, token, repo_type))
        except RepositoryNotFoundError:
            if repo_type == types[-1]:
                raise
            continue
        tree = HfApi(endpoint=endpoint(), token=token).list_repo_tree(
            source.repo, recursive=True, revision=source.revision, repo_type=repo_type
        )
        return repo_type, {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    raise AssertionError("there is always a type to ask for")


def _types() -> tuple[str | None, ...]:
    """The types that a repository of kernels may have; clients before 1.0 do not know its own."""
    from huggingface_hub import constants

    return ("kernel", None) if "kernel" in getattr(constants, "REPO_TYPES_WITH_KERNEL", ()) else (None,)


def _commit(source: HubSource, token: str | None, repo_type: str | None) -> str | None:
    from huggingface_hub import HfApi

    return (
        HfApi(endpoint=endpoint(), token=token)
        .repo_info(source.repo, revision=source.revision or None, repo_type=repo_type, timeout=_TIMEOUT_S)
        .sha
    )


def _check_commit(source: HubSource, found: str | None) -> None:
    if found != source.revision:
        raise InputError(
            f"the Hub answered for commit {found}, not for {source.revision}.",
            why="a branch or a tag may bear a name that looks like a commit.",
            fix=f"Look the commit up at {endpoint()}/{source.repo}/commits/main.",
            argument="source",
        )


class _Limited(io.BytesIO):
    """Takes at most `limit` bytes, whatever was announced."""

    def __init__(self, name: str, limit: int) -> None:
        super().__init__()
        self._name, self._limit = name, limit

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.tell() + len(data) > self._limit:
            raise InputError(
                f"{self._name} is larger than {self._limit} bytes.",
                why="the Hub sent more than it had announced.",
                fix="Look at the repository, and at HF_ENDPOINT if that is set.",
                argument="source",
            )
        return super().write(data)


def download(source: HubSource, name: str, token: str | None, limit: int, repo_type: str | None = None) -> bytes:
    """The content of a file of the commit, at most `limit` bytes. Raises: InputError; what the Hub's client raises."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # documented, not in its __all__

    url = hf_hub_url(source.repo, name, repo_type=repo_type, revision=source.revision, endpoint=endpoint())
    found = get_hf_file_metadata(url, token=token, timeout=_TIMEOUT_S, endpoint=endpoint())
    if found.commit_hash != source.revision:
        raise InputError(
            f"the Hub answered with {name} of commit {found.commit_hash}, not of {source.revision}.",
            why="the file would not be what the commit names.",
            fix="Try again; look at HF_ENDPOINT if that is set.",
            argument="source",
        )
    target = _Limited(name, limit)
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


def explained(source: HubSource, error: Exception) -> ModelError:
    """The typed error for what the Hub's client raised."""
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(
            f"{source.repo} has no commit {source.revision}.",
            why="the Hub knows the repository, but not that commit.",
            fix=f"Look it up at {endpoint()}/{source.repo}/commits/main and copy the whole hash.",
            model=source.repo, path=str(source),
        )  # fmt: skip
    return explain_failure(source.repo, source.revision, error)
