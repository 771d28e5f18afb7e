"""What a recipe returned, as the output of a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import FinishReason, GenerationConfig, GenerationOutput
from pluglm_hf.recipes.failures import RecipeError


def read_result(result: Any, prompt: Tensor, config: GenerationConfig, recipe: str) -> GenerationOutput:
    """Find the sequences, the prompt in them, and where each row ends.

    Args:
        result: a tensor [R, S], or something with `sequences`. prompt: [B, P]; R is B, or B times the copies.
    Returns: sequences that begin with the prompt as it came in: padding that a recipe put before it is left out. What
        does not contain the prompt is taken for new tokens alone.
    Raises: RecipeError for anything else.
    """
    sequences = _sequences(result)
    rows = prompt.shape[0]
    if sequences is None or sequences.shape[0] % rows or not sequences.shape[0]:
        what = type(result).__name__ if sequences is None else f"{sequences.shape[0]} rows for {rows} prompts"
        raise RecipeError(
            f"{recipe} returned {what}, which is no completion.",
            why="it must return token ids [rows, tokens], or an object with `sequences`.",
            fix="Call it as its page says, or through pluglm_hf, which hands on what it returns.", recipe=recipe,
        )  # fmt: skip
    copies = config.num_return_sequences or 1
    if copies > 1 and sequences.shape[0] != rows * copies:
        raise RecipeError(
            f"{recipe} returned {sequences.shape[0]} sequences for num_return_sequences={copies} of {rows} prompts.",
            why="it does not heed num_return_sequences.", fix="Leave it out, and call it several times.",
            recipe=recipe, argument="num_return_sequences",
        )  # fmt: skip
    sequences, width = _aligned(sequences.long(), prompt)
    counts, reasons = _ends(sequences[:, width:], config)
    return GenerationOutput(
        sequences, width, counts, reasons, scores=_steps(result, "scores"), logits=_steps(result, "logits"),
        sequence_scores=_numbers(result, "sequences_scores"), hidden_states=_steps(result, "hidden_states"),
    )  # fmt: skip


def _sequences(result: Any) -> Tensor | None:
    found = result if isinstance(result, Tensor) else getattr(result, "sequences", None)
    if isinstance(found, Tensor) and found.ndim == 1:
        found = found[None]
    whole = isinstance(found, Tensor) and found.ndim == 2 and not found.is_floating_point() and not found.is_complex()
    return found if whole else None


def _aligned(sequences: Tensor, prompt: Tensor) -> tuple[Tensor, int]:
    """Sequences from the prompt on, and its width; 0 if they do not contain it."""
    P = prompt.shape[1]
    wanted = prompt.to(sequences.device).repeat_interleave(sequences.shape[0] // prompt.shape[0], 0)
    for start in range(sequences.shape[1] - P + 1):
        if torch.equal(sequences[:, start : start + P], wanted):
            return sequences[:, start:], P
    return sequences, 0


def _ends(new: Tensor, config: GenerationConfig) -> tuple[tuple[int, ...], tuple[FinishReason, ...]]:
    """New tokens and finish reason of each row: up to its first end token, trailing padding left out."""
    eos = frozenset(config.eos_token_id or ())
    counts: list[int] = []
    reasons: list[FinishReason] = []
    rows = new.tolist()
    for row in rows:
        end = next((i + 1 for i, token in enumerate(row) if token in eos), None)
        count = _unpadded(row, config.pad_token_id) if end is None and len(rows) > 1 else end or len(row)
        limit = config.max_new_tokens
        counts.append(count)
        reasons.append("eos" if end is not None else "length" if limit is None or count >= limit else "stop")
    return tuple(counts), tuple(reasons)


def _unpadded(row: Sequence[int], pad: int | None) -> int:
    count = len(row)
    while count and row[count - 1] == pad:
        count -= 1
    return count


def _steps(result: Any, name: str) -> Any:
    found = getattr(result, name, None)
    return tuple(found) if isinstance(found, tuple | list) and len(found) else None


def _numbers(result: Any, name: str) -> tuple[float, ...] | None:
    found = getattr(result, name, None)
    return tuple(float(x) for x in found) if isinstance(found, Tensor) else None
