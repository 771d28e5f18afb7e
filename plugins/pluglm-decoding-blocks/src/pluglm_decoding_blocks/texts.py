"""What stands in each row, padding aside: how long it is, and its tokens side by side."""

from __future__ import annotations

import torch
from torch import Tensor

#: In place of padding; no token's id, so it matches none.
NO_TOKEN = -1


class Texts:
    """The texts of one call's rows, as processors see them grow.

    Args:
        prompt_length: S of the prompts, padding included. mask: [R, S] of the prompts, 0 for padding; None: no padding.

    Attributes:
        lengths: real tokens of each row's prompt; one number where all rows have as many.
    """

    def __init__(self, prompt_length: int, mask: Tensor | None) -> None:
        self.prompt_length = prompt_length
        self.lengths: tuple[int, ...] = (prompt_length,)
        self._order: Tensor | None = None
        if mask is not None:
            self.lengths = tuple(mask.sum(1).tolist())
            self._order = mask.argsort(dim=1, stable=True)  # [R, S], padding first, the tokens in their order
            self._padding = mask.gather(1, self._order) == 0

    def count(self, input_ids: Tensor) -> int:
        """New tokens in input_ids [R, S]."""
        return input_ids.shape[1] - self.prompt_length

    def real(self, input_ids: Tensor) -> Tensor:
        """[R, S]: each row's tokens at its end, `NO_TOKEN` before them."""
        if self._order is None:
            return input_ids
        prompt = input_ids[:, : self.prompt_length].gather(1, self._order).masked_fill(self._padding, NO_TOKEN)
        return torch.cat((prompt, input_ids[:, self.prompt_length :]), dim=1)

    def left_padded(self, input_ids: Tensor) -> Tensor:
        """[R, S]: the same with the padding as it is, for processors that need ids of the vocabulary."""
        if self._order is None:
            return input_ids
        prompt = input_ids[:, : self.prompt_length].gather(1, self._order)
        return torch.cat((prompt, input_ids[:, self.prompt_length :]), dim=1)
