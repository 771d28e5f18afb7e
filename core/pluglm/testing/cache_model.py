"""The plain meaning of a cache: a list of cells for each row. What a layout does is compared with this."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import Cache, CrossSlot, KeyInfo, KVSlot, KVView, LatentSlot, LatentView, Slot, StateSlot, Step
from pluglm.contracts.dtypes import torch_dtype

#: (got, wanted) -> whether a layout gave back what it was given, within its numerics.
Same = Callable[[Tensor, Tensor], bool]


@dataclass
class Cell:
    """One cell of one row: its position (-1: padding or a hole), and k [K, D] and v [K, Dv] of every slot."""

    position: int
    values: dict[int, tuple[Tensor, Tensor]]


@dataclass
class ListModel:
    """What a cache should hold. Tensors are never changed in place, so rows may share them.

    Attributes:
        rows: the cells of each row. states: (slot, name) -> tensor [B, …]. cross: slot -> k, v, positions.
    """

    slots: tuple[Slot, ...]
    dtype: str
    rows: list[list[Cell]]
    states: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    cross: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @classmethod
    def empty(cls, slots: tuple[Slot, ...], dtype: str, batch_size: int) -> ListModel:
        """A model of an empty cache."""
        model = cls(slots, dtype, [[] for _ in range(batch_size)])
        model.reset()
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> ListModel:
        rows = [[Cell(cell.position, cell.values) for cell in row] for row in self.rows]
        return ListModel(self.slots, self.dtype, rows, dict(self.states), dict(self.cross), self.generator)

    @property
    def length(self) -> int:
        """Cells a row."""
        return len(self.rows[0])

    @property
    def dense(self) -> bool:
        """Cell j holds position j in every row."""
        return all([cell.position for cell in row] == list(range(len(row))) for row in self.rows)

    def next_positions(self) -> list[int]:
        """What follows each row's highest position."""
        return [max((cell.position for cell in row), default=-1) + 1 if row else 0 for row in self.rows]

    def reset(self) -> None:
        """Nothing held, states zero."""
        self.rows = [[] for _ in self.rows]
        self.cross = {}
        for i, slot in enumerate(self.slots):
            if isinstance(slot, StateSlot):
                for name, shape, own in slot.states:
                    self.states[i, name] = torch.zeros(len(self.rows), *shape, dtype=torch_dtype(own or self.dtype))

    def crop(self, length: int) -> None:
        """Keep the first cells."""
        self.rows = [row[:length] for row in self.rows]

    def rollback(self, counts: Sequence[int]) -> None:
        """Crop what all rows lose, turn the rest into holes."""
        length = self.length
        for row, count in zip(self.rows, counts, strict=True):
            for cell in row[length - count :]:
                cell.position = -1
        self.crop(length - min(counts))

    def take_rows(self, index: Sequence[int]) -> None:
        """Row i becomes a copy of row index[i]."""
        chosen = torch.tensor(list(index))
        self.rows = [copy.deepcopy(self.rows[i]) for i in index]
        self.states = {key: tensor[chosen] for key, tensor in self.states.items()}
        self.cross = {slot: (k[chosen], v[chosen], p[chosen]) for slot, (k, v, p) in self.cross.items()}

    def numbers(self, *shape: int, dtype: str | None = None) -> Tensor:
        """Random values in the cache's dtype."""
        return torch.randn(*shape, generator=self.generator).to(torch_dtype(dtype or self.dtype))

    def set_cross(self, cache: Cache, length: int) -> None:
        """Write every cross slot of both; the last position of the last row is padding."""
        for i, slot in enumerate(self.slots):
            if isinstance(slot, CrossSlot) and i not in self.cross:
                B = len(self.rows)
                positions = torch.arange(length).repeat(B, 1)
                positions[-1, -1] = -1
                k = self.numbers(B, slot.num_kv_heads, length, slot.head_dim)
                v = self.numbers(B, slot.num_kv_heads, length, slot.v_head_dim)
                cache.set_cross(i, k, v, positions)
                self.cross[i] = (k, v, positions)

    def forward(
        self, cache: Cache, positions: Tensor, same: Same, *, dense: bool = False, commit: bool = True, cross: int = 0
    ) -> None:
        """One pass through both, with every view compared. Without `commit` the model stays as it is.

        cross: length of an encoder's output to write to the cross slots in this pass; 0: write none.
        """
        B, T = len(self.rows), positions.shape[1]
        step = cache.begin(positions, dense=dense)
        assert step.count == T, f"a pass of {T} tokens has step.count == {step.count}"
        after = copy.deepcopy(self)
        for row, new in zip(after.rows, positions.expand(B, T).tolist(), strict=True):
            row.extend(Cell(max(position, -1), {}) for position in new)
        if cross:
            after.set_cross(cache, cross)
        for i, slot in enumerate(self.slots):
            if isinstance(slot, KVSlot | LatentSlot):
                after.append(cache, i, slot, step, same)
            elif isinstance(slot, StateSlot):
                after.step_state(cache, i, slot)
        after.check_cross(cache, same)
        assert cache.length == self.length, "append changed the length: only commit may"
        if commit:
            cache.commit(step)
            self.rows, self.states, self.cross = after.rows, after.states, after.cross

    def append(self, cache: Cache, i: int, slot: KVSlot | LatentSlot, step: Step, same: Same) -> None:
        """Give one slot new values and compare the view with all cells."""
        B, T = len(self.rows), step.count
        if isinstance(slot, KVSlot):
            k = self.numbers(B, slot.num_kv_heads, T, slot.head_dim)
            v = self.numbers(B, slot.num_kv_heads, T, slot.v_head_dim)
            view = cache.append(i, k, v, step)
        else:
            k, v = self.numbers(B, 1, T, slot.rope_dim), self.numbers(B, 1, T, slot.latent_dim)
            view = cache.append(i, k[:, 0], v[:, 0], step)
        for b, row in enumerate(self.rows):
            for t, cell in enumerate(row[len(row) - T :]):
                cell.values[i] = (k[b, :, t], v[b, :, t])
        self.check_view(i, view, step.keys(i), same)

    def check_view(self, i: int, view: KVView, keys: KeyInfo, same: Same) -> None:
        """Every cell that a query may still need is there, at its position, with its values; and nothing else is."""
        # A latent view's dense form is what absorbed queries read; what was appended are its two parts.
        k, v = (view.rope[:, None], view.latent[:, None]) if isinstance(view, LatentView) else view.dense()
        B, S = len(self.rows), keys.length
        assert k.shape[0] == v.shape[0] == B, f"slot {i}: the view has {k.shape[0]} rows, not {B}"
        assert k.shape[2] == v.shape[2] == S, f"slot {i}: KeyInfo.length is {S}, the view has {k.shape[2]} keys"
        assert keys.positions.shape in ((1, S), (B, S)), f"slot {i}: positions are {tuple(keys.positions.shape)}"
        assert bool(k.isfinite().all() and v.isfinite().all()), f"slot {i}: a key that nothing wrote is not finite"
        positions = keys.positions.expand(B, S).tolist()
        assert not keys.dense or positions == [list(range(S))] * B, f"slot {i}: KeyInfo.dense is said, and is not so"
        for b, row in enumerate(self.rows):
            cells = {cell.position: cell for cell in row if cell.position >= 0}
            got = {position: j for j, position in enumerate(positions[b]) if position >= 0}
            needed = {p for p in cells if self._readable(i, p, max(cells))}
            assert needed <= set(got) <= set(cells), f"slot {i}, row {b}: positions {sorted(got)}, not {sorted(cells)}"
            if got:
                index = torch.tensor(list(got.values()))
                wanted = [torch.stack([cells[p].values[i][part] for p in got], dim=1) for part in (0, 1)]
                assert same(k[b][:, index], wanted[0]), f"slot {i}, row {b}: keys are not those that were appended"
                assert same(v[b][:, index], wanted[1]), f"slot {i}, row {b}: values are not those that were appended"

    def _readable(self, i: int, position: int, last: int) -> bool:
        slot = self.slots[i]
        if isinstance(slot, KVSlot) and slot.window is not None:
            return last - position < slot.window
        if isinstance(slot, KVSlot) and slot.chunk is not None:
            return position // slot.chunk == last // slot.chunk
        return True

    def step_state(self, cache: Cache, i: int, slot: StateSlot) -> None:
        """Compare the state with the committed one, then update both in place."""
        given = cache.state(i)
        for name, shape, own in slot.states:
            wanted = self.states[i, name]
            assert torch.equal(given[name], wanted), f"slot {i}: state {name!r} is not what the last commit left"
            change = self.numbers(len(self.rows), *shape, dtype=own)
            given[name].mul_(0.5).add_(change)
            self.states[i, name] = wanted * 0.5 + change

    def check_cross(self, cache: Cache, same: Same) -> None:
        """Compare every cross slot."""
        for i, slot in enumerate(self.slots):
            if not isinstance(slot, CrossSlot):
                continue
            held = cache.cross(i)
            assert (held is None) == (i not in self.cross), f"slot {i}: cross() must be None exactly before set_cross"
            if held is not None:
                k, v = held[0].dense()
                wanted = self.cross[i]
                assert torch.equal(held[1].positions, wanted[2]), f"slot {i}: positions of the encoder's output"
                assert same(k, wanted[0]), f"slot {i}: the encoder's keys changed"
                assert same(v, wanted[1]), f"slot {i}: the encoder's values changed"

    def check(self, cache: Cache, same: Same) -> None:
        """Compare everything: by a pass of one token that is not committed, where there is room for it."""
        assert cache.batch_size == len(self.rows), f"batch_size is {cache.batch_size}, not {len(self.rows)}"
        assert cache.length == self.length, f"length is {cache.length}, not {self.length}"
        assert not cache.dense or self.dense, "the cache says that it is dense, and it has padding or holes"
        following = cache.next_positions(2).expand(len(self.rows), 2).tolist()
        wanted = self.next_positions()
        assert following == [[p, p + 1] for p in wanted], f"next_positions is {following}; the rows go on at {wanted}"
        if cache.capacity is None or cache.length < cache.capacity:
            self.forward(cache, cache.next_positions(1), same, dense=cache.dense, commit=False)
        else:
            self.check_cross(cache, same)
