"""Which phrases a completion holds, told token by token, and how many more tokens it needs to hold them all.

The phrases are the words of one automaton (Aho and Corasick 1975, "Efficient string matching", section 2), so every
occurrence is seen, whatever the phrases share: beginnings, ends, or one inside another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pluglm.errors import InputError
from pluglm_decoding_beam.phrases import Alternatives, Phrase

#: (node of the automaton, bits of the constraints that are met).
State = tuple[int, int]
START: State = (0, 0)
#: Constraints that share tokens with others, at most: each doubles the table of distances.
MOST_OVERLAPPING = 12
_FAR = 1 << 30


class Tracker:
    """The constraints of one call.

    Args:
        constraints: each asks for one of its alternatives.
        argument: whose name errors carry.

    Attributes:
        tokens: all that occur in a phrase, by id.
    """

    def __init__(self, constraints: Sequence[Alternatives], argument: str = "force_words_ids") -> None:
        self.tokens = tuple(sorted({token for c in constraints for phrase in c for token in phrase}))
        self._children: list[dict[int, int]] = [{}]
        self._ends = [0]
        #: node -> constraint -> tokens that its nearest alternative through this node still has
        self._left: list[dict[int, int]] = [{}]
        for number, alternatives in enumerate(constraints):
            for phrase in alternatives:
                self._insert(number, phrase)
        self._link()
        self._all = (1 << len(constraints)) - 1
        self._shortest = dict(self._left[0])
        overlapping = [i for i in self._shortest if any(_overlap(constraints[i], c) for c in _others(constraints, i))]
        if len(overlapping) > MOST_OVERLAPPING:
            raise InputError(
                f"{len(overlapping)} phrases share tokens with other phrases; {MOST_OVERLAPPING} can be honoured.",
                why="how few tokens can hold them all has to be known exactly, and that takes twice as long for each.",
                fix="Ask for fewer, or join those that follow each other to one phrase.", argument=argument,
            )  # fmt: skip
        self._alone = tuple(i for i in self._shortest if i not in overlapping)
        self._bits = tuple(1 << i for i in overlapping)
        self._table = self._distances()
        self._known: dict[State, int] = {}

    def step(self, state: State, token: int) -> State:
        """After one more token."""
        node = self._next(state[0], token)
        return node, state[1] | self._ends[node]

    def need(self, state: State) -> int:
        """How many tokens must follow, at least, until every constraint is met; exact."""
        known = self._known.get(state)
        if known is None:
            known = self._known[state] = self._need(*state)
        return known

    def restarted(self, state: State) -> State:
        """The same constraints met, and no phrase begun: what any token of no phrase leads to."""
        return 0, state[1]

    def _insert(self, number: int, phrase: Phrase) -> None:
        node = 0
        for done, token in enumerate((*phrase, None)):
            left = self._left[node]
            left[number] = min(left.get(number, _FAR), len(phrase) - done)
            if token is None:
                self._ends[node] |= 1 << number
                return
            if token not in self._children[node]:
                self._children[node][token] = len(self._children)
                self._children.append({})
                self._ends.append(0)
                self._left.append({})
            node = self._children[node][token]

    def _link(self) -> None:
        """Each node's longest proper end that begins a phrase, and what it knows; nodes nearer the root come first."""
        self._fall = [0] * len(self._children)
        queue = list(self._children[0].values())
        for node in queue:
            fall = self._fall[node]
            self._ends[node] |= self._ends[fall]
            for number, left in self._left[fall].items():
                self._left[node][number] = min(self._left[node].get(number, _FAR), left)
            for token, child in self._children[node].items():
                self._fall[child] = self._next(fall, token)
                queue.append(child)

    def _next(self, node: int, token: int) -> int:
        while node and token not in self._children[node]:
            node = self._fall[node]
        return self._children[node].get(token, 0)

    def _need(self, node: int, met: int) -> int:
        """Phrases that share nothing follow one another. Only one that has begun is continued: either one of those, or
        some that overlap, for which the table knows the best order."""
        open_ = [i for i in self._alone if not met >> i & 1]
        rest = sum(self._shortest[i] for i in open_)
        row = self._table[self._packed(met)]
        saved = max((self._shortest[i] - self._left[node][i] for i in open_), default=0)
        return min(rest + row[node], rest - saved + row[0])

    def _packed(self, bits: int) -> int:
        """The bits of the overlapping constraints alone, side by side."""
        return sum(1 << i for i, bit in enumerate(self._bits) if bits & bit)

    def _distances(self) -> list[list[int]]:
        """[met overlapping constraints, packed][node]: the fewest tokens until all overlapping ones are met."""
        nodes, count = len(self._children), 1 << len(self._bits)
        table = torch.zeros(count, nodes, dtype=torch.int64)
        if self._bits:
            to = torch.tensor([[self._next(node, token) for token in self.tokens] for node in range(nodes)])  # [N, T]
            gained = torch.tensor([self._packed(ends) for ends in self._ends])[to]  # [N, T]
            for met in range(count - 2, -1, -1):
                after = gained | met
                table[met] = _FAR
                while True:  # once for each token of the longest way to the next phrase
                    better = (1 + table[after, to]).amin(1)
                    if torch.equal(better, table[met]):
                        break
                    table[met] = better
        rows: list[list[int]] = table.tolist()
        return rows


def _others(constraints: Sequence[Alternatives], number: int) -> list[Alternatives]:
    return [c for i, c in enumerate(constraints) if i != number]


def _overlap(one: Alternatives, other: Alternatives) -> bool:
    """Can occurrences of the two share a token?"""
    return any(_share(a, b) or _share(b, a) for a in one for b in other)


def _share(a: Phrase, b: Phrase) -> bool:
    """Does `b` begin inside `a`?"""
    return any(a[i : i + len(b)] == b[: len(a) - i] for i in range(len(a)))
