"""Holds what is generated to grammars: a logits processor that follows whatever texts a strategy asks about.

Greedy decoding adds a token to every row; a beam search moves rows about; speculative decoding asks about guesses and
goes back. All of them show the processor their rows as token ids, so it looks at these alone: for each row it takes the
matcher whose text has the most in common with the row's, copies it if another row needs it too, takes back what
differs and accepts the rest. The usual step is one accepted token and one mask a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pluglm.contracts.constraint import Matcher
from pluglm.errors import GenerationError, GrammarError

#: "going": the grammar says what comes next. "ended": behind an end token anything goes, it is padding. "lost": the
#: text is not the grammar's, so nothing may follow.
State = Literal["going", "ended", "lost"]


class ConstraintProcessor:
    """A logits processor for one call.

    Rows of a prompt stand behind each other: row r of R belongs to prompt r // (R / B). Where a strategy shows other
    rows, each is told by its prompt.

    Args:
        roots: a matcher of the empty text for each prompt, the same object where the grammar is the same; None:
            anything goes. They stay as they are.
        prompts: [B, S] as the strategy was given them; what stands behind S cells is new text.
        eos_token_ids: end a row.
    """

    def __init__(self, roots: Sequence[Matcher | None], prompts: Tensor, eos_token_ids: Sequence[int]) -> None:
        self._roots, self._prompts, self._eos = list(roots), prompts, frozenset(eos_token_ids)
        self._one_for_all = len({id(root) for root in roots}) == 1
        self._twins = not self._one_for_all and len(set(map(tuple, prompts.tolist()))) < len(prompts)
        self._rows: int | None = None  # of the first call
        self._followed: list[Followed | None] = []
        self._spare: list[Followed] = []
        self._seen: Tensor | None = None  # [R, capacity] new tokens of the last call, of which `_length` count
        self._length = 0
        self._masks: Tensor | None = None  # [R, W] int32 on the CPU
        self._bits = torch.arange(32, dtype=torch.int32, device=prompts.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Forbid what the grammars do.

        Args:
            input_ids: [R, S + n], any texts with n new tokens. scores: [R, V], changed in place.
        Returns: `scores`, -inf where a token is not allowed.
        Raises: GenerationError if a row's prompt is none of the call's; GrammarError as `Matcher.allow`.
        """
        roots = self._roots_of(input_ids)
        told = self._told(input_ids[:, self._prompts.shape[1] :], roots)
        sources = [self._source(row, root, news) for row, (root, news) in enumerate(zip(roots, told, strict=True))]
        uses = Counter(id(source) for source in sources)
        kept = {id(source) for source in sources}
        unused = [one for one in (*self._followed, *self._spare) if one is not None and id(one) not in kept]
        followed: list[Followed | None] = []
        for root, source, news in zip(roots, sources, told, strict=True):
            if source is None:
                source = Followed(root, root.fork(), []) if root is not None else None
            elif uses[id(source)] > 1:
                uses[id(source)] -= 1
                source = source.fork()
            if source is not None and isinstance(news, list):
                source.follow(news, self._eos)
            elif source is not None and isinstance(news, int) and source.state == "going":
                source.append(news, self._eos)
            followed.append(source)
        self._followed = followed
        # A strategy that asks about some rows only will come back to the others.
        self._spare = unused[: self._rows] if self._rows != len(roots) or self._spare else []
        return self._masked(scores)

    def _roots_of(self, input_ids: Tensor) -> list[Matcher | None]:
        """The root of each row."""
        rows, B = len(input_ids), len(self._roots)
        first = self._rows is None
        self._rows = rows if first else self._rows
        if self._one_for_all:
            return self._roots[:1] * rows
        heads = input_ids[:, : self._prompts.shape[1]]
        # Equal prompts with different grammars are told by their place alone, so all rows must be there.
        by_place = rows % B == 0 and (rows == self._rows or not self._twins)
        if by_place and torch.equal(heads, self._prompts.repeat_interleave(rows // B, 0)):
            return [root for root in self._roots for _ in range(rows // B)]
        fits = (heads[:, None] == self._prompts).all(-1).tolist()  # [R][B]
        found: list[Matcher | None] = []
        for row, places in enumerate(fits):
            roots = {id(root): root for root, fit in zip(self._roots, places, strict=True) if fit}
            if len(roots) != 1:
                raise GenerationError(
                    f"the strategy shows a row {row} whose grammar is not known.",
                    why="its prompt is none of the call's." if not roots
                    else "several prompts of the call are equal to its own and have different grammars.",
                    fix="Pass prompts with different grammars one by one, or name another strategy.",
                    rows=(row,), step=input_ids.shape[1] - self._prompts.shape[1],
                )  # fmt: skip
            found.extend(roots.values())
        return found

    def _told(self, new: Tensor, roots: Sequence[Matcher | None]) -> list[int | list[int]]:
        """What is new of each row: its last token if it was told all others by the last call, else its whole text.

        In the usual step that is one transfer of two numbers a row; the comparison is made where the ids are.
        """
        rows, n = new.shape
        told: list[int | list[int]]
        if self._seen is not None and len(self._seen) == rows and 0 < n == self._length + 1:
            grown = (new[:, :-1] == self._seen[:, : n - 1]).all(1)
            last: list[list[int]] = torch.stack((new[:, -1], grown.long()), 1).tolist()
            told = [token for token, _ in last]
            before = [one.root if one is not None else None for one in self._followed]
            moved = [row for row, (_, same) in enumerate(last) if not same or before[row] is not roots[row]]
            if moved:
                for row, text in zip(moved, new[moved].tolist(), strict=True):
                    told[row] = text
        else:
            moved = list(range(rows))
            told = list(new.tolist())
        if self._seen is None or len(self._seen) != rows or self._seen.shape[1] < n:
            self._seen = new.new_empty(rows, max(64, 2 * n))
            moved = list(range(rows))
        if moved:
            self._seen[:, :n] = new
        else:
            self._seen[:, n - 1] = new[:, -1]
        self._length = n
        return told

    def _source(self, row: int, root: Matcher | None, news: int | list[int]) -> Followed | None:
        """What a row's text is followed from: the nearest that is there; None: from its root."""
        if root is None:
            return None
        own = self._followed[row] if row < len(self._followed) else None
        if isinstance(news, int):
            return own
        best, most = None, -1
        for one in (own, *self._followed, *self._spare):
            if one is not None and one.root is root and (common := shared(one.tokens, news)) > most:
                best, most = one, common
                if most + 1 >= len(news):
                    break
        return best

    def _masked(self, scores: Tensor) -> Tensor:
        rows, V = scores.shape
        if self._masks is None or len(self._masks) < rows:
            self._masks = torch.empty(rows, -(-V // 32), dtype=torch.int32)
        masks = self._masks
        for row, one in enumerate(self._followed):
            if one is not None and one.state == "going":
                one.matcher.allow(masks, row)
            else:
                masks[row].fill_(0 if one is not None and one.state == "lost" else -1)
        return scores.masked_fill_(self._forbidden(masks[:rows], V, scores.device), -torch.inf)

    def _forbidden(self, masks: Tensor, V: int, device: torch.device) -> Tensor:
        """[R, V] bool: the bits that are not set, one by one."""
        if device.type == "cpu":  # numpy unpacks bits in one call, torch in four
            octets = (~masks).numpy().astype("<i4", copy=False).view(np.uint8)
            return torch.from_numpy(np.unpackbits(octets, axis=1, count=V, bitorder="little")).view(torch.bool)
        words = masks.to(device)  # waits for the copy, so `masks` may be written again
        return ((words[:, :, None] >> self._bits) & 1).view(len(masks), -1)[:, :V] == 0


@dataclass
class Followed:
    """A text and its matcher.

    Attributes:
        root: the matcher of the empty text under the same grammar. tokens: those that `matcher` has accepted.
        state: of the row that it was last followed for.
    """

    root: Matcher
    matcher: Matcher
    tokens: list[int]
    state: State = "going"

    def fork(self) -> Followed:
        """A copy that goes its own way."""
        return Followed(self.root, self.matcher.fork(), self.tokens.copy(), self.state)

    def follow(self, text: Sequence[int], eos: frozenset[int]) -> None:
        """Go to another text."""
        kept = shared(self.tokens, text)
        if kept < len(self.tokens):
            self.matcher.rollback(len(self.tokens) - kept)
            del self.tokens[kept:]
        self.state = "going"
        for token in text[kept:]:
            if self.state == "going":
                self.append(token, eos)

    def append(self, token: int, eos: frozenset[int]) -> None:
        """Go one token on. One that the grammar forbids has been chosen by nobody: it is padding, or a guess."""
        if token in eos:
            self.state = "ended"
            return
        try:
            self.matcher.accept(token)
        except GrammarError:
            self.state = "lost"
        else:
            self.tokens.append(token)


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low < high:  # the first `low` are equal, the first `high + 1` are not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
