"""Which tokens of a sequence a cache does not hold yet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pluglm_hf.cache_face import CacheFace
from pluglm_hf.recipes.failures import unclear


def whole_length(mask: Tensor | None, positions: Tensor | None, cells: Tensor | None) -> int | None:
    """Cells of the sequence, those that a cache holds included; None if nothing says so.

    Args:
        mask: [B, S] of the whole sequence. positions: [B, S] or [1, S]. cells: [T], the last one known to be the end.
    """
    if mask is not None and mask.ndim == 2:
        return mask.shape[1]
    if positions is not None and positions.ndim == 2:
        return positions.shape[1]
    return int(cells[-1]) + 1 if cells is not None else None


def new_tokens(tokens: Tensor, cache: Any, said: int | None, total: int | None, *, embedded: bool) -> int:
    """How many of the last tokens are to be fed.

    Args:
        tokens: [B, S] ids, or [B, S, C] embeddings: the whole sequence, or what is new. said: by the caller, or None.
        total: cells of the whole sequence, if known.
    Raises: RecipeError if nothing is new, or if nothing says what is.
    """
    S = tokens.shape[1]
    held = cache.get_seq_length() if cache is not None else 0
    if said is not None:
        if not 0 < said <= S:
            raise unclear(S, held, f"next_sequence_length={said} of {S} tokens.")
        return said
    if held == 0:
        return S
    if total is not None and S in (total, total - held) and total > held:
        return total - held
    if total is not None:
        raise unclear(S, held, f"mask or positions are {total} wide; that fits neither the whole sequence nor its end.")
    if embedded or not isinstance(cache, CacheFace) or not cache.remembers:
        raise unclear(S, held, "there is neither a mask nor a record of what the cache holds.")
    return S - held if held < S and cache.starts(tokens) else S
