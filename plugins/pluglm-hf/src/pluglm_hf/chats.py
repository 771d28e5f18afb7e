"""Chats by a model's own template: what cannot be asked of it, and its text where that means the same ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pluglm_hf.refusals import unsupported

if TYPE_CHECKING:
    from pluglm.contracts.text import Tokenizer


def refuse_chat(other_template: bool, asked: Mapping[str, Any]) -> None:
    """Raise for a template that is not the model's, and for arguments that take a rendered chat apart."""
    if other_template:
        raise unsupported("chat_template", "…", "the model's own template is what it was trained with.",
                          "Put it into the folder as chat_template.jinja.")  # fmt: skip
    for name, value in asked.items():
        if value:
            raise unsupported(name, value, "the template is rendered as a whole.", "Leave it out.")


def chat_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """A rendered chat as text. Raises UnsupportedRequestError if encoding it would give other ids."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    if tokenizer.encode(text, add_special_tokens=False, parse_special=True) != ids:
        raise unsupported(
            "tokenize", False,
            "as text, this chat would be other tokens: a message holds what looks like a control token, or this "
            "tokenizer does not give back spaces.", "Leave it out, and use the ids.",
        )  # fmt: skip
    return text
