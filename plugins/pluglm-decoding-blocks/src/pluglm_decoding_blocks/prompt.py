"""The prompts of one batch: ids, which cells are real, and where each row's last real token is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pluglm.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """Prompts of one width, padded on either side.

    Attributes:
        ids: [B, S] int64. mask: [B, S] int64, 0 for padding; None: every cell is real.
        lengths: real tokens a row. last: the cell of each row's last real token.
    """

    ids: Tensor
    mask: Tensor | None
    lengths: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def width(self) -> int:
        """S."""
        return self.ids.shape[1]

    def repeated(self, count: int) -> Prompt:
        """Every row `count` times: a, b -> a, a, b, b."""
        if count == 1:
            return self
        mask = self.mask.repeat_interleave(count, 0) if self.mask is not None else None
        lengths, last = (tuple(x for x in values for _ in range(count)) for values in (self.lengths, self.last))
        return Prompt(self.ids.repeat_interleave(count, 0), mask, lengths, last)


def read_prompt(input_ids: Tensor, attention_mask: Tensor | None, *, bos: int | None, vocab_size: int) -> Prompt:
    """Check what was passed.

    Args:
        input_ids: [B, S] integers; [B, 0] stands for BOS if there is one. attention_mask: [B, S] of 0 and 1, or None.
    Raises: InputError for other shapes, ids outside the vocabulary, and rows without a token.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] == 0 or input_ids.dtype.is_floating_point:
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)} and dtype {input_ids.dtype}.",
            fix="Pass integers of shape [rows, tokens], one row at least.", argument="input_ids",
        )  # fmt: skip
    ids = input_ids.long()
    if ids.shape[1] == 0:
        if bos is None:
            raise InputError("the prompt is empty, and the model has no BOS token that could stand for it.",
                             fix="Pass at least one token.", argument="input_ids")  # fmt: skip
        ids, attention_mask = ids.new_full((ids.shape[0], 1), bos), None
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocab_size}.",
            fix="Pass ids from this model's tokenizer; padding needs an id of the vocabulary too.",
            argument="input_ids",
        )  # fmt: skip
    B, S = ids.shape
    mask = _read_mask(attention_mask, ids)
    if mask is None:
        return Prompt(ids, None, (S,) * B, (S - 1,) * B)
    lengths = tuple(mask.sum(1).tolist())
    if 0 in lengths:
        raise InputError(
            f"row {lengths.index(0)} of the prompts is all padding.", why="there is no token to continue from.",
            fix="Leave the row out, or start it with the BOS token.", argument="attention_mask",
        )  # fmt: skip
    cells = torch.arange(S, device=ids.device)
    return Prompt(ids, mask, lengths, tuple((cells * mask).argmax(1).tolist()))


def _read_mask(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    """The mask as int64; None if every cell is real."""
    if mask is None:
        return None
    if mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)} for input_ids of shape {tuple(ids.shape)}.",
            why="it must have the same shape, with 1 for a token and 0 for padding. Tokens that a given cache already "
            "holds are part of both.",
            fix="Leave it out if there is no padding.", argument="attention_mask",
        )  # fmt: skip
    mask = mask.to(ids.device, torch.int64)
    return None if bool(mask.all()) else mask
