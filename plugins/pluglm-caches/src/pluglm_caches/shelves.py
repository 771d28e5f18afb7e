"""Host memory for the cells of one slot: a file that is mapped into memory, or memory that an accelerator copies from.

Cells are the outermost axis, so a longer tensor begins with the bytes of the shorter one: a file grows where it is,
what a pass appends is one run of bytes, and so is what an accelerator fetches.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pluglm.errors import CacheError


class Shelf(Protocol):
    """Makes the tensor of one slot, and longer ones in its place."""

    def resized(self, old: Tensor, cells: int, held: int) -> Tensor:
        """[cells, numbers], of which the `held` first are those of `old`, the tensor given out before."""
        ...

    def another(self) -> Shelf:
        """A new one of the same kind."""
        ...


class MappedShelf:
    """A temporary file. Memory holds of it what the page cache chooses; a name in a folder it has for a moment only.

    Tensors given out before stay valid: they map the same file.

    Args:
        folder: on whose device the file is made; "": the system's for temporary files.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._handle, self._size = -1, 0

    def resized(self, old: Tensor, cells: int, held: int) -> Tensor:
        """Make the file longer and map all of it. Raises CacheError if there is no space; nothing has changed then."""
        size = cells * old.shape[1] * old.element_size()
        try:
            if self._handle < 0:
                self._handle = _unnamed(self.folder)
                weakref.finalize(self, os.close, self._handle)
            # Reserved now: a hole in the file would end the process when a later write finds the device full.
            os.posix_fallocate(self._handle, self._size, max(size - self._size, 1))
            self._size = max(size, self._size)
            mapping = mmap.mmap(self._handle, size)
        except OSError as error:
            raise CacheError(
                f"The offloaded cache could not grow to {size} bytes in a slot.",
                why=f"{type(error).__name__}: {error}",
                fix='Free space, or give the option "folder" a folder on a device that has it.',
                layout="offloaded",
                operation="begin",
            ) from error
        with torch.inference_mode(False):
            return torch.frombuffer(mapping, dtype=old.dtype).view(cells, old.shape[1])

    def another(self) -> MappedShelf:
        return MappedShelf(self.folder)


def _unnamed(folder: str) -> int:
    """An open file that is deleted already: a process that dies leaves nothing behind. Readable by the owner alone."""
    handle, path = tempfile.mkstemp(prefix="pluglm-cache-", dir=folder or None)
    Path(path).unlink()
    return handle


class PinnedShelf:
    """Memory that is never paged out, so that an accelerator copies to and from it while both go on.

    Args:
        pinned: False: ordinary memory, with which copies wait.
    """

    def __init__(self, *, pinned: bool = True) -> None:
        self.pinned = pinned

    def resized(self, old: Tensor, cells: int, held: int) -> Tensor:
        """A copy of what is held."""
        with torch.inference_mode(False):
            new = torch.zeros(cells, old.shape[1], dtype=old.dtype, pin_memory=self.pinned)
        new[:held].copy_(old[:held])
        return new

    def another(self) -> PinnedShelf:
        return PinnedShelf(pinned=self.pinned)
