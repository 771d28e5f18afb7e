"""Whether a contender computes the model: its logits against those of the same weights in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Bits of a weight -> how far logits may be apart over all positions, and at the worst one; and the least agreement.
#: About twice what working contenders show. Unrelated logits are 1.4 apart.
TRAINED = {32: (1e-3, 1e-2, 0.99), 16: (0.03, 0.1, 0.85), 8: (0.06, 0.2, 0.75), 4: (0.4, 0.8, 0.4)}
#: Random weights lose more, the deeper the more; their best token leads by little, and with 4 bits mostly loses.
RANDOM = {32: (1e-3, 1e-2, 0.99), 16: (0.05, 0.15, 0.75), 8: (0.12, 0.3, 0.7), 4: (0.8, 0.95, 0.0)}


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        error: |got - reference| / |reference| over all positions, both about a position's mean logit. worst: the
            largest of one position.
        agreement: share of positions at which the reference's best token is the contender's, or equal to its best.
        wrong: why its times do not count, or None.
    """

    error: float
    worst: float
    agreement: float
    wrong: str | None = None


def compare(reference: np.ndarray, got: np.ndarray, bits: int, *, trained: bool) -> Verdict:
    """Logits [N, B, V] of both, over the same forced tokens; of a trained model, or of random weights."""
    if reference.shape != got.shape:
        return Verdict(float("inf"), float("inf"), 0.0, f"logits are {list(got.shape)}, not {list(reference.shape)}")
    if not np.isfinite(got).all():
        return Verdict(float("inf"), float("inf"), 0.0, "logits are not finite")
    centred = reference - reference.mean(-1, keepdims=True)
    apart = (got - got.mean(-1, keepdims=True)) - centred
    error = float(np.linalg.norm(apart) / np.linalg.norm(centred))
    worst = float((np.linalg.norm(apart, axis=-1) / np.linalg.norm(centred, axis=-1)).max())
    best = reference.argmax(-1)[..., None]
    agreement = float((np.take_along_axis(got, best, -1)[..., 0] >= got.max(-1)).mean())
    most, most_of_one, least = (TRAINED if trained else RANDOM)[bits]
    wrong = None
    if error > most:
        wrong = f"logits are {error:.2g} apart, more than {most:g}"
    elif worst > most_of_one:
        wrong = f"logits of one position are {worst:.2g} apart, more than {most_of_one:g}"
    elif agreement < least:
        wrong = f"the best token agrees at {agreement:.0%} of the positions, fewer than {least:.0%}"
    return Verdict(error, worst, agreement, wrong)


def chosen_by(logits: np.ndarray, tokens: list[int]) -> bool:
    """Whether each row's token has the highest of its logits [B, V]; where several have it, any will do."""
    rows = np.arange(len(tokens))
    return bool((logits[rows, tokens] >= logits.max(-1)).all())
