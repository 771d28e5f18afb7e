"""Storage of one slot: tensors with a row for each sequence and, where the slot keeps tokens, room for later cells.

Every tensor that is kept is made by `zeros`. Zeros, because a cell that nothing has written must not turn into NaN in a
product with a masked weight; outside inference mode, because the cache may be filled under `torch.inference_mode()` and
read in a loop that is not.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from pluglm.contracts import KeyInfo
from pluglm.errors import InputError

if TYPE_CHECKING:
    from pluglm_caches.cells import Cells


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor that the cache keeps."""
    with torch.inference_mode(False):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)


def resized(old: Tensor, axis: int, size: int, held: int) -> Tensor:
    """A tensor of `size` cells that begins with the `held` first cells of `old`. The one place that copies history."""
    shape = list(old.shape)
    shape[axis] = size
    new = zeros(shape, old.dtype, old.device)
    with torch.no_grad():
        new.narrow(axis, 0, held).copy_(old.narrow(axis, 0, held))
    return new


def moved(old: Tensor, axis: int, start: int, held: int, size: int) -> Tensor:
    """A tensor of `size` cells that begins with the cells [start, start + held) of `old`; `old` itself if it fits."""
    kept = old.narrow(axis, start, held)
    if old.shape[axis] != size:
        return resized(kept, axis, size, held)
    if start:
        with torch.no_grad():
            old.narrow(axis, 0, held).copy_(kept.clone() if start < held else kept)
    return old


def taken(old: Tensor, index: Tensor, axis: int = 1, held: int | None = None) -> Tensor:
    """Rows `index` of `old`, in the same storage if their number stays. Of cells on `axis` only the `held` first."""
    rows = index.shape[0]
    with torch.no_grad():
        new = old if rows == old.shape[0] else zeros((rows, *old.shape[1:]), old.dtype, old.device)
        if held is None:
            new.copy_(old.index_select(0, index))
        else:
            new.narrow(axis, 0, held).copy_(old.narrow(axis, 0, held).index_select(0, index))
    return new


def wrong_shape(name: str, given: Tensor, wanted: Sequence[int], dtype: torch.dtype) -> InputError:
    """The error for a tensor that does not fit a slot: broadcasting or casting it would change numbers in silence."""
    return InputError(
        f"{name} of shape {list(given.shape)} and {given.dtype} does not fit the cache.",
        why=f"the slot and this pass need {list(wanted)} and {dtype}.",
        fix="Pass the tensors of this pass in the cache's dtype, or build the cache with the model's.",
        argument=name,
    )


class Pass(Protocol):
    """What a store must know of the pass under way: its cells are [start, end), `count` of them.

    cell: [1] int64, `start` as a tensor where the cache is, in a pass of one cell without gradients; else None.
    """

    cells: Cells
    start: int
    count: int
    end: int
    dense: bool
    prefix: Tensor | None
    cell: Tensor | None


class Store:
    """One slot. This class is what a `SharedSlot` has: nothing of its own.

    Attributes:
        first: the first cell that is still held; cells are counted from the start of the text, dropped ones included.
        room: the cell up to which there is storage.
    """

    kind = "shared"
    first = 0
    room = sys.maxsize

    def begin(self, cells: Cells, count: int) -> None:
        """Have room for `count` cells more. Called when `room` ends; may drop cells that no query reads any more."""

    def seen_from(self, current: Pass) -> int:
        """The first cell that the pass under way hands out."""
        return self.first

    def keys(self, current: Pass) -> KeyInfo | None:
        """What the pass under way hands out, where that is not simply the cells from `seen_from` on."""
        return None

    def seen(self, current: Pass) -> Any:
        """A view of what the pass under way hands out."""
        return self.read(self.seen_from(current), current.end)

    def committed(self, length: int) -> Any:
        """A view of what is held of the first `length` cells, all that count."""
        return self.read(self.first, length)

    def write(self, k: Tensor, v: Tensor, current: Pass) -> Any:
        """Write the cells of the pass and return what `seen` does."""
        raise InputError(
            f"A {self.kind} slot takes no keys and values.",
            why="only kv, window, chunk and latent slots are appended to.",
            fix="Use `read` for a shared slot, `set_cross` for a cross slot and `state` for a state slot.",
            argument="slot",
        )

    def read(self, start: int, end: int) -> Any:
        """A view of the cells [start, end); start is at least `first`."""
        raise InputError(f"A {self.kind} slot has no cells to read.", argument="slot")

    def tensors(self) -> list[Tensor]:
        """Everything that occupies memory."""
        return []

    def take_rows(self, index: Tensor, held: int) -> None:
        """Row i becomes what row index[i] was. held: committed cells, here and below, dropped ones included."""

    def copy(self) -> Store:
        """An independent copy of what is committed."""
        return self

    def settle(self, cells: Cells) -> None:
        """After a pass: give back storage that only the pass needed."""

    def lacks(self, cells: Cells, length: int) -> bool:
        """Whether a query after the first `length` cells would see cells that are no longer held."""
        return False

    def crop(self, length: int) -> None:
        """Keep the cells before `length`; the store does not lack what is then needed."""

    def commit(self) -> None:
        """The pass counts."""

    def discard(self) -> None:
        """The pass does not count."""

    def forget(self) -> None:
        """Back to the start, storage kept."""

    def detach(self) -> None:
        """Cut the graph of a finished pass off what is kept."""
        for tensor in self.tensors():
            if tensor.requires_grad:
                tensor.detach_()

    def saved(self, held: int) -> dict[str, Tensor]:
        """What goes into a file."""
        return {}

    def misfit(self, tensors: Mapping[str, Tensor], rows: int, held: int) -> str:
        """Why `restore` cannot take these tensors of `rows` rows; empty: it can."""
        return f"it has unknown tensors {sorted(tensors)}" if tensors else ""

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        """Replace the content by what `saved` gave. Rows fit already; the store makes room."""
