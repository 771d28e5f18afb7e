"""From what a user types to a local folder: a folder that exists, or a model on the Hub through its own client.

Only data is fetched: weights as safetensors, JSON, tokenizer and template files of the repository's top level. What the
Hub lists is checked before the first download, so a repository that could not be loaded costs no bandwidth.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path
from typing import Any

from pluglm.checkpoint.progress import wanted
from pluglm.errors import CheckpointError, InputError, ModelError, ModelNotFoundError

_log = logging.getLogger(__name__)
_ALLOW = ["*.safetensors", "*.json", "tokenizer.model", "*.jinja", "*.txt"]
# Sub-folders hold other formats of the same weights; consolidated*.safetensors is a second copy under other names.
_IGNORE = ["*/*", "consolidated*.safetensors", "*.py", "*.bin"]
_REPO = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*|[A-Za-z0-9][\w.\-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LIST_TIMEOUT_S = 10.0


def resolve(
    model: str,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    endpoint: str | None = None,
    progress: bool | None = None,
) -> Path:
    """The local folder of a model.

    Args:
        model: a folder, or `org/name` on the Hub. An existing folder wins; what looks like a path is never looked up.
        revision: branch, tag or commit on the Hub; None: its main branch.
        offline: True: use the Hub client's cache only. None: as HF_HUB_OFFLINE says.
        token: access token; None: the one the Hub client has stored.
        cache_dir: None: the Hub client's own cache.
        endpoint: address of the Hub; None: as HF_ENDPOINT says.
        progress: show the client's bars; None: on a terminal, unless PLUGLM_PROGRESS=0.
    Raises: InputError for a name that cannot be one, ModelNotFoundError if there is no such model, revision or cached
    copy, CheckpointError if the repository has no safetensors, ModelError if the Hub refuses or cannot be reached.
    """
    if not model.strip() or "\0" in model:
        raise InputError(
            f"{model!r} is not a model.",
            why="Expected the path of a folder or `org/name`, found an empty or unusable text.",
            fix='For example load("./my-model") or load("org/name").',
            argument="model",
        )
    folder, kind = _local(model)
    if kind == "folder":
        return folder.resolve()
    if kind == "file" or _looks_like_a_path(model):
        raise ModelNotFoundError(
            f'There is no model folder "{model}".',
            why="It is written like a path, so the Hub was not asked; "
            + ("it is a file, not a folder." if kind == "file" else "no such folder exists."),
            fix="Check the spelling and the working directory, or give `org/name` for a model on the Hub.",
            model=model,
            path=str(folder),
        )
    if not _REPO.fullmatch(model) or ".." in model or "--" in model:
        raise InputError(
            f"{model!r} is neither a folder nor the name of a model on the Hub.",
            why="Expected `org/name` of letters, digits, '-', '_' and '.', without '..' and '--'.",
            fix="Check the spelling; write a local folder as ./folder.",
            argument="model",
        )
    if offline is None:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return _from_hub(model, revision, offline, token, cache_dir, endpoint, wanted() if progress is None else progress)


def _local(model: str) -> tuple[Path, str]:
    """The path that the text would be, and what is there: "folder", "file" or ""."""
    folder = Path(model)
    try:
        folder = folder.expanduser()
        return folder, "folder" if folder.is_dir() else "file" if folder.exists() else ""
    except (OSError, RuntimeError):  # a name too long for the system, a home that is unknown
        return folder, ""


def _looks_like_a_path(model: str) -> bool:
    return model[0] in "./~\\" or model.count("/") + model.count("\\") > 1 or bool(re.match(r"[A-Za-z]:", model))


def _from_hub(
    model: str,
    revision: str | None,
    offline: bool,
    token: str | None,
    cache_dir: str | Path | None,
    endpoint: str | None,
    progress: bool,
) -> Path:
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "allow_patterns": _ALLOW,
        "ignore_patterns": _IGNORE,
        "endpoint": endpoint,
        "token": token,
    }
    if offline or (revision is not None and _COMMIT.fullmatch(revision)):
        # A commit never changes: if all of it is here, the Hub has nothing to add.
        try:
            return Path(snapshot_download(model, local_files_only=True, **options))
        except (OSError, ValueError) as e:  # not there, not complete, not readable
            if offline:
                raise _not_cached(model, revision, e) from e
    try:
        _check_listing(model, revision, token, endpoint)
    except ModelError:
        raise
    except Exception as e:  # noqa: BLE001 - every cause is kept, and explained or replaced by the cached copy
        return _cached_instead(model, options, e)
    try:
        return Path(snapshot_download(model, tqdm_class=_bars(progress), **options))
    except Exception as e:
        raise explain_failure(model, revision, e) from e


def _check_listing(model: str, revision: str | None, token: str | None, endpoint: str | None) -> None:
    """One request, without the client's retries: does the model exist, is it open to us, has it what we read?"""
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint, token=token).model_info(model, revision=revision, timeout=_LIST_TIMEOUT_S)
    names = [file.rfilename for file in info.siblings or []]
    if any(name.endswith(".safetensors") and "/" not in name for name in names):
        return
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    ggufs = [name for name in names if name.endswith(".gguf")]
    raise CheckpointError(
        f'The model "{model}" has no safetensors weights; nothing was downloaded.',
        why="Expected *.safetensors at the top of the repository, found "
        + (
            f"pickled weights ({pickles[0]}), which can run any code of their author."
            if pickles
            else f"{ggufs[0] if ggufs else 'none of the known kinds'} among {len(names)} files."
        ),
        fix="Look for a converted copy of the model (many repositories keep one as a pull request: "
        'revision="refs/pr/N"), or convert it in a sandbox you trust.'
        if pickles or not ggufs
        else "Install a plugin of kind `format` that reads GGUF, or look for the safetensors original.",
        path=model,
        tensor=None,
    )


