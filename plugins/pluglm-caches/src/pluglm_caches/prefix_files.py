"""A folder of prefixes: two files each, that never change once they are there; the least recently used go first.

The name of both is `SCOPE-TEXT-CONTENT`: digests of who may find it, of the label, and of the bytes of the cache's
file. The label (`.label`) holds the slots and the token ids and is written last: without it the prefix is not there.
Since names follow from contents, processes need no lock and no index: nothing is ever written over, a reader that is
too late finds nothing, and a damaged file does not match its name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pluglm.contracts import Cache
from pluglm.errors import SaveError

CACHE, LABEL = ".safetensors", ".label"
_ABANDONED_S = 3600.0
_WORD = 4  # bytes of a token id in a label

log = logging.getLogger(__name__)


def digest(*parts: bytes) -> str:
    """128 bits of sha256 over parts that cannot run into each other, in hex."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little") + part)
    return whole.hexdigest()[:32]


@dataclass(frozen=True)
class Kept:
    """One prefix of the folder. stem: the name of its files. ids: its tokens, `_WORD` bytes each."""

    stem: str
    ids: bytes

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids) // _WORD

    @property
    def text(self) -> str:
        """The digest of the label."""
        return self.stem.split("-")[1]

    def common(self, ids: bytes) -> int:
        """Leading tokens that it shares with `ids`."""
        same, differ = 0, min(len(self.ids), len(ids)) + 1
        while differ - same > 1:  # the first `same` bytes are equal, the first `differ` are not
            middle = (same + differ) // 2
            if self.ids[same:middle] == ids[same:middle]:
                same = middle
            else:
                differ = middle
        return same // _WORD


class PrefixFolder:
    """The files. See the module.

    Args:
        path: made if it is not there, for its owner alone. max_bytes: of all files together; None: no limit.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._known: dict[str, Kept] = {}  # labels do not change, so each is read once
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _not_saved(path, error) from error

    def kept(self, scope: str) -> list[Kept]:
        """The prefixes of a scope. A label that does not match its name is left out, with a warning."""
        stems = [path.name.removesuffix(LABEL) for path in self.path.glob(f"{scope}-*{LABEL}")]
        self._known = {stem: self._known[stem] for stem in self._known if stem in set(stems) or scope not in stem}
        found = []
        for stem in stems:
            kept = self._known.get(stem) or self._read_label(stem, scope)
            if kept is not None:
                found.append(self._known.setdefault(stem, kept))
        return found

    def _read_label(self, stem: str, scope: str) -> Kept | None:
        path = self.path / (stem + LABEL)
        try:
            label = path.read_bytes()
        except OSError as error:
            _unread(path, error)
            return None
        _, _, ids = label.partition(b"\0")
        kept = Kept(stem, ids)
        if digest(scope.encode(), label) != kept.text:
            log.warning("%s does not match its name: it is damaged and was left out.", path)
            return None
        return kept

    def intact(self, kept: Kept) -> Path | None:
        """The file of a cache, its bytes compared with its name. None: gone, or damaged and now removed."""
        path = self.path / (kept.stem + CACHE)
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            _unread(path, error)
            return None
        if not kept.stem.endswith("-" + content[:32]):
            log.warning("%s does not match its name: it is damaged and was removed.", path)
            self._remove(kept.stem)
            return None
        return path

    def add(self, cache: Cache, scope: str, label: bytes, *, fingerprint: str) -> Path:
        """Save a cache under a label, in the place of an older one of the same label. Raises SaveError."""
        text = digest(scope.encode(), label)
        parts: list[Path] = []
        try:
            parts.append(self._part())
            cache.save(parts[0], fingerprint=fingerprint)
            parts[0].chmod(0o600)
            with parts[0].open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()[:32]
            self._check_size(parts[0].stat().st_size + len(label))
            stem = f"{scope}-{text}-{content}"
            path = self.path / (stem + CACHE)
            parts.append(self._part())
            parts[1].write_bytes(label)
            parts[0].replace(path)
            parts[1].replace(self.path / (stem + LABEL))
        except OSError as error:
            raise _not_saved(self.path, error) from error
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
        self.touch(stem)
        self._evict(stem)
        return path

    def touch(self, stem: str) -> None:
        """It was used now. The time is the store's own: file systems do not note reads reliably."""
        now = time.time_ns()
        try:
            os.utime(self.path / (stem + CACHE), ns=(now, now))
        except OSError as error:
            _unread(self.path / (stem + CACHE), error)

    def _part(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self.path, prefix=".", suffix=".part")  # readable by the owner alone
        os.close(handle)
        return Path(name)

    def _check_size(self, size: int) -> None:
        if self.max_bytes is not None and size > self.max_bytes:
            raise SaveError(
                f"The prefix takes {size:,} bytes, and the store may hold {self.max_bytes:,}.",
                why="nothing was written, and nothing was removed to make room.",
                fix="Raise max_bytes, or keep shorter prefixes.",
                path=str(self.path),
            )

    def _evict(self, newest: str) -> None:
        """Remove what `newest` replaces, what was used least recently until the rest fits, and abandoned parts."""
        used: dict[str, int] = {}  # nanoseconds; 0 for a label without a cache
        sizes: dict[str, int] = {}
        for path, status in self._files():
            if path.suffix == ".part":
                if time.time() - status.st_mtime > _ABANDONED_S:
                    path.unlink(missing_ok=True)
            elif path.suffix in (CACHE, LABEL):
                sizes[path.stem] = sizes.get(path.stem, 0) + status.st_size
                used.setdefault(path.stem, 0)
                if path.suffix == CACHE:
                    used[path.stem] = status.st_mtime_ns
        total, same = sum(sizes.values()), newest.rpartition("-")[0]
        for stem in sorted(sizes, key=lambda stem: (used[stem], stem)):
            # Of one text only the newest stays. Processes that wrote it at once agree on which that is.
            replaced = stem.rpartition("-")[0] == same and (used[stem], stem) < (used.get(newest, 0), newest)
            full = self.max_bytes is not None and total > self.max_bytes
            if stem != newest and (replaced or full):
                self._remove(stem)
                total -= sizes[stem]

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.path.iterdir():
            try:
                yield path, path.stat()
            except FileNotFoundError:
                continue

    def _remove(self, stem: str) -> None:
        for suffix in (LABEL, CACHE):  # first it is no longer found, then it is gone
            try:
                (self.path / (stem + suffix)).unlink(missing_ok=True)
            except PermissionError as error:  # Windows: a reader has it open
                log.info("%s is in use and stays for now (%s).", stem + suffix, error)


def _unread(path: Path, error: OSError) -> None:
    """A prefix that cannot be read is passed over. That another process made room is nothing to warn of."""
    level = logging.DEBUG if isinstance(error, FileNotFoundError) else logging.WARNING
    log.log(level, "%s was passed over: %s", path, error)


def _not_saved(path: Path, error: OSError) -> SaveError:
    return SaveError(
        f"The prefix could not be written to {path}.",
        why=f"{type(error).__name__}: {error}",
        fix="Give a folder that may be written to and has space.",
        path=str(path),
    )
