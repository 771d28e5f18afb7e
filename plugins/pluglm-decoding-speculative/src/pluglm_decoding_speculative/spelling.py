"""One row's text in two vocabularies: what the model wrote, spelt as the assistant reads it, and guesses spelt back.

Guesses are text. New tokens of the model become text, the text the assistant's ids; the assistant's guess becomes text,
and this the model's ids. At a border, a tokenizer may spell the same text otherwise once more of it is known: so the
last few tokens before a border are spelt anew, each time, and what comes out the same is kept.

Source: Timor et al. 2025, "Accelerating LLM inference with lossless speculative decoding algorithms for heterogeneous
vocabularies", section 3.1 (string-level exact match); names of the settings as in transformers 5.23. There the two
spellings are aligned by their longest common run of ids; here by their common start, and by text where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

#: What a tokenizer makes of bytes that are not yet a character.
UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class Spelling:
    """A tokenizer. decode: ids -> text, special tokens left out. encode: text -> ids, none added."""

    decode: Callable[[Sequence[int]], str]
    encode: Callable[[str], Sequence[int]]


class Bilingual:
    """One row.

    Args:
        prompt: real tokens of the model's. model, assistant: their spellings. start: what the assistant's text begins
            with (its BOS). model_lookbehind, assistant_lookbehind: tokens that are spelt anew at a border, of the text
            of the one and of the other.

    Attributes:
        ids: the text in the assistant's ids.
    """

    def __init__(
        self, prompt: Sequence[int], model: Spelling, assistant: Spelling, *, start: Sequence[int],
        model_lookbehind: int, assistant_lookbehind: int,
    ) -> None:  # fmt: skip
        self._model, self._assistant, self._start = model, assistant, list(start)
        self._model_back, self._assistant_back = model_lookbehind, assistant_lookbehind
        self._tokens = list(prompt)
        self.ids = [*start, *assistant.encode(model.decode(self._tokens))]

    def extend(self, tokens: Sequence[int]) -> None:
        """The model wrote more."""
        tail = self._tokens[-self._model_back :]
        self._tokens += tokens
        before = self._spelt(tail)
        after = self._spelt([*tail, *tokens])
        kept = _common_start(before, after)
        # A window that begins inside a word may be spelt otherwise there: what counts is that the ends are the same.
        same = _common_end(before, self.ids)
        if len(before) - kept > same:
            self.ids = [*self._start, *self._spelt(self._tokens)]
            return
        del self.ids[len(self.ids) - (len(before) - kept) :]
        self.ids += after[kept:]

    def _spelt(self, tokens: Sequence[int]) -> list[int]:
        return list(self._assistant.encode(self._model.decode(tokens)))

    def back(self, guess: Sequence[int]) -> list[int]:
        """An assistant's guess in the model's ids; [] where it says nothing, or nothing that can be told yet."""
        tail = self.ids[-self._assistant_back :]
        before, after = (self._assistant.decode([*tail, *more]).rstrip(UNFINISHED) for more in ((), guess))
        if not after.startswith(before):
            return []
        text = after[len(before) :].partition(UNFINISHED)[0]
        if not text:
            return []
        window = self._model.decode(self._tokens[-self._model_back :])
        alone, together = self._model.encode(window), self._model.encode(window + text)
        if _common_start(alone, together) == len(alone):
            return list(together[len(alone) :])
        return list(self._model.encode(text))  # the border falls inside a token of the two together


def _common_start(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two spellings have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    return _common_start(a[::-1], b[::-1])
