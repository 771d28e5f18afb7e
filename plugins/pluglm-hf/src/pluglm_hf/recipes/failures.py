"""What goes wrong in a recipe, as typed errors."""

from __future__ import annotations

from typing import Any

from pluglm.errors import PluglmError


class RecipeError(PluglmError):
    """A recipe cannot be loaded, or did what would give wrong text. `.recipe`, `.argument`."""


def fed_twice(held: int, given: int) -> RecipeError:
    """The error for a pass whose input begins with the tokens that the cache begins with."""
    return RecipeError(
        "the recipe fed the tokens twice.",
        why=f"the cache holds {held} tokens, and this call brings {given} that begin with the same ones: they would be "
        "attended to two times, at wrong positions, and the text would be another one.",
        fix="Feed only tokens that the cache does not hold: call model.prepare_inputs_for_generation(input_ids, …), or "
        "slice input_ids[:, cache.get_seq_length():]. If the text really repeats itself, pass an attention_mask over "
        "the cache and the new tokens.",
        argument="input_ids",
    )


def unclear(tokens: int, held: int, why: str, **data: Any) -> RecipeError:
    """The error for an input of which nothing says how much of it the cache holds already."""
    return RecipeError(
        f"cannot tell which of {tokens} tokens are new to a cache of {held}.", why=why,
        fix="Pass next_sequence_length, or an attention_mask as wide as the whole sequence.", argument="input_ids",
        **data,
    )  # fmt: skip
