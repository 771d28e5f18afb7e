"""What users pass to `generate`, as rows of token ids: text, lists of text, chats, ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts.cache import Cache
    from pluglm.contracts.text import Tokenizer

Prompt = "str | Sequence[str] | Sequence[Mapping[str, Any]] | Sequence[int] | Sequence[Sequence[int]] | Tensor"


@dataclass(frozen=True)
class Prompts:
    """rows: token ids of each prompt. single: the user passed one prompt and wants one answer, not a list."""

    rows: tuple[tuple[int, ...], ...]
    single: bool


def read_prompts(prompt: Any, tokenizer: Tokenizer | None, *, vocab_size: int, bos_token_id: int | None) -> Prompts:
    """Sort out what was passed.

    Args:
        prompt: a text; messages (mappings with role and content); token ids; a list of any of these; a tensor [T] or
            [B, T] of ids.
    Raises: InputError for anything else, for an empty prompt without a BOS token, for ids outside the vocabulary, and
        for text where the model has no tokenizer.
    """
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    items, single = (prompt, False) if _is_batch(prompt) else ([prompt], True)
    if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) and not prompt:
        raise InputError("there is no prompt: the list is empty.", fix="Pass at least one prompt.", argument="prompt")
    rows = tuple(tuple(_ids(item, tokenizer)) or _only_bos(bos_token_id) for item in items)
    for row in rows:
        wrong = [i for i in row if not 0 <= i < vocab_size]
        if wrong:
            raise InputError(
                f"token id {wrong[0]} is outside the vocabulary of {vocab_size}.",
                why="these ids were made by another model's tokenizer, or by hand.",
                fix="Pass text, or ids from this model's tokenizer (`lm.tokenizer.encode`).",
                argument="prompt",
            )
    return Prompts(rows, single)


def pad_left(
    rows: Sequence[Sequence[int]], pad: int, device: Any, *, width: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """token ids [B, T] int64 padded on the left, and the mask [B, T]; None where no row needs padding.

    Args:
        width: T. None: of the longest row.
    """
    import torch

    T = max(map(len, rows)) if width is None else width
    ids = torch.tensor([[pad] * (T - len(row)) + list(row) for row in rows], dtype=torch.long)
    if all(len(row) == T for row in rows):
        return ids.to(device), None
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
    return ids.to(device), mask.to(device)


def pad_behind(rows: Sequence[Sequence[int]], cache: Cache, pad: int, device: Any) -> tuple[Tensor, Tensor | None]:
    """As `pad_left`, for rows whose first tokens a cache holds: what is new stands behind its cells in every row.

    Rows of a batch that is continued have grown by different numbers of tokens, so padding is needed between what is
    held and what is new as well. A cache asks only that each row's past has as many tokens as it holds.
    """
    import torch

    held = [cache.length] * len(rows) if cache.dense else cache.next_positions(1)[:, 0].tolist()
    # Another batch's cache, positions of the caller's own, or nothing new: the strategy refuses these.
    fits = len(held) == len(rows) == cache.batch_size and all(0 <= n <= cache.length for n in held)
    if not cache.length or not fits or not any(len(row) > n for row, n in zip(rows, held, strict=True)):
        return pad_left(rows, pad, device)
    past = pad_left([row[:n] for row, n in zip(rows, held, strict=True)], pad, device, width=cache.length)
    new = pad_left([row[n:] for row, n in zip(rows, held, strict=True)], pad, device)
    ids = torch.cat((past[0], new[0]), dim=1)
    if past[1] is None and new[1] is None:
        return ids, None
    return ids, torch.cat([torch.ones_like(part) if mask is None else mask for part, mask in (past, new)], dim=1)


def _is_batch(prompt: Any) -> bool:
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        return False
    if not prompt:
        return False
    first = prompt[0]
    return isinstance(first, str) or (isinstance(first, Sequence) and not isinstance(first, bytes))


def _ids(item: Any, tokenizer: Tokenizer | None) -> Sequence[int]:
    if isinstance(item, Sequence) and not isinstance(item, str | bytes):
        if all(type(i) is int for i in item):
            return item
        if all(isinstance(i, Mapping) for i in item):
            return _tokenizer(tokenizer).apply_chat_template(_messages(item))
    if isinstance(item, str):
        return _tokenizer(tokenizer).encode(item)
    raise InputError(
        f"a prompt cannot be made of {type(item).__name__}.",
        fix="Pass a text, a list of messages like {'role': 'user', 'content': 'Hi'}, token ids, or a list of these.",
        argument="prompt",
    )


def _messages(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(
                f"message {i} lacks a role or a content: {dict(message)!r}.",
                fix="Write messages as {'role': 'user', 'content': 'Hi'}.",
                argument="prompt",
            )
    return messages


def _tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise InputError(
            "this model came without a tokenizer, so text means nothing to it.",
            why="its folder has no tokenizer file that an installed tokenizer plugin reads.",
            fix="Pass token ids, or put tokenizer.json into the folder.",
            argument="prompt",
        )
    return tokenizer


def _only_bos(bos_token_id: int | None) -> tuple[int, ...]:
    if bos_token_id is None:
        raise InputError(
            "the prompt is empty.",
            why="this model has no BOS token that could stand for an empty text.",
            fix="Pass at least one character or token id.",
            argument="prompt",
        )
    return (bos_token_id,)
