"""A cache as a safetensors file: the committed cells of every slot, their positions, and whose they are.

The file says nothing of the layout that wrote it: rows, held cells and slots only. So any layout that keeps plain cells
can read it, whatever its spare room.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pluglm.contracts import Slot
from pluglm.errors import CacheError, SaveError
from pluglm_caches.cells import Cells
from pluglm_caches.stores import Store

FORMAT = "pluglm-cache-2"


def describe(slots: Sequence[Slot]) -> str:
    """The slots as JSON, equal for equal slots."""
    return json.dumps([{"type": type(slot).__name__, **dataclasses.asdict(slot)} for slot in slots], sort_keys=True)


@dataclass(frozen=True)
class Saved:
    """A file's content that has passed every check."""

    length: int
    first: int
    dense_length: int
    rows: int
    tensors: dict[str, Tensor]

    def of(self, slot: int) -> dict[str, Tensor]:
        """The tensors of one slot, by the names its store gave them."""
        start = f"slots.{slot}."
        return {name.removeprefix(start): t for name, t in self.tensors.items() if name.startswith(start)}

    def restore(self, stores: Sequence[Store], cells: Cells) -> None:
        """Fill an empty cache that has these rows and this much room."""
        with torch.no_grad():
            for slot, store in enumerate(stores):
                store.restore(self.of(slot), self.length)
            known = self.length - self.first
            cells.first = cells.length = cells.dense_length = self.first
            cells.begin(self.first, known, None)
            if "positions" in self.tensors:
                cells.write(self.tensors["positions"], known, dense=False)
            if "segments" in self.tensors:
                cells.write_segments(self.tensors["segments"], known)
            prefix = self.tensors["prefix"].to(cells.device) if "prefix" in self.tensors else None
        cells.commit(self.length, dense=False, prefix=prefix, segmented="segments" in self.tensors)
        cells.dense_length = self.dense_length


def write_saved(path: Path, slots: Sequence[Slot], stores: Sequence[Store], cells: Cells, fingerprint: str) -> None:
    """Write beside `path`, then put it in its place. Raises SaveError; what was there before is then intact."""
    length = cells.length
    saved = ((slot, store.saved(length)) for slot, store in enumerate(stores))
    tensors = {f"slots.{slot}.{name}": tensor for slot, kept in saved for name, tensor in kept.items()}
    if cells.dense_length < length and cells.positions is not None:
        tensors["positions"] = cells.positions.narrow(1, 0, length - cells.first)
    if cells.segmented and cells.segments is not None:
        tensors["segments"] = cells.segments.narrow(1, 0, length - cells.first)
    if cells.prefix is not None:
        tensors["prefix"] = cells.prefix
    metadata = {
        "format": FORMAT, "fingerprint": fingerprint, "slots": describe(slots),
        "length": str(length), "first": str(cells.first), "dense_length": str(cells.dense_length),
        "rows": str(cells.rows),
    }  # fmt: skip
    temporary = ""
    try:
        # Readable by the owner alone: what a cache holds can be turned back into the text it was made from.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        _write(temporary, tensors, metadata)
        Path(temporary).replace(path)
    except Exception as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise SaveError(
            f"The cache could not be written to {path}.",
            why=f"{type(error).__name__}: {error}",
            fix="Give a path in a folder that exists, may be written to and has space.",
            path=str(path),
        ) from error


def _write(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)


def read_saved(path: Path, slots: Sequence[Slot], stores: Sequence[Store], fingerprint: str, *, layout: str) -> Saved:
    """Read and check a file in full; nothing of the cache changes. Raises CacheError."""

    def refused(why: str, fix: str) -> CacheError:
        what = f"{path} cannot be loaded into this cache."
        return CacheError(what, why=why, fix=fix, layout=layout, operation="load")

    again = "Save the cache again with `cache.save`, or prefill the prompt anew."
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise refused(f"its format is {metadata.get('format')!r}, not {FORMAT!r}.", again)
            if metadata.get("fingerprint") != fingerprint:
                raise refused(
                    f"it was made with the model {metadata.get('fingerprint')!r}, and this is {fingerprint!r}.",
                    "Load the model that made it, or prefill the prompt with this one.",
                )
            if metadata.get("slots") != describe(slots):
                raise refused(
                    f"its slots are {metadata.get('slots')}, and the model needs {describe(slots)}.",
                    "Load the model that made it, or prefill the prompt with this one.",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            length, first, dense_length, rows = (
                int(metadata[name]) for name in ("length", "first", "dense_length", "rows")
            )
    except FileNotFoundError as error:
        raise refused("there is no such file.", "Give the path that `cache.save` was given.") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise refused(f"it is damaged or no safetensors file ({error}).", again) from error
    saved = Saved(length, first, dense_length, rows, tensors)
    if why := _misfit(saved, stores):
        raise refused(f"{why}.", again + " The cache must have the dtype of the saved one.")
    return saved


def _misfit(saved: Saved, stores: Sequence[Store]) -> str:
    """The first thing that does not fit; empty: all does."""
    length, rows = saved.length, saved.rows
    if not (0 <= saved.dense_length <= length and 0 <= saved.first <= length and rows >= 1):
        return f"length {length}, first {saved.first}, dense length {saved.dense_length} and {rows} rows make no sense"
    if ("positions" in saved.tensors) != (saved.dense_length < length):
        return "its positions and its dense length contradict each other"
    known = length - saved.first
    wanted = {"positions": (rows, known), "segments": (rows, known), "prefix": (rows,)}
    starts = {f"slots.{slot}." for slot in range(len(stores))}
    for name, tensor in saved.tensors.items():
        if name in wanted:
            if tensor.shape != wanted[name] or tensor.dtype is not torch.int64:
                return f"{name} is {list(tensor.shape)} {tensor.dtype}, not {list(wanted[name])} torch.int64"
        elif not any(name.startswith(start) for start in starts):
            return f"it has an unknown tensor {name!r}"
    for slot, store in enumerate(stores):
        if why := store.misfit(saved.of(slot), rows, length):
            return f"slot {slot}: {why}"
    return ""
