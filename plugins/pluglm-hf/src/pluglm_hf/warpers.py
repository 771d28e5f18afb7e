"""What reshapes the distribution before a draw, under the names and constructors of transformers 5.23."""

from __future__ import annotations

from typing import Any

import torch
from pluglm_decoding_blocks import entropy
from pluglm_decoding_blocks.warpers import keep_best, keep_likely, keep_mass
from torch import Tensor

from pluglm_hf.processors import LogitsProcessor, count, positive, senseless


class TemperatureLogitsWarper(LogitsProcessor):
    """Divides the scores. temperature: > 0."""

    def __init__(self, temperature: float) -> None:
        self.temperature = positive("temperature", temperature)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]."""
        return scores / self.temperature


class _Filter(LogitsProcessor):
    """Forbids tokens, all but `min_tokens_to_keep` of the best; what is forbidden gets `filter_value`."""

    def __init__(self, filter_value: float, min_tokens_to_keep: int = 1) -> None:
        self.filter_value = filter_value
        self.min_tokens_to_keep = count("min_tokens_to_keep", min_tokens_to_keep, least=1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]."""
        kept = self._kept(scores)
        if self.filter_value == -torch.inf:
            return kept
        return kept.masked_fill((kept == -torch.inf) & (scores != -torch.inf), self.filter_value)

    def _kept(self, scores: Tensor) -> Tensor:
        """Scores with -inf for what is forbidden."""
        raise NotImplementedError


class TopKLogitsWarper(_Filter):
    """The k best stay, and ties with the k-th."""

    def __init__(self, top_k: int, filter_value: float = -torch.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.top_k = max(count("top_k", top_k, least=1), min_tokens_to_keep)

    def _kept(self, scores: Tensor) -> Tensor:
        return keep_best(scores, torch.tensor([[self.top_k]], device=scores.device), self.top_k)


class TopPLogitsWarper(_Filter):
    """The smallest set whose mass is `top_p` stays."""

    def __init__(self, top_p: float, filter_value: float = -torch.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.top_p = _share("top_p", top_p)

    def _kept(self, scores: Tensor) -> Tensor:
        return keep_mass(scores, _one(1 - self.top_p, scores), _on(scores), self.min_tokens_to_keep)


class MinPLogitsWarper(_Filter):
    """Tokens stay that are at least `min_p` times as likely as the best one."""

    def __init__(self, min_p: float, filter_value: float = -torch.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.min_p = _share("min_p", min_p)

    def _kept(self, scores: Tensor) -> Tensor:
        return keep_likely(scores, _one(self.min_p, scores), self.min_tokens_to_keep)


class TopHLogitsWarper(_Filter):
    """The best tokens stay whose parts of the entropy add up to `top_h` of it."""

    def __init__(self, top_h: float, filter_value: float = -torch.inf) -> None:
        super().__init__(filter_value)
        self.top_h = _share("top_h", top_h)

    def _kept(self, scores: Tensor) -> Tensor:
        return entropy.top_h(scores, _one(self.top_h, scores), _on(scores))


class TypicalLogitsWarper(_Filter):
    """The tokens stay whose information is nearest to the expected one, until they have `mass` together."""

    def __init__(self, mass: float = 0.9, filter_value: float = -torch.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.mass = _share("mass", mass)

    def _kept(self, scores: Tensor) -> Tensor:
        return entropy.typical(scores, _one(self.mass, scores), _on(scores), self.min_tokens_to_keep)


class EpsilonLogitsWarper(_Filter):
    """Tokens of a probability below `epsilon` go."""

    def __init__(self, epsilon: float, filter_value: float = -torch.inf, min_tokens_to_keep: int = 1) -> None:
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = _share("epsilon", epsilon)

    def _kept(self, scores: Tensor) -> Tensor:
        return entropy.epsilon(scores, _one(self.epsilon, scores), self.min_tokens_to_keep)


class EtaLogitsWarper(_Filter):
    """As epsilon, below less where many tokens are likely. device: not needed here."""

    def __init__(
        self, epsilon: float, filter_value: float = -torch.inf, min_tokens_to_keep: int = 1, device: Any = "cpu"
    ) -> None:  # fmt: skip
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = torch.tensor(_share("epsilon", epsilon), device=device)

    def _kept(self, scores: Tensor) -> Tensor:
        return entropy.eta(scores, self.epsilon.to(scores.device).reshape(1, 1), self.min_tokens_to_keep)


def _one(value: float, scores: Tensor) -> Tensor:
    return torch.tensor([[value]], device=scores.device)


def _on(scores: Tensor) -> Tensor:
    """No row is left alone."""
    return torch.zeros(1, 1, dtype=torch.bool, device=scores.device)


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise senseless(name, value, "a number from 0 to 1")
    return float(value)
