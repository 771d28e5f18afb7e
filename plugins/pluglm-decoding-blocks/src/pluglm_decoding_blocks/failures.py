"""What goes wrong while tokens are chosen, as typed errors that name the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pluglm.errors import GenerationError, UnsupportedRequestError
from pluglm.generation import EXTRA_SAMPLING, SAMPLING


def no_token(best: Mapping[int, float], step: int) -> GenerationError:
    """The error for rows whose best score is not a finite number, so that no token can be chosen.

    Args:
        best: row -> its best score. step: how many new tokens came before.
    """
    rows = tuple(sorted(best))
    named = f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"
    if all(value == -math.inf for value in best.values()):
        return GenerationError(
            f"every token is forbidden for {named} at new token {step}.",
            why="after the logits processors all scores are -inf.",
            fix="Let the processors (or min_new_tokens with the end tokens, or prefix_allowed_tokens_fn) leave at "
            "least one token.",
            rows=rows, step=step,
        )  # fmt: skip
    return GenerationError(
        f"the scores of {named} at new token {step} are not finite numbers, so no token was chosen.",
        why="the model's logits, or a logits processor, hold NaN or infinity: damaged weights, a dtype of too small a "
        "range, a processor's division by zero, or a temperature that is too small.",
        fix="Run the other rows again without these. Try dtype='float32', and leave out the processors.",
        rows=rows, step=step,
    )  # fmt: skip


def not_honoured(strategy: str, said: Mapping[str, Any], honoured: frozenset[str]) -> UnsupportedRequestError:
    """The error for fields of a GenerationConfig that a strategy does not know, with a reason for each."""
    reasons = []
    for name in sorted(set(said) - honoured):
        near = get_close_matches(name, honoured, 1)
        hint = f' (did you mean "{near[0]}"?)' if near else ""
        if strategy == "greedy" and name in (*SAMPLING, *EXTRA_SAMPLING):
            hint = ': it always takes the most likely token; decoding="sampling" honours it'
        reasons.append(f"{name}={said[name]!r} is not honoured{hint}")
    return UnsupportedRequestError(
        f'decoding "{strategy}" cannot honour the request.',
        why="\n".join(reasons),
        fix=f"Leave these out, or name another strategy. It honours: {', '.join(sorted(honoured))}.",
        reasons=tuple(reasons),
    )


def refused(strategy: str, reasons: Sequence[str], fix: str) -> UnsupportedRequestError:
    """The error of a strategy that cannot be built or called as asked."""
    return UnsupportedRequestError(
        f'decoding "{strategy}" cannot honour the request.', why="\n".join(reasons), fix=fix, reasons=tuple(reasons)
    )
