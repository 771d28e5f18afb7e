"""What each token adds to a text, in bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluglm_tokenizers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pluglm_tokenizers.token_bytes import token_bytes
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pluglm import contracts
from pluglm.contracts import TokenizerRequest
from pluglm.errors import UnsupportedRequestError

Make = Callable[..., Path]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXTS = st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(" ▁é🙂\n</s>"), max_size=30)


def build(folder: Path) -> contracts.Tokenizer:
    return pluglm_tokenizers.pluglm_build_tokenizer(request=TokenizerRequest(folder, 10_000))


def joined(tokenizer: contracts.Tokenizer, text: str) -> bytes:
    stand_for = tokenizer.token_bytes()
    found = [stand_for[i] for i in tokenizer.encode(text, add_special_tokens=False)]
    return b"".join(part for part in found if part is not None)


def sentencepiece(decoder: Any, *, prepended: bool) -> Tokenizer:
    """A vocabulary of letters, spaces as "▁", and single bytes for everything else."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *"▁abcdefghij", "▁a", "ab", "▁▁"]
    native = Tokenizer(models.BPE(
        {piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("a", "b"), ("▁", "▁")], unk_token="<unk>",
        byte_fallback=True, fuse_unk=True,
    ))  # fmt: skip
    steps = [normalizers.Prepend("▁")] if prepended else []
    native.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    native.decoder = decoder
    return native


LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
QUIET = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUIET
@given(text=TEXTS)
def test_the_bytes_of_a_byte_level_vocabulary_are_the_text(make: Make, text: str) -> None:
    assert joined(build(make()), text) == text.encode()


@QUIET
@given(text=TEXTS.map(lambda text: text.replace("▁", "_")))
def test_the_bytes_of_a_sentencepiece_vocabulary_are_the_text_with_the_space_before_it(make: Make, text: str) -> None:
    llama = build(make(tokenizer=sentencepiece(LLAMA, prepended=True), config=ROLES))
    expected = f" {text}".encode() if text else b""  # nothing is put before nothing
    assert joined(llama, text) == expected
    gemma = build(make(tokenizer=sentencepiece(GEMMA, prepended=False), config=ROLES))
    assert joined(gemma, text) == text.encode()


def test_metaspace_stands_for_a_space(make: Make) -> None:
    pieces = [("<unk>", 0.0), *((c, -2.0) for c in "▁abc"), ("▁a", -1.0)]
    native = Tokenizer(models.Unigram(pieces, unk_id=0))
    native.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    native.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = build(make(tokenizer=native, config={"eos_token": "<unk>"}))
    assert tokenizer.token_bytes()[5] == b" a"
    assert joined(tokenizer, "a bc a") == b" a bc a"


def test_control_tokens_and_ids_without_a_token_have_none(make: Make) -> None:
    native = Tokenizer.from_file(str(make() / "tokenizer.json"))
    native.add_tokens([AddedToken("日本plain")])
    tokenizer = build(make(tokenizer=native))
    found = tokenizer.token_bytes()
    assert len(found) == tokenizer.vocab_size
    assert [i for i, part in enumerate(found) if part is None] == sorted(tokenizer.special_ids)
    assert found[native.token_to_id("日本plain")] == "日本plain".encode()
    assert tokenizer.token_bytes() is found


@pytest.mark.parametrize(
    ("decoder", "named"),
    (
        (None, "no decoder"), (decoders.WordPiece(), "WordPiece"), (decoders.BPEDecoder(), "BPEDecoder"),
        (decoders.CTC(), "CTC"), (decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]), "ByteLevel"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0)]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]), "Strip"),
        (decoders.Sequence([decoders.Replace(Regex("a+"), "b"), decoders.Fuse()]), "Replace"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "b")]), "Replace"),
    ),
)  # fmt: skip
def test_a_vocabulary_whose_tokens_depend_on_their_neighbours_is_refused(make: Make, decoder: Any, named: str) -> None:
    native = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1}, unk_token="<unk>"))
    if decoder is not None:
        native.decoder = decoder
    tokenizer = build(make(tokenizer=native, config={"eos_token": "<unk>"}))
    with pytest.raises(UnsupportedRequestError, match=rf"cannot say which bytes[\s\S]*{named}[\s\S]*neighbours"):
        tokenizer.token_bytes()


def test_a_byte_token_is_its_text_where_the_decoder_knows_no_bytes() -> None:
    decoder = {"type": "Sequence", "decoders": [{"type": "Fuse"}]}
    assert token_bytes(decoder, ["<0x41>", None, "é"]) == (b"<0x41>", None, "é".encode())