def _cached_instead(model: str, options: dict[str, Any], cause: Exception) -> Path:
    """The cached copy when the Hub does not answer, with a warning; an answer such as "not found" stays an error."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    error = explain_failure(model, options["revision"], cause)
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code < 500:
        raise error from cause
    try:
        folder = Path(snapshot_download(model, local_files_only=True, **options))
    except (OSError, ValueError):  # whatever is wrong with the cache, the network is what the reader must know
        raise error from cause
    _log.warning('The Hub did not answer (%s); "%s" is used as cached at %s.', _one_line(cause), model, folder.name)
    return folder


def explain_failure(model: str, revision: str | None, cause: Exception) -> ModelError:
    """The client's exception as one of ours. Its chain is searched, because the client wraps network errors."""
    from huggingface_hub import errors

    chain: list[BaseException] = []
    link: BaseException | None = cause
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    status = next((c.response.status_code for c in chain if isinstance(c, errors.HfHubHTTPError)), None)
    names = {base.__name__ for c in chain for base in type(c).__mro__}  # the HTTP library differs between releases
    full = next((c for c in chain if isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EDQUOT)), None)
    data = {"path": model, "model": model}
    if full is not None:
        return ModelError(
            f'The model "{model}" could not be stored.',
            why=f"The disk is full ({full.filename or full.strerror}).",
            fix="Free some space, or choose another disk with cache_dir= or HF_HOME. Complete files are kept.",
            **data,
        )
    if any(isinstance(c, errors.GatedRepoError) for c in chain) or status == 403:
        return ModelError(
            f'The model "{model}" is gated.',
            why=f"The Hub knows it but does not let this account read it: {_one_line(cause)}",
            fix="Accept its conditions on its page with your account, then give token= or run `hf auth login`.",
            **data,
        )
    if any(isinstance(c, errors.RevisionNotFoundError) for c in chain):
        return ModelNotFoundError(
            f'The model "{model}" has no revision "{revision}".',
            why="The Hub knows the model, but no branch, tag or commit of that name.",
            fix="Leave revision out for the main branch, or look its branches and tags up on its page.",
            **data,
        )
    if any(isinstance(c, errors.RepositoryNotFoundError) for c in chain) or status in (401, 404):
        return ModelNotFoundError(
            f'There is no model "{model}" on the Hub, or it is private.',
            why=f"The Hub answered {status or 'not found'}; it tells them apart for a token that may read it.",
            fix="Check the spelling (a folder is ./folder); for a private model give token= or run `hf auth login`.",
            **data,
        )
    if "OfflineModeIsEnabled" in names:
        return _not_cached(model, revision, cause)
    if status is not None:
        return ModelError(
            f'The model "{model}" could not be fetched.',
            why=f"The Hub answered with status {status}: {_one_line(cause)}",
            fix="Try again later; with a cached copy, offline=True does not ask the Hub.",
            **data,
        )
    if names & {"TransportError", "ConnectionError", "Timeout", "TimeoutException", "TimeoutError"}:
        return ModelError(
            f'The Hub cannot be reached for "{model}".',
            why=f"No network, or no way through it: {_one_line(chain[-1])}.",
            fix="Check connection, proxy and HF_ENDPOINT; use offline=True with a cached copy, or give a local folder.",
            **data,
        )
    return ModelError(
        f'The model "{model}" could not be downloaded.',
        why=f"{_one_line(cause)}. No incomplete file was kept under its final name.",
        fix="Try again; complete files will not be fetched again. If it persists, check HF_ENDPOINT and the proxy.",
        **data,
    )


def _not_cached(model: str, revision: str | None, cause: Exception) -> ModelNotFoundError:
    return ModelNotFoundError(
        f'The model "{model}" is not in the local cache (revision {revision or "main"}).',
        why=f"Offline (offline=True or HF_HUB_OFFLINE), so only the cache was searched: {_one_line(cause)}.",
        fix="Load it once with a connection and offline=False, set cache_dir= or HF_HOME, or give a folder.",
        path=model,
        model=model,
    )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}".rstrip(":. ")


def _bars(shown: bool) -> Any:
    """The class of bar the client is to draw with: its own, or its own kept silent."""
    from huggingface_hub.utils.tqdm import tqdm

    if shown:
        return tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return Silent
