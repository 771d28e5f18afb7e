"""A cache of pluglm under the names that code written for transformers calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pluglm.errors import CacheError

if TYPE_CHECKING:
    from pluglm.contracts.cache import Cache
    from pluglm.forward import BuiltModel

#: Tokens at the start of a cache that are remembered: enough to know them again when they are fed a second time.
REMEMBERED = 32
#: An input as long as the cache that repeats it is taken for the same text from this length on; shorter ones repeat
#: themselves by nature ("ha ha").
TELLING = 4


class CacheFace:
    """Wraps one cache. Without one it is empty, and the first model that it is passed to makes its cache.

    The names and what they mean are those of `Cache` in transformers 5.23 and, where that has dropped a name, of 4.57.

    Args:
        inner: a cache of pluglm; None: `make` is called when it is first passed to a model.

    Attributes:
        inner: the cache, None before the first pass.
    """

    #: Nothing is compiled by recipes here.
    is_compileable = False

    def __init__(self, inner: Cache | None = None) -> None:
        self.inner = inner
        # [B, up to REMEMBERED] what the cache begins with; None: not known.
        self._start: Tensor | None = None
        self._known = inner is None or inner.length == 0

    def make(self, model: BuiltModel, batch_size: int) -> Cache:
        """The cache for a model; a subclass may want another layout or capacity."""
        return model.new_cache(batch_size=batch_size, capacity=model.description.max_seq_len)

    def bind(self, model: BuiltModel, batch_size: int) -> Cache:
        """`inner`, made if there is none yet."""
        if self.inner is None:
            self.inner = self.make(model, batch_size)
        return self.inner

    # What recipes ask

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Cells a row holds, padding included; the same in every layer."""
        return 0 if self.inner is None else self.inner.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Cells a row can hold, -1 if any number (transformers 4.48 to 5.16)."""
        capacity = None if self.inner is None else self.inner.capacity
        return -1 if capacity is None else capacity

    get_max_length = get_max_cache_shape

    @property
    def batch_size(self) -> int | None:
        """Rows; None before the first pass."""
        return None if self.inner is None else self.inner.batch_size

    @property
    def is_initialized(self) -> bool:
        """Has a pass been made?"""
        return self.inner is not None and self.inner.length > 0

    @property
    def is_croppable(self) -> bool:
        """Can the last tokens be taken back?"""
        return self.inner is None or "crop" in self.inner.operations

    @property
    def is_sliding(self) -> list[bool]:
        """For each slot: is it a window?"""
        return [] if self.inner is None else [slot.kind == "window" for slot in self.inner.slots]

    def __len__(self) -> int:
        return 0 if self.inner is None else len(self.inner.slots)

    def __bool__(self) -> bool:
        """A cache is there, empty or not: `if past_key_values:` asks whether there is one."""
        return True

    # What recipes do

    def crop(self, tokens: int) -> None:
        """Take tokens back.

        Args:
            tokens: -n: the last n, as in every version. n > 0: keep the first n, as before 5.17; nothing happens if
                there are no more. 0: nothing, as since 5.17.
        Raises: CacheError if the layout cannot, or not so far.
        """
        length = self.get_seq_length()
        keep = length + tokens if tokens <= 0 else tokens
        if keep < 0:
            raise CacheError(
                f"crop({tokens}) takes back more than the {length} tokens that are held.",
                fix="Take back fewer.", layout=self._layout(), operation="crop",
            )  # fmt: skip
        if keep >= length:
            return
        self._operating("crop").crop(keep)
        if self._start is not None:
            self._start = self._start[:, :keep]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was. beam_idx: [B] int64."""
        if self.inner is not None:
            self._operating("reorder").reorder(beam_idx)
            self._move(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """a, b -> a, a, b, b."""
        if self.inner is not None:
            self._operating("repeat").repeat(repeats)
            if self._start is not None:
                self._start = self._start.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order. indices: [B'] int64, or bool [B]."""
        if self.inner is not None:
            index = indices.nonzero()[:, 0] if indices.dtype is torch.bool else indices
            self._operating("select").select(index)
            self._move(index)

    def reset(self) -> None:
        """Forget all tokens."""
        if self.inner is not None:
            self._operating("reset").reset()
        self._start, self._known = None, True

    def __copy__(self) -> CacheFace:
        return self._copied()

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheFace:
        return self._copied()

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: keys and values go from a layer to its cache without passing here."""
        raise CacheError(
            "a recipe cannot write keys and values into this cache.",
            why="attention and cache are parts of the model here; a recipe sees the cache as a whole.",
            fix="Write the method as a cache plugin (`pluglm new cache`).",
            layout=self._layout(),
            operation="update",
        )

    # What the surface tells

    def starts(self, ids: Tensor) -> bool:
        """Do these tokens begin with what the cache begins with? ids: [B, T], T at least the cache's length."""
        start = self._start
        if start is None or start.shape[0] != ids.shape[0] or not start.shape[1]:
            return False
        return torch.equal(ids[:, : start.shape[1]], start.to(ids.device))

    @property
    def remembers(self) -> bool:
        """Is it known what the cache begins with?"""
        return self._known

    def remember(self, ids: Tensor | None, held: int) -> None:
        """A pass was made. ids: [B, T] that it brought, None for embeddings. held: cells there were before it."""
        if ids is None:
            self._start, self._known = None, False
        elif self._known and held < REMEMBERED:
            new = ids[:, : REMEMBERED - held].clone()
            self._start = new if self._start is None or held == 0 else torch.cat((self._start, new), dim=1)

    def _move(self, index: Tensor) -> None:
        if self._start is not None:
            self._start = self._start[index.to(self._start.device)]

    def _copied(self) -> CacheFace:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.inner = None if self.inner is None else self._operating("fork").fork()
        return other

    def _layout(self) -> str | None:
        return None if self.inner is None else self.inner.layout

    def _operating(self, operation: str) -> Cache:
        """The inner cache, if its layout has this operation."""
        assert self.inner is not None
        if operation not in self.inner.operations:
            raise CacheError(
                f"a {self.inner.layout} cache has no {operation}.", why="its layout says so.",
                fix="Load the model with another cache layout.", layout=self.inner.layout, operation=operation,
            )  # fmt: skip
        return self.inner


def unwrapped(cache: Any) -> Any:
    """The cache of pluglm in a face; anything else as it is."""
    return cache.inner if isinstance(cache, CacheFace) else cache
