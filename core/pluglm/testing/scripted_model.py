"""A model without weights for tests of decoding: its logits are a hash of a row's real tokens, and may be scripted.

What a row's next logits are depends on all its real tokens in order, and on nothing else: a strategy that feeds a token
twice, loses one or lets padding count gets other tokens. It follows the forward contract and is as strict as it.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import OPERATIONS, KVSlot, ModelDescription, WeightMap
from pluglm.errors import CacheError, ContextLengthError, InputError

#: A row's real tokens so far -> scores that replace the hashed ones.
Script = Callable[[tuple[int, ...]], Mapping[int, float]]
#: A score that any strategy follows, next to hashed ones.
CERTAIN = 1000.0
LAYERS = 4


class ScriptedCache:
    """Holds tokens and positions as a real cache holds keys."""

    layout = "scripted"
    streams = False
    slots = (KVSlot(1, 1, 1),)

    def __init__(self, batch_size: int, capacity: int | None, operations: frozenset[str]) -> None:
        self.capacity, self.operations = capacity, operations
        self.tokens = torch.empty(batch_size, 0, dtype=torch.int64)
        self.positions = torch.empty(batch_size, 0, dtype=torch.int64)

    @property
    def length(self) -> int:
        """Cells a row holds."""
        return self.tokens.shape[1]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.tokens.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tokens.nbytes + self.positions.nbytes

    @property
    def dense(self) -> bool:
        """Does cell j hold position j in every row?"""
        return bool((self.positions == torch.arange(self.length)).all())

    def next_positions(self, count: int) -> Tensor:
        """[B, count], after each row's last real position."""
        last = self.positions.max(1).values if self.length else torch.full((self.batch_size,), -1)
        return last[:, None] + 1 + torch.arange(count)

    def write(self, tokens: Tensor, positions: Tensor) -> None:
        """What a forward pass does to a cache."""
        if tokens.shape[0] != self.batch_size:
            raise InputError(f"the cache holds {self.batch_size} rows, the input has {tokens.shape[0]}.")
        if self.capacity is not None and self.length + tokens.shape[1] > self.capacity:
            raise ContextLengthError("the scripted cache is full.", tokens=self.length, limit=self.capacity)
        self.tokens = torch.cat((self.tokens, tokens.cpu()), dim=1)
        self.positions = torch.cat((self.positions, positions.expand(tokens.shape).cpu()), dim=1)

    def crop(self, length: int) -> None:
        """Keep the first cells."""
        self._need("crop")
        self.tokens, self.positions = self.tokens[:, :length], self.positions[:, :length]

    def rollback(self, count: int | Tensor) -> None:
        """Take back the last cells; a tensor [B] gives each row a number of its own and leaves holes."""
        self._need("rollback")
        counts = count if isinstance(count, Tensor) else torch.full((self.batch_size,), count)
        gone = torch.arange(self.length) >= (self.length - counts)[:, None]  # [B, length]
        kept = self.length - int(counts.min())
        self.positions = self.positions.masked_fill(gone, -1)[:, :kept]
        self.tokens = self.tokens[:, :kept]

    def repeat(self, count: int) -> None:
        """a, b -> a, a, b, b."""
        self._need("repeat")
        self.select(torch.arange(self.batch_size).repeat_interleave(count))

    def select(self, index: Tensor) -> None:
        """Keep these rows."""
        self.tokens, self.positions = self.tokens[index], self.positions[index]

    reorder = select

    def history(self, row: int, cells: int) -> tuple[int, ...]:
        """The real tokens among a row's first cells, by position."""
        pairs = zip(self.positions[row, :cells].tolist(), self.tokens[row, :cells].tolist(), strict=True)
        return tuple(token for position, token in sorted(pairs) if position >= 0)

    def fork(self) -> ScriptedCache:
        """An independent copy: tensors are replaced, never changed in place."""
        self._need("fork")
        return copy.copy(self)

    def _need(self, operation: str) -> None:
        if operation not in self.operations:
            raise CacheError(f"the scripted cache has no {operation}.", layout=self.layout, operation=operation)


@dataclass(frozen=True)
class ScriptedOutput:
    """As of the forward contract."""

    logits: Tensor
    past_key_values: ScriptedCache | None
    hidden_states: tuple[Tensor, ...] | None = None


