"""Rows of ids cut and padded to one width, as a tokenizer's arguments ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pluglm.errors import InputError
from pluglm_hf.batch_encoding import BatchEncoding

SIDES = ("left", "right")


@dataclass(frozen=True)
class Shape:
    """How rows become a batch.

    Attributes:
        pad: id that fills; None: there is none. side: where it goes. cut_side: where a row is cut.
        padding: "longest", "max_length" or None. limit: tokens a row may have; None: any number.
        multiple: widths are multiples of it. tensors: return torch tensors.
    """

    pad: int | None
    side: str
    cut_side: str
    padding: str | None
    limit: int | None
    multiple: int | None
    tensors: bool


def read_padding(padding: Any) -> str | None:
    """What `padding` means. Raises InputError."""
    if padding in (None, False, "do_not_pad"):
        return None
    if padding in (True, "longest"):
        return "longest"
    if padding == "max_length":
        return "max_length"
    raise InputError(f"padding={padding!r} makes no sense.", fix='Pass True, "longest", "max_length" or False.',
                     argument="padding")  # fmt: skip


def read_limit(truncation: Any, max_length: Any, padding: str | None, most: int | None) -> tuple[bool, int | None]:
    """Whether rows are cut, and to how many tokens. most: of the tokenizer. Raises InputError."""
    cut = truncation in (True, "longest_first", "only_first")
    if not cut and truncation not in (None, False, "do_not_truncate"):
        raise InputError(f"truncation={truncation!r} makes no sense.", fix="Pass True or False.",
                         argument="truncation")  # fmt: skip
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise InputError(f"max_length={max_length!r} makes no sense: it must be an integer >= 1.",
                         argument="max_length")  # fmt: skip
    limit = max_length if max_length is not None else most
    if (cut or padding == "max_length") and limit is None:
        raise InputError("nothing says how long a row may be.",
                         why="neither the call nor tokenizer_config.json (model_max_length) does.",
                         fix="Pass max_length.", argument="max_length")  # fmt: skip
    if max_length is not None and not cut and padding != "max_length":
        raise InputError(
            f"max_length={max_length} is read only with truncation or padding to it.",
            fix='Pass truncation=True or padding="max_length" too, or leave it out.', argument="max_length",
        )  # fmt: skip
    return cut, limit


def cut_row(body: list[int], ends: tuple[list[int], list[int]], limit: int, side: str) -> list[int]:
    """A row of at most `limit` ids that keeps what stands at its ends."""
    room = max(limit - len(ends[0]) - len(ends[1]), 0)
    kept = body[:room] if side == "right" else body[len(body) - min(room, len(body)) :]
    return [*ends[0], *kept, *ends[1]]


def batch(rows: Sequence[list[int]], single: bool, shape: Shape, *, with_mask: bool) -> BatchEncoding:
    """Pad the rows and return them, with a mask. single: one row that was no list, returned as it came.

    Raises: InputError if rows of different lengths shall be a tensor, or padding is asked for without a pad token.
    """
    masks = [[1] * len(row) for row in rows]
    if shape.padding is not None:
        width = shape.limit if shape.padding == "max_length" else max(map(len, rows))
        assert width is not None
        if shape.multiple:
            width = -(-width // shape.multiple) * shape.multiple
        masks = [_padded(mask, width, 0, shape.side) for mask in masks]
        rows = [_padded(row, width, _pad(shape), shape.side) for row in rows]
    found: dict[str, Any] = {"input_ids": list(rows), "attention_mask": masks}
    if not with_mask:
        del found["attention_mask"]
    if shape.tensors:
        return BatchEncoding({name: _tensor(value) for name, value in found.items()})
    return BatchEncoding({name: value[0] if single else value for name, value in found.items()})


def _pad(shape: Shape) -> int:
    if shape.pad is None:
        raise InputError("there is no token to pad with.", why="the tokenizer's files name no pad token.",
                         fix="Write tokenizer.pad_token = tokenizer.eos_token.", argument="padding")  # fmt: skip
    return shape.pad


def _padded(row: list[int], width: int, fill: int, side: str) -> list[int]:
    more = [fill] * (width - len(row))
    return [*more, *row] if side == "left" else [*row, *more]


def _tensor(rows: Sequence[Sequence[int]]) -> Any:
    import torch

    if len({len(row) for row in rows}) > 1:
        raise InputError(
            "rows of different lengths are no tensor.", why=f"they have {sorted({len(row) for row in rows})} tokens.",
            fix="Pass padding=True (and truncation=True if they may be cut).", argument="return_tensors",
        )  # fmt: skip
    return torch.tensor([list(row) for row in rows], dtype=torch.long)
