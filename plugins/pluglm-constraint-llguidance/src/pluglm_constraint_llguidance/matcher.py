"""One text under a grammar. End tokens, control tokens and errors are seen to here; the rest is llguidance's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llguidance import LLMatcher
from torch import Tensor

from pluglm.contracts import Grammar
from pluglm.errors import GrammarError, InputError
from pluglm_constraint_llguidance.syntax import malformed

#: What llguidance says where the text cannot go on with any token, nor end.
_DEAD_END = "NoExtensionBias"


@dataclass(frozen=True)
class Vocabulary:
    """What masks are made with.

    Attributes:
        text_bits, end_bits: [W] int32, the tokens that add text and those that end one.
        textless: ids of tokens without text, end tokens among them.
    """

    size: int
    text_bits: Tensor
    end_bits: Tensor
    textless: frozenset[int]

    @property
    def words(self) -> int:
        """W, int32 words of one mask."""
        return self.text_bits.shape[0]


class LLGuidanceMatcher:
    """See `pluglm.contracts.Matcher`.

    Args:
        count: tokens that `matcher` has accepted.
    """

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary, grammar: Grammar, count: int = 0) -> None:
        self._matcher, self._vocabulary, self._grammar, self._count = matcher, vocabulary, grammar, count

    @property
    def accepting(self) -> bool:
        """The text may end here."""
        return self._matcher.is_accepting()

    @property
    def finished(self) -> bool:
        """The text must end here."""
        masks = torch.empty(1, self._vocabulary.words, dtype=torch.int32)
        self._texts(masks, 0)
        return self.accepting and not bool(masks.any())

    def allow(self, masks: Tensor, row: int) -> None:
        """Write which tokens may come next."""
        if masks.dtype != torch.int32 or masks.stride() != (self._vocabulary.words, 1) or not 0 <= row < len(masks):
            raise InputError(
                f"row {row} of a {tuple(masks.shape)} mask of {masks.dtype} cannot be written.",
                why=f"it must be [R, {self._vocabulary.words}] of int32, contiguous.", argument="masks",
            )  # fmt: skip
        self._texts(masks, row)
        if self._matcher.is_accepting():
            masks[row] |= self._vocabulary.end_bits

    def _texts(self, masks: Tensor, row: int) -> None:
        """Write which tokens that add text may come next."""
        size = self._vocabulary.words * 4
        self._matcher.unsafe_compute_mask_ptr(masks.data_ptr() + row * size, size)
        # A dead end is no error: no token fits, and the library would allow end tokens, which are cut off below.
        if self._matcher.is_error() and not (why := self._matcher.get_error()).startswith(_DEAD_END):
            raise malformed(self._grammar, why)
        masks[row] &= self._vocabulary.text_bits

    def accept(self, token_id: int) -> None:
        """Take a token of the text."""
        known = 0 <= token_id < self._vocabulary.size and token_id not in self._vocabulary.textless
        if not known or self._matcher.try_consume_tokens([token_id]) != 1:
            raise GrammarError(
                f"token {token_id} is not allowed after {self._count} tokens under this {self._grammar.kind}.",
                why="the text would no longer be the beginning of one of its texts." if known
                else "it adds no text; end tokens are not accepted.",
                fix="Choose among the tokens that `allow` gives.", argument="token_id", grammar=self._grammar.kind,
            )  # fmt: skip
        self._count += 1

    def rollback(self, count: int) -> None:
        """Take back the last tokens."""
        if not 0 <= count <= self._count:
            raise InputError(
                f"{count} tokens cannot be taken back: {self._count} were accepted.", argument="count"
            )  # fmt: skip
        if count:
            self._matcher.rollback(count)
            self._count -= count

    def fork(self) -> LLGuidanceMatcher:
        """A matcher of the same text that goes its own way."""
        return LLGuidanceMatcher(self._matcher.deep_copy(), self._vocabulary, self._grammar, self._count)
