"""Prefixes of texts that other processes, and later ones, go on from: computed once, found by their token ids.

    store = PrefixStore("prefixes", salt="tenant 7", max_bytes=10 * 2**30)
    store.put(cache, ids, fingerprint)
    cache, length = store.load(lm.model.layout, ids, fingerprint)  # then feed ids[length:]

Token ids are compared one by one, not by digests of whole stretches: four bytes a token are little beside its keys and
values, and so a prefix is shared to its last equal token.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from pluglm.contracts import Cache, CacheLayout
from pluglm.errors import CacheError, ContextLengthError, InputError
from pluglm_caches.cache import SlotCache
from pluglm_caches.prefix_files import CACHE, Kept, PrefixFolder, digest, log
from pluglm_caches.saving import describe


class PrefixStore:
    """A folder of saved prefixes, for any number of processes at once.

    Keys and values must follow from the model and the tokens alone. What else a model was given (an image, an adapter
    that is not part of its weights) belongs into the salt. Files can be read by their owner only: what a cache holds
    can be turned back into text.

    Args:
        folder: made if it is not there.
        salt: what was stored under another salt is not found: one for each group of users who may share.
        max_bytes: of all files of the folder together; the least recently used make room. None: no limit.
    Raises: SaveError if the folder cannot be made, InputError for a limit that makes no sense.
    """

    def __init__(self, folder: Path | str, *, salt: str = "", max_bytes: int | None = None) -> None:
        if max_bytes is not None and (type(max_bytes) is not int or max_bytes < 1):
            raise InputError(
                f"max_bytes={max_bytes!r} makes no sense: it must be an integer >= 1.", argument="max_bytes"
            )
        self.salt = salt
        self._files = PrefixFolder(Path(folder), max_bytes)

    def put(self, cache: Cache, token_ids: Sequence[int] | Tensor, fingerprint: str) -> Path:
        """Save what a cache holds of a text; the same text of the same layout is replaced.

        Args:
            cache: one row, without padding and holes.
            token_ids: [T] or [1, T], the text. Tokens that the cache does not hold are left out (the last one of a
                generation was never fed); cells behind the text are cropped off a fork.
            fingerprint: of the model, `lm.fingerprint()`.
        Returns: the file, which is found as long as there is room for it.
        Raises: InputError for a cache that does not hold one plain text; CacheError if its keys and values follow from
            more than the tokens, or it cannot be cropped; SaveError if nothing could be written.
        """
        ids = _ids(token_ids)[: cache.length]
        _check(cache, ids)
        if len(ids) < cache.length:
            cache = cache.fork()
            cache.crop(len(ids))
        scope = self._scope(fingerprint)
        label = f"{cache.layout} {describe(cache.slots)}".encode() + b"\0" + _packed(ids)
        bound = _bound(fingerprint, digest(scope.encode(), label))
        return self._files.add(cache, scope, label, fingerprint=bound)

    def longest(self, token_ids: Sequence[int] | Tensor, fingerprint: str) -> tuple[Path, int] | None:
        """The file that shares most with a text, and how many leading tokens; None: none shares any.

        The file may hold more tokens, and a layout may be unable to read it or to crop it to these: `load` looks on.
        """
        for kept, length in self._candidates(_ids(token_ids), fingerprint):
            return self._files.path / (kept.stem + CACHE), length
        return None

    def load(
        self,
        layout: CacheLayout,
        token_ids: Sequence[int] | Tensor,
        fingerprint: str,
        *,
        capacity: int | None = None,
    ) -> tuple[Cache, int]:
        """A cache that begins with as much of a text as is stored and can be read.

        Its last token is always left to be fed: its logits are what a text is continued from.

        Args:
            layout: makes the cache: `lm.model.layout`. It may be another than the one that stored the prefix.
            token_ids: [T] or [1, T], the text. fingerprint: of the model, `lm.fingerprint()`.
            capacity: as for `layout.new`. A stored text that is longer cannot be loaded to be cropped.
        Returns: a cache of one row and its length; an empty cache and 0 if nothing was found. A file that vanishes
            meanwhile or does not fit the layout is passed over, a damaged one is removed and logged as a warning.
        """
        for kept, length in self._candidates(_ids(token_ids)[:-1], fingerprint):
            if kept.length > length and "crop" not in layout.operations:
                continue
            cache = layout.new(batch_size=1, capacity=capacity)
            if self._fill(cache, kept, length, fingerprint):
                self._files.touch(kept.stem)
                return cache, length
        return layout.new(batch_size=1, capacity=capacity), 0

    def _candidates(self, ids: Sequence[int], fingerprint: str) -> Iterator[tuple[Kept, int]]:
        """Prefixes that share at least one token with the text, and how many: the longest first."""
        packed = _packed(ids)
        found = [(kept, kept.common(packed)) for kept in self._files.kept(self._scope(fingerprint))]
        # Of those that share equally much, the one with least to read and to crop.
        found.sort(key=lambda pair: (-pair[1], pair[0].length, pair[0].stem))
        return ((kept, length) for kept, length in found if length)

    def _fill(self, cache: Cache, kept: Kept, length: int, fingerprint: str) -> bool:
        path = self._files.intact(kept)
        if path is None:
            return False
        try:
            cache.load(path, fingerprint=_bound(fingerprint, kept.text))
            if cache.length > length:
                cache.crop(length)
        except (CacheError, ContextLengthError) as error:
            log.info("%s does not serve a %s cache: %s", path, cache.layout, error)
            return False
        return cache.length == length

    def _scope(self, fingerprint: str) -> str:
        if not fingerprint:
            raise InputError(
                f"fingerprint={fingerprint!r} tells no model from another.",
                why="keys and values of one model mean nothing to another.",
                fix="Pass lm.fingerprint().",
                argument="fingerprint",
            )
        return digest(b"pluglm-prefix-1", self.salt.encode(), fingerprint.encode())


def _bound(fingerprint: str, text: str) -> str:
    """What the cache's file says it belongs to: the model, and the label with the token ids."""
    return f"{fingerprint} {text}"


def _ids(token_ids: Sequence[int] | Tensor) -> list[int]:
    rows = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
    ids = rows[0] if len(rows) == 1 and isinstance(rows[0], list) else rows
    if not ids or not all(type(i) is int and 0 <= i < 2**32 for i in ids):
        raise InputError(
            "token_ids must be the ids of one text, at least one.",
            why="a prefix is one row; keys and values belong to whole numbers from 0 on.",
            fix="Pass a list of ids, or a tensor [T] or [1, T].",
            argument="token_ids",
        )
    return ids


def _packed(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def _check(cache: Cache, ids: Sequence[int]) -> None:
    """Does the cache hold one plain text, and follows it from the tokens alone?"""
    if cache.batch_size != 1 or not cache.dense or not ids:
        raise InputError(
            f"A cache of {cache.batch_size} rows and {cache.length} cells{'' if cache.dense else ', not all real,'} "
            "is not the prefix of one text.",
            why="a prefix is one row, from position 0 on, without padding or holes.",
            fix="Take one row of a fork with `select`; prefill padded prompts one at a time.",
            argument="cache",
        )
    more = [f"slot {i}: {slot.kind}" for i, slot in enumerate(cache.slots) if slot.kind == "cross"]
    if isinstance(cache, SlotCache) and (cache.cells.segmented or cache.cells.prefix is not None):
        more.append("segments or prefix lengths")
    if more:
        raise CacheError(
            "The keys and values of this cache follow from more than its tokens.",
            why=f"it has {', '.join(more)}.",
            fix="Store prefixes of plain causal texts only.",
            layout=cache.layout,
            operation="save",
        )
