"""What both schemes share: texts as lists of tokens, and settings that make sense."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pluglm.errors import InputError


def read_rows(token_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row without padding.

    Args:
        token_ids: [B, S], or rows of any lengths. attention_mask: [B, S], 0 for padding; None: none.
    """
    rows = [list(row) for row in (token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids)]
    if attention_mask is None:
        return rows
    return [
        [token for token, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(rows, attention_mask.tolist(), strict=True)
    ]


def too_short(number: int, row: Sequence[int], needed: int) -> InputError:
    """The error for a row without a token that can be scored. needed: tokens that come before the first such one."""
    return InputError(
        f"row {number} has {len(row)} tokens, and none of them can be scored.",
        why=f"the first {needed} are only the context of later ones.", fix="Pass a longer text.", argument="token_ids",
    )  # fmt: skip


def check(name: str, value: object, ok: bool, rule: str) -> None:
    """Raise InputError for a setting that makes no sense."""
    if not ok:
        raise InputError(f"{name}={value!r} makes no sense: it must be {rule}.", argument=name)
