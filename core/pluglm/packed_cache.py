"""Packed weights that a load keeps for the next one: packing may take minutes, mapping what it gave takes none.

An entry is a checkpoint folder as `LanguageModel.save` writes it, and a record of its files. Its name is a digest of
all that decides what is in it: the bytes of the plain weights, the quantizer with its version and settings, the
architecture, the dtype. What was kept of the same folder with the same settings before its weights changed is removed.

The bytes of the weights are hashed whole, once; the hash is used again as long as the file has the identity it had
then, time of change (which nobody can set) included. Files of an entry are hashed when they are written, and again if
their size or time is another: what is damaged, cut short or written to is made anew, with a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluglm.build import LoadContext, Parts, build, build_module, skipped
from pluglm.checkpoint import Checkpoint, atomic_folder, open_folder
from pluglm.checkpoint.save import remove_leftovers
from pluglm.contracts.quantizer import Quantizer, QuantizerRequest
from pluglm.errors import CheckpointError, InputError, PluglmError
from pluglm.index import cache_directory
from pluglm.manager import Manager
from pluglm.plan import Plan
from pluglm.saving import write_model

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("pluglm")
SCHEMA = 1
RECORD = "pluglm-packed.json"
#: A file this young could change again within one tick of the clock that its time is taken from.
_FRESH_NS = 2_000_000_000


def build_packed(manager: Manager, plan: Plan, context: LoadContext, parts: Parts) -> tuple[str, Parts, nn.Module]:
    """As `build_module`, for a plan whose quantizer packs: from packed weights that are kept, or keeping them.

    Args:
        context: its checkpoint is one that `check_cacheable` has let pass.
    Returns: a note for the plan, the parts with the quantizer that packed or read the weights, and the module.
    """
    assert parts.quantizer is not None
    assert isinstance(context.checkpoint, Checkpoint)
    place = Path(cache_directory()) / "packed"
    settings = _settings(plan, context, parts.quantizer)
    entry = Entry(place, settings, weights_digest(context.checkpoint, place / "digests"))
    if (kept := entry.open()) is not None:
        there = replace(context, checkpoint=kept)
        try:
            unpacker: Quantizer = build(manager, plan["quantizer"], "pluglm_build_quantizer", request=QuantizerRequest(
                context.device, context.dtype, config=kept.config["quantization_config"],
                skip=skipped(plan["quantizer"]),
            ))  # fmt: skip
            module = build_module(manager, plan, there, replace(parts, quantizer=unpacker))
            note = f"packed weights: those that an earlier load kept in {entry.path}"
            return note, replace(parts, quantizer=unpacker), module
        except PluglmError as e:
            entry.reject(f"{e.what} {e.why}")
    module = build_module(manager, plan, context, parts)
    done = "kept for later loads" if entry.keep(module, context, parts.quantizer) else "could not be kept"
    return f"packed weights: {done} in {entry.path}", parts, module


def check_cacheable(checkpoint: object, config: Mapping[str, Any], quantizer: str | None) -> None:
    """Raises InputError unless there is something to keep: plain weights of safetensors files, and a quantizer."""
    fix = "Leave packed_cache out."
    if "quantization_config" in config:
        why = "the checkpoint is packed already, and mapped as it is."
    elif quantizer is None:
        why, fix = "no quantizer is named.", 'Name one, such as quantizer="native:int4", or leave packed_cache out.'
    elif not isinstance(checkpoint, Checkpoint):
        why = "a plugin reads the checkpoint's format, and only safetensors files can be told apart."
    else:
        return
    raise InputError("packed_cache=True has nothing to keep.", why=why, fix=fix, argument="packed_cache")


def _settings(plan: Plan, context: LoadContext, quantizer: Quantizer) -> dict[str, Any]:
    """What decides the packed tensors besides the plain ones. The quantizer's own config has its defaults, too."""
    choices = [plan["architecture"], plan["quantizer"]]
    return {
        "schema": SCHEMA, "dtype": context.dtype, "device": context.device.partition(":")[0],
        "parts": [[c.provider, c.version, c.variant, repr(c.options)] for c in choices],
        "config": quantizer.config(),
    }  # fmt: skip


