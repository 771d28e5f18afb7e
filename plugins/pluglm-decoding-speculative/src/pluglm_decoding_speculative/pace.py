"""How far copied guesses reach: as far as the tokens they are likely to save are worth the cells they cost.

A pass runs as many cells of every row as its longest guess has, and cells are not free: where a pass over one token is
bound by memory or by calls, each further one adds a few per cent, and where many rows have filled the machine, nearly
its whole share. So a guess is worth its price only if it is likely to hold, and in a batch one row's guess costs every
row. What is likely is told by the row's own text: what it would have been right to guess is known afterwards, of
guesses that were not made as well. And a batch lasts as long as its slowest row: tokens of rows ahead of it are
worth nothing.

Nothing here looks at a clock: the same call makes the same passes every time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Price of one more cell, next to that of a pass over none at all; by the device's type. Fitted to passes over 1 to 21
#: tokens of 1 to 8 rows: of the model of pluglm-model-pystdlib on one core of a CPU, and taken as next to nothing on an
#: accelerator, where small passes wait for memory.
PRICES = {"cpu": 0.03}
ACCELERATED = 0.002
#: A guess must promise this much more than it costs; what it promises is an estimate.
MARGIN = 1.15
#: The first guess of a batch must promise more. Rows that accept different numbers of tokens leave holes in the cache,
#: and every pass after that reads a mask, guesses or not: 4 % of a pass over eight rows of the same model.
FIRST_MARGIN = 1.8
#: Rows that have as many tokens more before them than the last one will not be the last to end.
CLOSE = 8
#: What is thought of a text that nothing is known of: how often a guess begins right, and how often it goes on so.
STARTS, GOES_ON = 0.2, 0.6
#: How fast that follows what happens.
RATE = 0.1


class Luck:
    """One row's past guesses, made or not: how often the next token of one is right.

    Attributes:
        running: the last token was guessed right, so that the next is likely to be. starts, goes_on: how likely the
            first token of a guess is right if it is not running, and the next one after a right one.
    """

    __slots__ = ("goes_on", "running", "starts")

    def __init__(self) -> None:
        self.running, self.starts, self.goes_on = False, STARTS, GOES_ON

    @property
    def first(self) -> float:
        """How likely the first token of the next guess is right."""
        return self.goes_on if self.running else self.starts

    def learn(self, guess: Sequence[int], tokens: Sequence[int]) -> None:
        """Compare what could have been guessed with what came."""
        for guessed, token in zip(guess, tokens, strict=False):
            right = guessed == token
            if self.running:
                self.goes_on += RATE * (right - self.goes_on)
            else:
                self.starts += RATE * (right - self.starts)
            self.running = right
            if not right:
                return
        if not guess:
            self.running = False


def late(room: Mapping[int, int]) -> list[int]:
    """The rows that a batch waits for. room: row -> tokens that it may still have."""
    most = max(room.values())
    return [row for row, left in room.items() if left >= most - CLOSE]


def reach(
    guesses: Mapping[int, Sequence[int]], luck: Sequence[Luck], price: float, counted: Sequence[int],
    margin: float = MARGIN,
) -> int:  # fmt: skip
    """Tokens that the guesses of the next pass may have: the number that gives the most tokens for the price.

    Args:
        guesses: row -> what may be guessed. luck: of every row that the pass runs.
        price: of one cell; 0: guesses are as long as may be. counted: the rows whose tokens are worth something.
        margin: what the guesses must promise, next to a pass without any.
    """
    longest = max(map(len, guesses.values()), default=0)
    if not price:
        return longest
    rows, best, most = len(luck), 0, 0.0
    gain = plain = 1.0  # tokens of a counted row
    going = {row: luck[row].first for row in counted if row in guesses}
    plain /= 1 + price * rows
    for count in range(1, longest + 1):
        for row, chance in going.items():
            if len(guesses[row]) >= count:
                gain += chance / len(counted)
                going[row] = chance * luck[row].goes_on
        worth = gain / (1 + price * rows * (count + 1))
        if worth > max(most, margin * plain):
            best, most = count, worth
    return best
