"""The constraint: one vocabulary, read once into llguidance's trie of tokens, for any number of grammars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from pluglm.contracts import ConstraintRequest, Grammar
from pluglm.errors import UnsupportedRequestError
from pluglm_constraint_llguidance.matcher import LLGuidanceMatcher, Vocabulary
from pluglm_constraint_llguidance.syntax import WHITESPACE, as_lark, malformed


class LLGuidance:
    """Compiles grammars for one model.

    Option `whitespace`: what may stand between the parts of JSON, "flexible" (up to 64 characters) or "none".
    """

    name = "llguidance"

    def __init__(self, request: ConstraintRequest) -> None:
        self._whitespace = _read_options(request)
        textless = frozenset(i for i, part in enumerate(request.token_bytes) if not part)
        # A token without bytes is never allowed; end tokens are seen to in `matcher.py`.
        tokens = _Tokens([part or b"" for part in request.token_bytes], request.eos_token_ids)
        self._tokenizer = LLTokenizer(tokens, eos_token=list(request.eos_token_ids))  # type: ignore[arg-type]
        texts = (i for i in range(request.vocab_size) if i not in textless)
        self._vocabulary = Vocabulary(
            request.vocab_size,
            _bits(request.vocab_size, texts),
            _bits(request.vocab_size, request.eos_token_ids),
            textless,
        )

    def compile(self, grammar: Grammar) -> LLGuidanceMatcher:
        """A matcher of the empty text. Raises GrammarError with the library's words."""
        text = as_lark(grammar, self._whitespace)
        inner = LLMatcher(self._tokenizer, text, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if inner.is_error():
            raise malformed(grammar, inner.get_error())
        if warnings := inner.get_grammar_warnings():  # of what it passes over
            raise malformed(grammar, "\n".join(warnings))
        matcher = LLGuidanceMatcher(inner, self._vocabulary, grammar)
        first = torch.empty(1, self._vocabulary.words, dtype=torch.int32)
        matcher.allow(first, 0)
        if not first.any():
            raise malformed(grammar, "it allows no text at all that this vocabulary can write, not even an empty one")
        return matcher


class _Tokens:
    """The vocabulary in the form that LLTokenizer reads; it is not asked to tokenise (`syntax.py` says why)."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: Sequence[bytes], eos: Sequence[int]) -> None:
        self.tokens, self.eos_token_id = tokens, eos[0]

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError(text)


def _bits(size: int, ids: Iterable[int]) -> Tensor:
    """[W] int32 with the bits of these ids, as masks have them."""
    flags = torch.zeros(-(-size // 32) * 32, dtype=torch.int64)
    flags[list(ids)] = 1
    words = (flags.view(-1, 32) << torch.arange(32)).sum(1)  # [W], 0 to 2**32 - 1
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _read_options(request: ConstraintRequest) -> str:
    """The option `whitespace`. Raises UnsupportedRequestError with every reason."""
    said = dict(request.options)
    whitespace = said.pop("whitespace", "flexible")
    reasons = [f"option {name!r} is not known" for name in said]
    if request.variant is not None:
        reasons.append(f"variant {request.variant!r} is not known")
    if whitespace not in WHITESPACE:
        reasons.append(f"option 'whitespace' is {whitespace!r}, not one of {', '.join(WHITESPACE)}")
    if reasons:
        raise UnsupportedRequestError(
            'constraint "llguidance" cannot honour the request.', why="\n".join(reasons),
            fix=f"It knows the option whitespace ({', '.join(WHITESPACE)}) and no variant.", reasons=tuple(reasons),
        )  # fmt: skip
    return str(whitespace)
