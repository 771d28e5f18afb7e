"""How a token is chosen where another was guessed: by matching, or by the acceptance rule of speculative sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pluglm_decoding_blocks.best import most_likely
from pluglm_decoding_blocks.draw import draw
from pluglm_decoding_blocks.rng import ACCEPTANCES, DRAFTS, Uniforms
from pluglm_decoding_blocks.warpers import Warpers
from torch import Tensor

from pluglm.contracts import GenerationConfig

#: A guessed token, and the distribution [V] that it was drawn from if it was.
Guess = tuple[int, Tensor | None]


class Greedy:
    """The most likely token, whatever was guessed. A guess that equals it saved a pass."""

    #: What reshapes the distribution, among the processors.
    warpers: Warpers | None = None

    def choose(
        self, scores: Tensor, rows: Sequence[int], indices: Sequence[int], guesses: Sequence[Guess | None]
    ) -> list[int]:
        """New token indices[i] of each of `rows`. scores: [n, V], processed. guesses: of each, for this token."""
        return _listed(most_likely(scores)[1])

    def guess(self, scores: Tensor, rows: Sequence[int], indices: Sequence[int]) -> list[int]:
        """What an assistant with these scores guesses for new token indices[i] of each of `rows`."""
        return self.choose(scores, rows, indices, ())


class Sampled:
    """The draw that plain sampling makes with the same seed, whatever was guessed.

    For a guess that was not drawn this *is* speculative sampling: it is accepted with probability p(guess), and any
    other token comes with what remains of p (Leviathan et al. 2023, algorithm 1, with q all on one token). The tokens
    are those of plain sampling, one for one.

    Args:
        seeds: [R] int64.
    """

    def __init__(self, config: GenerationConfig, seeds: Tensor) -> None:
        self.warpers = Warpers([config], seeds.device)
        self._numbers = Uniforms(seeds)

    def choose(
        self, scores: Tensor, rows: Sequence[int], indices: Sequence[int], guesses: Sequence[Guess | None]
    ) -> list[int]:
        """As `Greedy.choose`."""
        return _listed(draw(scores, self._numbers.each(rows, indices)))


class SpeculativeSampled(Sampled):
    """Speculative sampling against an assistant that draws its guesses.

    A guess x that was drawn from q is accepted with probability min(1, p(x) / q(x)); otherwise the token is drawn from
    max(0, p - q), normalised. So the tokens are distributed as p says, and guesses are accepted as often as possible.
    Every number that decides depends on the row's seed and the token's place alone.

    Source: Leviathan, Kalman, Matias 2023, "Fast inference from transformers via speculative decoding", section 2.3.
    """

    def __init__(self, config: GenerationConfig, seeds: Tensor) -> None:
        super().__init__(config, seeds)
        self._guessing, self._accepting = Uniforms(seeds, DRAFTS), Uniforms(seeds, ACCEPTANCES)

    def choose(
        self, scores: Tensor, rows: Sequence[int], indices: Sequence[int], guesses: Sequence[Guess | None]
    ) -> list[int]:
        """As `Greedy.choose`; a guess without a distribution is compared with the draw, see `Sampled`."""
        p = probabilities(scores)  # [n, V]
        numbers = self._numbers.each(rows, indices)
        tried = [(i, guess) for i, guess in enumerate(guesses) if guess is not None and guess[1] is not None]
        if not tried:
            return _listed(draw(p.log(), numbers))
        at = torch.tensor([i for i, _ in tried], device=p.device)
        x = torch.tensor([token for _, (token, _) in tried], device=p.device)[:, None]
        q = torch.stack([drawn_from for _, (_, drawn_from) in tried if drawn_from is not None])  # [m, V]
        chance = self._accepting.each(rows, indices)[at, None]
        accepted = chance * q.gather(1, x) < p[at].gather(1, x)  # [m, 1]
        p[at] = torch.where(accepted, p[at], _residual(p[at], q))
        drawn = draw(p.log(), numbers)
        drawn[at] = torch.where(accepted, x, drawn[at, None])[:, 0]
        return _listed(drawn)

    def guess(self, scores: Tensor, rows: Sequence[int], indices: Sequence[int]) -> list[int]:
        """As `Greedy.guess`, drawn from the assistant's own distribution."""
        return _listed(draw(scores, self._guessing.each(rows, indices)))


Chooser = Greedy | Sampled
#: Those that an assistant can guess for.
Guesser = Greedy | SpeculativeSampled


def _listed(tokens: Tensor) -> list[int]:
    listed: list[int] = tokens.tolist()
    return listed


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), not normalised; p itself where rounding leaves nothing of it. p, q: [m, V] float64."""
    rest = (p - q).clamp_(min=0)
    return torch.where(rest.any(-1, keepdim=True), rest, p)


def probabilities(scores: Tensor) -> Tensor:
    """[n, V] float64 of processed scores: what guesses are drawn from."""
    return torch.softmax(scores.double(), -1)
