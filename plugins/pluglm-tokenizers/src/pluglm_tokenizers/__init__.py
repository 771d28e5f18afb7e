"""Reads tokenizer.json and chat templates. Importing this package imports neither `tokenizers` nor jinja2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Tokenizer, TokenizerRequest


@hookimpl
def pluglm_build_tokenizer(request: TokenizerRequest) -> Tokenizer:
    """The tokenizer of one folder."""
    from pluglm_tokenizers.tokenizer import JsonTokenizer

    return JsonTokenizer(request)