class ScriptedModel:
    """Call it as `pluglm.forward.CausalLM`.

    It has four layers whose hidden states are vectors of V hashed numbers in [0, 1), so that their cosines are near
    each other; `logits_of` gives them back as they are. The script reaches logits alone.

    Args:
        script: what to put over the hashed scores. operations: of its caches. device: of its logits.
    Attributes:
        fed: tokens a row of every forward pass, in order. caches: every cache it made.
    """

    def __init__(
        self, vocab_size: int = 23, script: Script | None = None, *, operations: frozenset[str] = frozenset(OPERATIONS),
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.description = ModelDescription(
            "scripted", None, WeightMap(()), vocab_size, hidden_size=vocab_size, num_layers=LAYERS, max_seq_len=None,
            attention=(), slots=ScriptedCache.slots,
        )  # fmt: skip
        self._script, self._operations = script, operations
        self.fed: list[int] = []
        self.caches: list[ScriptedCache] = []

    def new_cache(self, *, batch_size: int, capacity: int | None = None) -> ScriptedCache:
        """An empty cache."""
        self.caches.append(ScriptedCache(batch_size, capacity, self._operations))
        return self.caches[-1]

    def step(
        self, token_ids: Tensor, cache: ScriptedCache, *, positions: Tensor | None = None, logits_to_keep: int = 1
    ) -> Tensor:
        """[B, logits_to_keep or T, V]."""
        positions = cache.next_positions(token_ids.shape[1]) if positions is None else positions
        return self._run(token_ids, positions, cache, logits_to_keep)

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: ScriptedCache | None = None, use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False, return_dict: bool | None = None, **unknown: Any,
    ) -> ScriptedOutput:  # fmt: skip
        """The forward contract."""
        if unknown:
            raise InputError(f"the model takes no argument {next(iter(unknown))!r}.", argument=next(iter(unknown)))
        B, T = input_ids.shape
        cache = past_key_values if past_key_values is not None else ScriptedCache(B, None, self._operations)
        positions = cache.next_positions(T) if position_ids is None else position_ids.cpu().expand(B, T)
        if attention_mask is not None:
            if attention_mask.shape != (B, cache.length + T):
                raise InputError(f"attention_mask has shape {tuple(attention_mask.shape)}.", argument="attention_mask")
            real = attention_mask.cpu()
            counted = real.cumsum(1)[:, cache.length :] - 1 if position_ids is None else positions
            positions = counted.masked_fill(real[:, cache.length :] == 0, -1)
        logits = self._run(input_ids, positions, cache, logits_to_keep)
        hidden = self._hidden_states(cache, T) if output_hidden_states else None
        return ScriptedOutput(logits, cache if use_cache is not False else None, hidden)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """[..., V] what the head makes of a layer's hidden state: the same numbers."""
        return hidden

    def _run(self, ids: Tensor, positions: Tensor, cache: ScriptedCache, keep: int | Tensor) -> Tensor:
        B, T = ids.shape
        self.fed.append(T)
        past = cache.length
        cache.write(ids, positions)
        cells = keep.tolist() if isinstance(keep, Tensor) else list(range(T - keep if keep else 0, T))
        rows = [[self.scores(cache.history(row, past + cell + 1)) for cell in cells] for row in range(B)]
        return torch.tensor(rows, device=self.device)

    def _hidden_states(self, cache: ScriptedCache, count: int) -> tuple[Tensor, ...]:
        """LAYERS + 1 tensors [B, count, V] for the cache's last cells."""
        cells = range(cache.length - count + 1, cache.length + 1)
        rows = [[cache.history(row, cell) for cell in cells] for row in range(cache.batch_size)]
        return tuple(
            torch.tensor([[self.hidden_state(history, layer) for history in row] for row in rows], device=self.device)
            for layer in range(LAYERS + 1)
        )

    def hidden_state(self, history: tuple[int, ...], layer: int) -> list[float]:
        """A layer's hidden state of the last of these tokens, V numbers in [0, 1)."""
        seed = zlib.crc32(repr(history).encode())
        return [zlib.crc32(b"%d %d %d" % (seed, v, layer)) / 2**32 for v in range(self.vocab_size)]

    def scores(self, history: tuple[int, ...]) -> list[float]:
        """The logits after these tokens, in [-3, 3) where they are not scripted."""
        seed = zlib.crc32(repr(history).encode())
        scores = [zlib.crc32(b"%d %d" % (seed, v)) / 2**32 * 6 - 3 for v in range(self.vocab_size)]
        for token, score in (self._script(history) if self._script is not None else {}).items():
            scores[token] = score
        return scores
