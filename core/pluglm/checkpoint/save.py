"""Writing a checkpoint so that a reader finds the old one or the new one, complete, whatever happens in between.

Everything is written to a hidden folder beside the target, flushed to the disk, and renamed into place. On Linux the
old and the new folder are exchanged in one step (renameat2); elsewhere the old one is renamed away first and put back
if the second rename fails. Tensors mapped from the old files stay valid: their bytes go when the last mapping does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fnmatch
import glob
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pluglm.checkpoint.shards import INDEX, SINGLE
from pluglm.errors import SaveError

if TYPE_CHECKING:
    import torch

# What a checkpoint folder may hold for us to replace it. Anything else in it belongs to the user.
_OURS = (
    "config.json", "generation_config.json", "model*.safetensors", INDEX,
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "quantization_config.json", "pluglm*.json",
)  # fmt: skip


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `path` when the block ends without an error.

    An existing target is replaced only if it is empty or holds nothing but a checkpoint. If anything fails,
    KeyboardInterrupt included, the new folder is removed and the target is as it was.

    Raises: SaveError with `.path` for what the file system refuses; what the block itself raises passes through.
    """
    target = Path(path).expanduser().absolute()
    with _as_save_error(target):
        if target.is_symlink():
            target = target.resolve()
        _check_target(target)
        created = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        work = target.parent / f"{_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with _as_save_error(target, work):
            work.mkdir()
            yield work
            _sync(work)
            _check_target(target)  # again: it may have been filled while we wrote
            _put_in_place(work, target)
            _sync_one(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # the new folder after a failure, the old one after an exchange
        if not target.exists():
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def write_safetensors(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> list[str]:
    """Write tensors as `model.safetensors`, or as shards with an index if they are more than `max_shard_bytes`.

    At most one shard is held at a time. Tensors that share memory are the caller's to leave out (a tied head).

    Args:
        tensors: names and values; values may lie on any device and need not be contiguous.
        metadata: text entries for each file's header; None: {"format": "pt"}, which Transformers wants to see.
    Returns: the names of the weight files.
    Raises: SaveError with `.path`.
    """
    metadata = dict(metadata) if metadata is not None else {"format": "pt"}
    shard: dict[str, torch.Tensor] = {}
    parts: list[list[str]] = []
    seen: set[str] = set()
    shard_bytes = total_bytes = 0
    for name, tensor in tensors:
        if name in seen:
            raise SaveError(
                f"Two tensors are called {name!r}.",
                why="A checkpoint has one tensor of each name.",
                fix="Leave one of them out, or give it another name.",
                path=str(folder),
            )
        seen.add(name)
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            parts.append(_write_shard(folder, shard, metadata, len(parts)))
            shard, shard_bytes = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    parts.append(_write_shard(folder, shard, metadata, len(parts)))
    with _as_save_error(folder):
        return _name_shards(folder, parts, total_bytes)


def _write_shard(folder: Path, shard: dict[str, torch.Tensor], metadata: dict[str, str], number: int) -> list[str]:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(shard, folder / _part(number), metadata=metadata)
    except (SafetensorError, OSError) as e:
        raise _refused(folder, str(e)) from e
    except RuntimeError as e:  # tensors that share memory
        raise SaveError(
            "The tensors cannot be written as they are.",
            why=" ".join(str(e).split())[:300],
            fix="Leave out tied tensors, or clone them first.",
            path=str(folder),
        ) from e
    return list(shard)


def _name_shards(folder: Path, parts: list[list[str]], total_bytes: int) -> list[str]:
    if len(parts) == 1:
        (folder / _part(0)).rename(folder / SINGLE)
        return [SINGLE]
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    weight_map = {}
    for number, (name, part) in enumerate(zip(names, parts, strict=True)):
        (folder / _part(number)).rename(folder / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    # Last, because it makes a model of the shards.
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def _part(number: int) -> str:
    return f"model-part-{number:05d}.safetensors"


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise _not_replaced(target, "it is a file")
    names = sorted(child.name + ("/" if child.is_dir() else "") for child in target.iterdir())
    strangers = [name for name in names if not any(fnmatch.fnmatchcase(name, ours) for ours in _OURS)]
    if strangers:
        raise _not_replaced(target, f"it holds what is no part of a checkpoint: {', '.join(strangers[:5])}")
    if names and "config.json" not in names:
        raise _not_replaced(target, "it is not empty and has no config.json")


def _not_replaced(target: Path, found: str) -> SaveError:
    return SaveError(
        f'"{target}" is not replaced; nothing was written.',
        why=f"Expected no such folder, an empty one, or a checkpoint and nothing else; {found}.",
        fix="Save to another folder, or move those files away first.",
        path=str(target),
    )


def _prefix(target: Path) -> str:
    host = "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:32]
    return f".{target.name}.saving-{host}-"


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this host left for this target; without a target they may be all there is."""
    if not target.exists():
        return
    for left in target.parent.glob(glob.escape(_prefix(target)) + "*"):
        pid = left.name.removeprefix(_prefix(target)).split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync(folder: Path) -> None:
    for child in sorted(folder.rglob("*")):
        _sync_one(child)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot flush a folder
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(work: Path, target: Path) -> None:
    """`work` becomes `target`; afterwards `work` is gone or holds the old content, which the caller removes."""
    if not target.exists():
        work.rename(target)
        return
    if _exchange(work, target):
        return
    old = work.with_name(work.name + "-old")
    target.rename(old)
    try:
        work.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step. False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fs.h
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), ctypes.c_uint(exchange)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextlib.contextmanager
def _as_save_error(target: Path, work: Path | None = None) -> Iterator[None]:
    """OSError becomes SaveError; one that names the hidden folder is made to name the target."""
    try:
        yield
    except OSError as e:
        raise _refused(target, e.strerror or str(e), e.errno) from e
    except SaveError as e:
        if work is None or e.data.get("path") != str(work):
            raise
        raise SaveError(e.what.replace(str(work), str(target)), why=e.why, fix=e.fix, path=str(target)) from e


def _refused(target: Path, why: str, code: int | None = None) -> SaveError:
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in why
    denied = code in (errno.EACCES, errno.EPERM, errno.EROFS)
    if full:
        fix = "Free some space on that disk, or save to another one."
    elif denied:
        fix = "Choose a folder you may write to, or change its permissions."
    else:
        fix = "Check the disk and the folder, or save to another one."
    return SaveError(
        f'Saving to "{target}" failed; what was there before is intact.', why=why, fix=fix, path=str(target)
    )
