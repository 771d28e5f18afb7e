"""The tokenizer against the conformance kit, byte-level with and without a chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pluglm_tokenizers
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pluglm.testing.tokenizer import TokenizerContract

BASE = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TestByteLevelWithChat(TokenizerContract):
    provider = pluglm_tokenizers

    @pytest.fixture
    def folder(self, make: Callable[..., Path]) -> Path:
        return make(config=BASE, template=CHATML)


class TestBaseModel(TokenizerContract):
    provider = pluglm_tokenizers

    @pytest.fixture
    def folder(self, make: Callable[..., Path]) -> Path:
        return make(config=BASE)


class TestUnigramThatKnowsItsControlTokensAsPieces(TokenizerContract):
    """SentencePiece models hold "</s>" in their vocabulary, so ordinary tokenization can produce it."""

    provider = pluglm_tokenizers
    lossless = False

    @pytest.fixture
    def folder(self, make: Callable[..., Path]) -> Path:
        pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [
            (c, -3.0) for c in "▁</>sabcdefghijklmnopqrtuvwxyz\n\t():éï"
        ]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
        template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}"
        return make(tokenizer=tokenizer, config=config, template=template)
