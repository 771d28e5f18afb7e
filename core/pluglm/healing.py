"""Token healing: a prompt that ends in the middle of a word is continued as if it had been tokenised together with it.

The last token of a prompt is taken away, and the first new one must begin with its text: "https:" + "//" becomes
"https" + "://" where the vocabulary has that. As transformers 5.23 does, only the last token is healed; unlike there,
the choice is the model's among all tokens that fit, in one pass for all rows, and nothing is added to their scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pluglm.errors import InputError
from pluglm.prompts import Prompts

if TYPE_CHECKING:
    from pluglm.contracts.text import Tokenizer


@dataclass(frozen=True)
class Healed:
    """Prompts without their last tokens, and what the first new ones must be.

    Attributes:
        tails: the text taken away of each row; "" where there was nothing to heal: a prompt of one token, or one that
            ends in a token without text.
        allowed: [B, V] bool, the tokens that may come first.
    """

    prompts: Prompts
    tails: tuple[str, ...]
    allowed: torch.Tensor

    def processor(self, width: int) -> Healer:
        """What holds the first new token to `allowed`. width: cells of the padded prompts."""
        return Healer(self.allowed, width)


def heal(prompts: Prompts, tokenizer: Tokenizer | None, vocab_size: int) -> Healed:
    """Take the last tokens away. Raises InputError for a model without a tokenizer."""
    if tokenizer is None:
        raise InputError(
            "token_healing cannot be honoured: this model has no tokenizer.", why="it compares the texts of tokens.",
            fix="Leave it out, or load the model with a tokenizer.", argument="token_healing",
        )  # fmt: skip
    texts = list(tokenizer.token_bytes())
    rows, tails = [], []
    allowed = torch.ones(len(prompts.rows), vocab_size, dtype=torch.bool)
    for row, ids in enumerate(prompts.rows):
        tail = texts[ids[-1]] if len(ids) > 1 and ids[-1] < len(texts) else None
        # A token that holds part of a character only cannot be taken off a text.
        if not tail or not _is_text(tail):
            rows.append(ids)
            tails.append("")
            continue
        fits = [i for i, text in enumerate(texts) if text is not None and text.startswith(tail)]
        allowed[row] = False
        allowed[row, fits] = True
        rows.append(ids[:-1])
        tails.append(tail.decode())
    return Healed(Prompts(tuple(rows), prompts.single), tuple(tails), allowed)


class Healer:
    """A logits processor: the first new token of each row begins with the text that was taken away."""

    def __init__(self, allowed: torch.Tensor, width: int) -> None:
        self._allowed, self._width = allowed, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[R, V] scores; R is a multiple of the prompts, the rows of one prompt behind each other."""
        if input_ids.shape[1] != self._width:
            return scores
        allowed = self._allowed.to(scores.device).repeat_interleave(scores.shape[0] // self._allowed.shape[0], 0)
        return scores.masked_fill(~allowed, -torch.inf)


def without(tails: Sequence[str], row: int, text: str) -> str:
    """A row's new text without what belongs to its prompt."""
    return text[len(tails[row]) :] if tails else text


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
