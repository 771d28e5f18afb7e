"""Numbers added to the token that would complete a given sequence; -inf forbids it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pluglm_decoding_blocks.texts import Texts


class SequenceBias:
    """Adds a sequence's bias to the score of its last token, where the text ends with the tokens before it.

    Source: transformers 5.23 SequenceBiasLogitsProcessor. Biases of several sequences that fit add up.

    Args:
        biases: token ids of a sequence -> what is added; sequences have one token at least.
    """

    def __init__(self, texts: Texts, biases: Mapping[tuple[int, ...], float], device: torch.device) -> None:
        self._texts = texts
        single = {ids[0]: bias for ids, bias in biases.items() if len(ids) == 1}
        self._tokens = torch.tensor(list(single), dtype=torch.int64, device=device)
        self._biases = torch.tensor(list(single.values()), dtype=torch.float32, device=device)
        groups: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for ids, bias in biases.items():
            if len(ids) > 1:
                groups.setdefault(len(ids) - 1, []).append((ids, bias))
        self._groups = [
            (
                torch.tensor([ids[:-1] for ids, _ in group], device=device),  # [P, n - 1]
                torch.tensor([ids[-1] for ids, _ in group], device=device),  # [P]
                torch.tensor([bias for _, bias in group], dtype=torch.float32, device=device),
            )
            for group in groups.values()
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V]."""
        added = torch.zeros_like(scores)
        added[:, self._tokens] = self._biases
        text = self._texts.real(input_ids) if self._groups else input_ids
        for starts, last, biases in self._groups:
            n = starts.shape[1]
            if n <= text.shape[1]:
                fits = (text[:, None, -n:] == starts).all(-1)  # [R, P]
                added.index_add_(1, last, torch.where(fits, biases, 0.0))
        return scores + added


def bad_words(words: Iterable[Sequence[int]], eos: Sequence[int]) -> dict[tuple[int, ...], float]:
    """The biases that forbid these words. A word that is an end token alone is none, or no text could end.

    Source: transformers 5.23 NoBadWordsLogitsProcessor.
    """
    return {tuple(word): -math.inf for word in words if not (len(word) == 1 and word[0] in eos)}
