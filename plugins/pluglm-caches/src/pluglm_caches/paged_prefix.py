"""Pages that outlive their cache and are found again by what they hold: equal tokens after equal prefixes.

A page is known by a chain of SHA-256 digests: each covers the page's tokens and the digest of the page before; the
first one, a salt and what kind of pages these are. So equal digests mean an equal text from the start on, and without
the salt nobody can name a page, not even one whose text he knows: tenants with different salts share nothing and learn
nothing.

Source: Kwon et al. 2023, "PagedAttention", section 4.4 (shared prefix); the chain is Merkle's.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from pluglm.errors import InputError
from pluglm_caches.paged_pool import PagePool

#: The page of each pool that holds a stretch of text; None where a window had moved on before it was published.
Entry = tuple[int | None, ...]


class Prefixes:
    """The published pages of one layout. The least recently found ones make room for new ones.

    Args:
        pools: whose pages an entry names, in order. limit: stretches of `page_size` tokens that are kept.
        description: what else must be equal: the slots and the dtype.
    """

    def __init__(self, pools: Sequence[PagePool], page_size: int, limit: int, description: str) -> None:
        self.pools, self.page_size, self.limit = tuple(pools), page_size, limit
        self._kind = hashlib.sha256(f"{page_size}\0{description}".encode()).digest()
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def digests(self, token_ids: Sequence[int], salt: bytes) -> list[bytes]:
        """One digest for each full page of a text. Raises InputError for a salt that separates nobody."""
        if not salt:
            raise InputError(
                f"salt={salt!r} does not keep one tenant's text from another.",
                why="whoever knows the salt can find out whether a text was published.",
                fix="Give non-empty bytes, one secret for each group of users who may know of each other's prompts.",
                argument="salt",
            )
        digest = hashlib.sha256(b"pluglm-prefix-1" + self._kind + hashlib.sha256(salt).digest()).digest()
        chain = []
        for start in range(0, len(token_ids) - self.page_size + 1, self.page_size):
            page = struct.pack(f"<{self.page_size}q", *token_ids[start : start + self.page_size])
            digest = hashlib.sha256(digest + page).digest()
            chain.append(digest)
        return chain

    def find(self, chain: Iterable[bytes]) -> list[Entry]:
        """The entries of the leading digests that are known."""
        found = []
        for digest in chain:
            if digest not in self._entries:
                break
            found.append(self._entries[digest])
        return found

    def touch(self, chain: Sequence[bytes]) -> None:
        """These were wanted. The start of a text counts as the most recent: without it the rest is not found."""
        for digest in reversed(chain):
            if digest in self._entries:
                self._entries.move_to_end(digest)

    def publish(self, chain: Sequence[bytes], entries: Sequence[Entry]) -> int:
        """Keep these pages, too. Returns how many leading ones are then known."""
        for digest, entry in zip(chain, entries, strict=True):
            known = self._entries.get(digest, (None,) * len(self.pools))
            for pool, old, new in zip(self.pools, known, entry, strict=True):
                if old is None and new is not None:
                    pool.share((new,))
            self._entries[digest] = tuple(new if old is None else old for old, new in zip(known, entry, strict=True))
        self.touch(chain)
        self._evict(self.limit)
        return len(self.find(chain))

    def clear(self) -> None:
        """Forget everything: after a change of the model's weights, say."""
        self._evict(0)

    def _evict(self, limit: int) -> None:
        while len(self._entries) > limit:
            _, entry = self._entries.popitem(last=False)
            for pool, page in zip(self.pools, entry, strict=True):
                if page is not None:
                    pool.release((page,))
