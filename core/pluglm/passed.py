"""What a caller of the forward contract passes: checked, and turned into explicit positions.

One class serves every stack of layers: a decoder-only model's tokens, and the encoder's and the decoder's of an
encoder-decoder. They differ in what their arguments are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pluglm.errors import ContextLengthError, InputError

if TYPE_CHECKING:
    from pluglm.contracts.cache import Cache


@dataclass(frozen=True)
class Passed:
    """The arguments that say which tokens one stack of layers gets.

    Attributes:
        ids: [B, T] int64; or embeds: [B, T, C]; exactly one of them.
        mask: [B, cache length + T], 1 for a token, 0 for padding on either side. None: all tokens.
        position_ids: [B, T] or [1, T]. None: counted from the mask, or from the cache.
        prefix: of the arguments' names: "" or "decoder_".
    """

    ids: Tensor | None
    embeds: Tensor | None
    mask: Tensor | None
    position_ids: Tensor | None = None
    prefix: str = ""

    def shape(self, *, vocab_size: int, hidden_size: int) -> tuple[int, int]:
        """B and T, once everything about the tokens is checked. Raises InputError."""
        ids, embeds = f"{self.prefix}input_ids", f"{self.prefix}inputs_embeds"
        if (self.ids is None) == (self.embeds is None):
            raise InputError(f"give exactly one of {ids} and {embeds}.", argument=ids)
        tokens: Any = self.tokens
        if not isinstance(tokens, Tensor):
            name = ids if self.ids is not None else embeds
            raise InputError(f"{name} is a {type(tokens).__name__}, not a tensor.",
                             fix="Pass torch.tensor(…) of shape [B, T].", argument=name)  # fmt: skip
        for name, given in ((f"{self.prefix}attention_mask", self.mask), ("position_ids", self.position_ids)):
            if given is not None and not isinstance(given, Tensor):
                raise InputError(f"{name} is a {type(given).__name__}, not a tensor.",
                                 fix="Pass torch.tensor(…) of shape [B, T].", argument=name)  # fmt: skip
        if self.ids is not None:
            self._check_ids(self.ids, vocab_size)
        elif tokens.ndim != 3 or tokens.shape[2] != hidden_size:
            raise InputError(
                f"{embeds} has shape {tuple(tokens.shape)}; it must be [B, T, {hidden_size}].", argument=embeds
            )
        B, T = tokens.shape[:2]
        if T == 0 or B == 0:
            subject = "the input" if not self.prefix else f"the {self.prefix.rstrip('_')}'s input"
            raise InputError(f"{subject} has shape {tuple(tokens.shape)}: there is no token to run.", argument=ids)
        return B, T

    def _check_ids(self, ids: Tensor, vocab_size: int) -> None:
        name = f"{self.prefix}input_ids"
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype is torch.bool:
            raise InputError(
                f"{name} has shape {tuple(ids.shape)} and dtype {ids.dtype}; it must be integers [B, T].",
                fix=f"Pass one prompt as {name}[None], embeddings as {self.prefix}inputs_embeds.",
                argument=name,
            )
        if ids.device.type == "cpu" and ids.numel():  # elsewhere the look would wait for the device
            low, high = (int(i) for i in ids.aminmax())
            if low < 0 or high >= vocab_size:
                raise InputError(
                    f"{name} holds {low if low < 0 else high}, which is outside the vocabulary of {vocab_size}.",
                    fix=f"Use ids of this model's tokenizer; mark padding in {self.prefix}attention_mask, with any "
                    "valid id.",
                    argument=name,
                )

    @property
    def tokens(self) -> Tensor:
        """Whichever of ids and embeds is there."""
        tokens = self.ids if self.ids is not None else self.embeds
        assert tokens is not None  # `shape` has looked
        return tokens

    def positions(self, cache: Cache | None, limit: int | None) -> tuple[Tensor, bool]:
        """Absolute positions [B, T], or [1, T] where all rows agree, and whether they are known to be dense.

        Args:
            cache: what comes before. limit: of the stack's positions.
        Raises: InputError, ContextLengthError.
        """
        T = self.tokens.shape[1]
        past = cache.length if cache is not None else 0
        mask = self._mask(cache, past)
        if self.position_ids is not None:
            return self._given(self.position_ids, mask[:, past:] == 0 if mask is not None else None, limit), False
        if mask is not None:
            real = mask != 0
            if cache is not None and past:
                _check_past(real[:, :past], cache, f"{self.prefix}attention_mask")
            counted = real.long().cumsum(1) - 1
            return counted.masked_fill(~real, -1)[:, past:], False
        if cache is not None:
            return cache.next_positions(T), cache.dense
        return torch.arange(T, device=self.tokens.device)[None], True

    def _mask(self, cache: Cache | None, past: int) -> Tensor | None:
        """The mask; None if it says nothing that is not known."""
        mask, (B, T), name = self.mask, self.tokens.shape[:2], f"{self.prefix}attention_mask"
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] != past + T:
            raise InputError(
                f"{name} has shape {tuple(mask.shape)}; it must be [{B}, {past + T}].",
                why=f"the cache holds {past} cells and this call brings {T}; a mask of another width means that "
                "tokens are fed twice or lost.",
                fix="Feed only tokens that the cache does not hold yet, with a mask over all of them.",
                argument=name,
            )
        return None if bool(mask.all()) and (cache is None or cache.dense) else mask

    def _given(self, positions: Tensor, padding: Tensor | None, limit: int | None) -> Tensor:
        """Positions of the caller's own; padding: [B, T] bool."""
        B, T = self.tokens.shape[:2]
        if positions.ndim != 2 or positions.shape[1] != T or positions.shape[0] not in (1, B):
            raise InputError(
                f"position_ids has shape {tuple(positions.shape)}; it must be [{B}, {T}] or [1, {T}].",
                argument="position_ids",
            )
        real = positions >= 0 if padding is None else (positions >= 0) | padding
        if not bool(real.all()):
            raise InputError("position_ids holds negative numbers.", fix="Mark padding in attention_mask.",
                             argument="position_ids")  # fmt: skip
        if padding is not None:
            positions = positions.expand(B, T).masked_fill(padding, -1)
        check_length(int(positions.max()) + 1, limit)
        return positions


