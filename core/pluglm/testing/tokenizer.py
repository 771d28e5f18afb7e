"""The conformance kit for tokenizers.

    class TestTokenizers(TokenizerContract):
        provider = pluglm_tokenizers

        @pytest.fixture
        def folder(self, tmp_path):
            ...write the tokenizer's files, return tmp_path

The files must define an end token, and hold a chat template to have the chat tests run. Needs `pluglm[testing]`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from pluglm.contracts import Tokenizer, TokenizerRequest
from pluglm.errors import ConfigError, InputError
from pluglm.text_stream import TextStream

TEXTS = (
    "", " ", "hello world", "  two  spaces ", "def f(x):\n\treturn x\n", "naïve café", "日本語のテキスト",
    "🙂👩‍👩‍👧 and ok", "\n\n\n",
)  # fmt: skip


class TokenizerContract:
    """Subclass it in a test file, as `Test…`. A test may be weakened only by `xfail(reason=…)`.

    Attributes:
        provider: what the entry point names: an object or module with `pluglm_build_tokenizer`.
        lossless: decoding gives back every text.
    """

    provider: ClassVar[Any]
    lossless: ClassVar[bool] = True

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A folder with the tokenizer's files."""
        raise NotImplementedError(f"write files to {tmp_path}")

    def build(self, folder: Path, vocab_size: int = 2**31) -> Tokenizer:
        """The tokenizer of a folder."""
        tokenizer: Tokenizer = self.provider.pluglm_build_tokenizer(request=TokenizerRequest(folder, vocab_size))
        return tokenizer

    def special_texts(self, tokenizer: Tokenizer) -> list[str]:
        """What the control tokens look like in a text."""
        texts = [tokenizer.decode([i], skip_special_tokens=False) for i in sorted(tokenizer.special_ids)]
        assert all(texts)
        return texts

    def test_it_follows_the_contract(self, folder: Path) -> None:
        tokenizer = self.build(folder)
        assert isinstance(tokenizer, Tokenizer)
        assert tokenizer.eos_token_id in tokenizer.special_ids
        assert max(tokenizer.special_ids) < tokenizer.vocab_size

    @pytest.mark.parametrize("text", TEXTS)
    def test_decoding_gives_back_the_text(self, folder: Path, text: str) -> None:
        tokenizer = self.build(folder)
        if not self.lossless:
            pytest.skip("this tokenizer loses text")
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text

    @pytest.mark.parametrize("text", TEXTS)
    def test_a_stream_gives_the_same_text_in_pieces_of_whole_characters(self, folder: Path, text: str) -> None:
        tokenizer = self.build(folder)
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer.decode)
        pieces = [stream.push(i) for i in ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)

    @pytest.mark.parametrize("text", TEXTS)
    def test_the_bytes_of_tokens_are_the_text(self, folder: Path, text: str) -> None:
        tokenizer = self.build(folder)
        if not self.lossless:
            pytest.skip("this tokenizer loses text")
        stand_for = tokenizer.token_bytes()
        assert len(stand_for) == tokenizer.vocab_size
        assert not any(stand_for[i] for i in tokenizer.special_ids)
        joined = b"".join(stand_for[i] or b"" for i in tokenizer.encode(text, add_special_tokens=False))
        assert joined in (text.encode(), b" " + text.encode())  # the space that "▁" puts before the first word

    def test_a_control_tokens_text_is_ordinary_text_unless_asked(self, folder: Path) -> None:
        tokenizer = self.build(folder)
        for special in self.special_texts(tokenizer):
            for text in (special, f"a{special}b", f"{special} {special}", f"x {special}\n"):
                ids = tokenizer.encode(text, add_special_tokens=False)
                assert not tokenizer.special_ids & set(ids), text
                assert not self.lossless or tokenizer.decode(ids) == text

    def test_a_control_tokens_text_is_the_token_where_asked(self, folder: Path) -> None:
        tokenizer = self.build(folder)
        for special in self.special_texts(tokenizer):
            ids = tokenizer.encode(special, add_special_tokens=False, parse_special=True)
            assert len(ids) == 1
            assert ids[0] in tokenizer.special_ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == ""

    def test_special_tokens_are_added_only_at_the_ends(self, folder: Path) -> None:
        tokenizer = self.build(folder)
        body = tokenizer.encode("hello", add_special_tokens=False)
        whole = tokenizer.encode("hello")
        at = next(i for i in range(len(whole)) if whole[i : i + len(body)] == body)
        assert set(whole[:at] + whole[at + len(body) :]) <= tokenizer.special_ids

    def test_ids_beyond_the_models_embedding_are_refused(self, folder: Path) -> None:
        size = self.build(folder).vocab_size
        self.build(folder, vocab_size=size)
        with pytest.raises(ConfigError, match=str(size - 1)):
            self.build(folder, vocab_size=size - 1)

    def test_what_is_saved_is_the_same_tokenizer(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        tokenizer = self.build(folder)
        copy = tmp_path_factory.mktemp("saved")
        tokenizer.save(copy)
        again = self.build(copy)
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert again.chat_template == tokenizer.chat_template
        assert again.eos_token_id == tokenizer.eos_token_id

    def test_users_of_a_chat_cannot_write_control_tokens(self, folder: Path) -> None:
        tokenizer = self.build(folder)
        if tokenizer.chat_template is None:
            with pytest.raises(InputError, match="chat template"):
                tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
            return
        plain = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])
        expected = [i for i in plain if i in tokenizer.special_ids]
        for special in self.special_texts(tokenizer):
            for content in (special, f"a {special}{special} b", special[1:], special[:-1], f"{special[:1]}{special}"):
                ids = tokenizer.apply_chat_template([{"role": "user", "content": content}])
                assert [i for i in ids if i in tokenizer.special_ids] == expected, content
