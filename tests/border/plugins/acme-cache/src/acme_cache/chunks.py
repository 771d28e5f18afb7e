"""The layout, and the cache it makes."""

import torch

from acme_cache import CALLS
from pluglm import CacheError
from pluglm.contracts import DenseView, KeyInfo

OPERATIONS = frozenset({"reset"})


class ChunksLayout:
    name = "chunks"
    view = "dense"
    streams = False
    operations = OPERATIONS

    def __init__(self, slots):
        self.slots = slots

    def new(self, *, batch_size, capacity=None):
        return ChunksCache(self.slots, batch_size)


class ChunksStep:
    def __init__(self, positions, count, dense):
        self.positions, self.count, self.dense, self.new = positions, count, dense, {}

    def keys(self, slot):
        return KeyInfo(self.positions, self.positions.shape[1], self.dense)


class ChunksCache:
    layout = "chunks"
    operations = OPERATIONS
    capacity = None
    streams = False

    def __init__(self, slots, batch_size):
        self.slots, self.batch_size = slots, batch_size
        self.reset()

    def reset(self):
        self.length, self.dense = 0, True
        self.positions = torch.zeros(self.batch_size, 0, dtype=torch.int64)
        self.chunks = [[] for _ in self.slots]  # of (k, v), a pair for each pass

    @property
    def nbytes(self):
        return sum(t.nbytes for chunks in self.chunks for pair in chunks for t in pair)

    def next_positions(self, count):
        last = self.positions.amax(1, keepdim=True).clamp(min=-1) if self.length else torch.full((1, 1), -1)
        return last + 1 + torch.arange(count)

    def begin(self, positions, *, dense=False, prefix_lengths=None, segments=None):
        positions = positions.expand(self.batch_size, -1)
        count = positions.shape[1]
        return ChunksStep(torch.cat((self.positions, positions), dim=1), count, dense and self.dense)

    def append(self, slot, k, v, step):
        CALLS["append"] += 1
        step.new[slot] = (k, v)
        pairs = [*self.chunks[slot], (k, v)]
        return DenseView(*(torch.cat(tensors, dim=2) for tensors in zip(*pairs, strict=True)))

    def commit(self, step):
        for slot, pair in step.new.items():
            self.chunks[slot].append(pair)
        self.positions, self.dense = step.positions, step.dense
        self.length += step.count

    def __getattr__(self, name):
        def lacks(*args, **kwargs):
            raise CacheError(f"cache chunks has no {name}.", layout="chunks", operation=name)

        return lacks