def check_length(tokens: int, limit: int | None, *, whose: str = "model") -> None:
    """Raise ContextLengthError if a model, or one of its stacks, has no position for so many tokens."""
    if limit is not None and tokens > limit:
        raise ContextLengthError(
            f"{tokens} tokens are more than this {whose}'s context of {limit}.",
            why="positions past it were never trained and cannot be told apart reliably.",
            fix=f"Shorten the input to {limit} tokens{', new ones included' if whose != 'encoder' else ''}.",
            tokens=tokens,
            limit=limit,
        )


def check_kept(logits_to_keep: int | Tensor) -> None:
    """Raise InputError for what names no cells: a negative number would be counted from the front."""
    if not isinstance(logits_to_keep, Tensor) and (type(logits_to_keep) is not int or logits_to_keep < 0):
        raise InputError(
            f"logits_to_keep={logits_to_keep!r} makes no sense: it must be an integer >= 0, or a tensor of indices.",
            argument="logits_to_keep",
        )


def check_cache(cache: Cache | None, B: int, T: int, cache_position: Tensor | None) -> None:
    """Raise InputError if a cache has other rows than the input, or if the caller wants other cells than the next."""
    if isinstance(cache, tuple | list):
        raise InputError(
            f"past_key_values is a {type(cache).__name__}, not a cache.",
            why="pairs of keys and values do not say which of their cells are padding.",
            fix="Pass lm.new_cache(), or make a cache of them: pluglm_caches.tuples.from_tuples(layout, pairs).",
            argument="past_key_values",
        )
    past = cache.length if cache is not None else 0
    if cache is not None and cache.batch_size != B:
        raise InputError(
            f"the cache holds {cache.batch_size} rows, the input has {B}.",
            fix="Make the cache for this batch, or use its `select` or `repeat`.",
            argument="past_key_values",
        )
    if cache_position is not None and cache_position.tolist() != list(range(past, past + T)):
        raise InputError(
            f"cache_position must be the next cells, {past} to {past + T - 1}.",
            why="a cache appends; it cannot write elsewhere.",
            fix="Leave cache_position out, or crop the cache first.",
            argument="cache_position",
        )


def unknown_argument(unknown: Mapping[str, Any], known: Sequence[str]) -> InputError:
    """The error for an argument that no forward call of this kind has."""
    name = next(iter(unknown))
    near = get_close_matches(name, known, 1)
    return InputError(
        f"the model takes no argument {name!r}.",
        why="an argument that is ignored changes results in silence.",
        fix=(f"Did you mean {near[0]!r}? " if near else "") + f"It takes {', '.join(known)}.",
        argument=name,
    )


def _check_past(real: Tensor, cache: Cache, name: str) -> None:
    """The mask's past must mark as many tokens as each row of the cache holds. real: [B, cache length] bool."""
    said = real.sum(1)
    held = cache.next_positions(1)[:, 0].expand_as(said)
    if bool((said != held).any()):
        row = int((said != held).nonzero()[0])
        raise InputError(
            f"{name} marks {int(said[row])} tokens of row {row}'s past; its next position is {int(held[row])}.",
            why="a cache knows which of its cells are padding; a later mask cannot hide or uncover any.",
            fix="Repeat the mask under which these cells were fed, with new columns at its end, or leave it out; after "
            "position_ids of your own, go on passing them.",
            argument=name,
        )  # fmt: skip