class Entry:
    """Packed weights of one checkpoint and one way of packing. path: the folder that holds them, or will."""

    def __init__(self, place: Path, settings: Mapping[str, Any], weights: str) -> None:
        self._settings = json.dumps(settings, sort_keys=True, default=repr)
        digest = hashlib.sha256(f"{self._settings}\n{weights}".encode()).hexdigest()
        self.path = place / digest[:40]

    def open(self) -> Checkpoint | None:
        """The packed checkpoint if it is there, whole and as it was written; what is not is removed."""
        if not self.path.exists():
            return None
        try:
            self._check()
            return open_folder(self.path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:  # a record that is none
            self.reject(f"{type(e).__name__}: {e}")
        except PluglmError as e:
            self.reject(f"{e.what} {e.why}")
        return None

    def reject(self, why: str) -> None:
        """Remove what is kept, with a word about it. Processes that have mapped it go on."""
        log.warning("the packed weights in %s are not used and will be packed anew: %s", self.path, why)
        _remove(self.path)

    def _check(self) -> None:
        """Raises unless every file has the size and time, or else the bytes, that it was written with."""
        record = json.loads((self.path / RECORD).read_bytes())
        for name, (size, mtime_ns, digest) in record["files"].items():
            file = self.path / Path(name).name
            found = file.stat()
            if found.st_size == size and found.st_mtime_ns == mtime_ns:
                continue
            if found.st_size != size or _hashed(file) != digest:
                raise CheckpointError(
                    f"{file} is not as it was written.", why=f"it has {found.st_size:,} bytes and had {size:,}.",
                    fix="Nothing: it is made anew.", path=str(file), tensor=None,
                )  # fmt: skip
            with contextlib.suppress(OSError):  # copied, but whole: with its time back it need not be read again
                os.utime(file, ns=(found.st_atime_ns, mtime_ns))

    def keep(self, module: nn.Module, context: LoadContext, quantizer: Quantizer) -> bool:
        """Write the packed weights, whole or not at all. False, with a warning, if that was refused.

        The model is loaded by then: a full disk costs the next load its time, never this one its work.
        """
        source = str(context.checkpoint.path)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, PluglmError):
            self._check()
            return True  # another process was faster; one that has just opened it need not find it exchanged
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic_folder(self.path) as folder:
                write_model(folder, module, context, quantizer)
                files = {file.name: [*_size_and_time(file), _hashed(file)] for file in folder.iterdir()}
                record = {"source": source, "settings": self._settings, "files": files}
                (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        except (PluglmError, OSError) as e:
            log.warning("the packed weights of %s are not kept: %s", source, " ".join(str(e).split()))
            return False
        remove_leftovers(self.path)
        self._remove_older(source)
        return True

    def _remove_older(self, source: str) -> None:
        """What was kept of this folder, packed in the same way, before its weights changed."""
        for record in self.path.parent.glob(f"*/{RECORD}"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                said = json.loads(record.read_bytes())
                same = (said["source"], said["settings"]) == (source, self._settings)
                if same and record.parent != self.path and not record.parent.name.startswith("."):
                    _remove(record.parent)


def weights_digest(checkpoint: Checkpoint, place: Path) -> str:
    """sha256 over config.json, the headers and every byte of the weights.

    Args:
        place: where hashes are kept, one file for each checkpoint folder.
    """
    kept_at = place / f"{hashlib.sha256(os.fsencode(checkpoint.path)).hexdigest()[:40]}.json"
    try:
        known = json.loads(kept_at.read_bytes())
    except (OSError, ValueError):
        known = {}
    digests, settled = {}, True
    for shard in checkpoint.shards:
        file = checkpoint.path / shard
        identity = _identity(file)
        remembered = known.get(shard) if isinstance(known, dict) else None
        if isinstance(remembered, list) and remembered[:-1] == identity:
            digests[shard] = remembered
            continue
        digests[shard] = [*identity, _hashed(file)]
        settled = settled and _identity(file) == identity and time.time_ns() - max(identity[2:4]) > _FRESH_NS
    if settled and digests != known:
        _write_small(kept_at, json.dumps(digests))
    text = json.dumps([checkpoint.fingerprint, [[shard, entry[-1]] for shard, entry in sorted(digests.items())]])
    return hashlib.sha256(text.encode()).hexdigest()


def _remove(folder: Path) -> None:
    """In one step for whoever looks for it."""
    aside = folder.with_name(f".{folder.name}.removed-{os.getpid()}-{time.monotonic_ns()}")
    with contextlib.suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _identity(file: Path) -> list[int]:
    """Device, inode, time of modification, time of change, size: another version of a file differs in one of them."""
    found = file.stat()
    return [found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size]


def _size_and_time(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns


def _hashed(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _write_small(path: Path, text: str) -> None:
    """Whole or not at all. A place that cannot be written is no error: hashing takes seconds, and is done again."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
