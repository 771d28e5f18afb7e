"""The `tokenizers` library behind a fence: ids of a text with control tokens parsed, or guaranteed not to be."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

from tokenizers import AddedToken, Encoding, Tokenizer

from pluglm.errors import InputError, PluglmError
from pluglm_tokenizers.fence import fenced
from pluglm_tokenizers.files import TOKENIZER, TokenizerFiles, wrong
from pluglm_tokenizers.token_bytes import token_bytes


class Engine:
    """Two readings of one tokenizer.json: one that parses control tokens in a text, and one that does not.

    Attributes:
        vocab_size: one more than the largest id. special_ids: ids of control tokens. special_texts: their texts.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        with fenced(lambda reason: wrong(files.folder, TOKENIZER, None, reason)):
            self._plain = Tokenizer.from_buffer(files.tokenizer)
            self._plain.no_truncation()  # a file may ask for it; nothing is cut off in silence
            self._plain.no_padding()
            named = [*files.roles.values(), *files.extra_special]
            known = [text for text in dict.fromkeys(named) if self._plain.token_to_id(text) is not None]
            self._plain.add_special_tokens([text for text in known if not self._is_special(text)])
            self._plain.encode_special_tokens = True
            vocabulary = self._plain.get_vocab(with_added_tokens=True)
            added = self._plain.get_added_tokens_decoder()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._texts = {i: token.content for i, token in added.items() if token.special}
        self.special_ids = frozenset(self._texts)
        self.special_texts = tuple(self._texts.values())
        self._unknown = self._plain.token_to_id(files.roles.get("unk_token", ""))
        self._parsing: Tokenizer | None = None
        self._lock = threading.Lock()

    def _is_special(self, text: str) -> bool:
        added: dict[int, AddedToken] = self._plain.get_added_tokens_decoder()
        return any(token.content == text and token.special for token in added.values())

    def id_of(self, text: str) -> int | None:
        """The id of a token's text."""
        found: int | None = self._plain.token_to_id(text)
        return found

    def ids(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of a text, nothing added at its ends."""
        with fenced(_bad_text):
            tokenizer = self._parser() if parse_special else self._plain
            return self._checked(tokenizer, text, parse_special=parse_special)

    def _checked(self, tokenizer: Tokenizer, text: str, *, parse_special: bool) -> list[int]:
        """Encode, and take apart what became a control token without being one.

        A model that knows a control token's text as a word of its own (Unigram, WordLevel), or a normalizer that makes
        one of other characters, gives its id although it was not parsed. Its text is cut after the first character.
        """
        encoding = tokenizer.encode(text, add_special_tokens=False)
        for i, token_id in enumerate(encoding.ids):
            if token_id not in self.special_ids:
                continue
            start, end = encoding.offsets[i]
            literal = text[start:end].strip() == self._texts[token_id]
            if (parse_special and literal) or (token_id == self._unknown and not literal):
                continue
            if end - start < 2:
                raise InputError(
                    f"the text holds {text[start:end]!r}, which this tokenizer knows as the control token "
                    f"{self._texts[token_id]!r} only.",
                    fix="Take it out of the text, or pass parse_special=True.", argument="text",
                )  # fmt: skip
            left, right = text[: start + 1], text[start + 1 :]
            return [
                *self._checked(tokenizer, left, parse_special=parse_special),
                *self._checked(tokenizer, right, parse_special=parse_special),
            ]
        return list(encoding.ids)

    def text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of ids."""
        with fenced(_bad_ids):
            decoded: str = self._plain.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
            return decoded

    def token_bytes(self) -> tuple[bytes | None, ...]:
        """[vocab_size] what each id adds to a text; None: a control token, or an id without a token."""
        with fenced(_bad_ids):
            special = self.special_ids
            tokens = [None if i in special else self._plain.id_to_token(i) for i in range(self.vocab_size)]
            decoder = json.loads(self._plain.to_str())["decoder"]
        return token_bytes(decoder, tokens)

    def ends(self) -> tuple[list[int], list[int]]:
        """The ids that the file's post-processor puts before and after a text."""
        with fenced(_bad_text):
            encoding: Encoding = self._plain.encode("a", add_special_tokens=True)
        mask = encoding.special_tokens_mask
        body = [i for i, special in enumerate(mask) if not special]
        if not body:
            return list(encoding.ids), []
        return list(encoding.ids[: body[0]]), list(encoding.ids[body[-1] + 1 :])

    def _parser(self) -> Tokenizer:
        """The reading that parses control tokens, made when it is first needed."""
        with self._lock:
            if self._parsing is None:
                self._parsing = Tokenizer.from_str(self._plain.to_str())
                self._parsing.encode_special_tokens = False
            return self._parsing


def _bad_text(reason: str) -> PluglmError:
    return InputError(
        "the text cannot be tokenized.", why=reason, fix="Check the text, and the patterns in tokenizer.json.",
        argument="text",
    )  # fmt: skip


def _bad_ids(reason: str) -> PluglmError:
    return InputError(
        "the ids cannot be decoded.", why=reason, fix="Pass ids from 0 to vocab_size - 1.", argument="token_ids"
    )
