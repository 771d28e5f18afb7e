"""Tiny tokenizers, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "hello world, this is a small text",
    "def f(x): return x + 1",
    "naïve café 日本語 🙂",
    "user assistant system",
] * 4
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    return tokenizer


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder: `make(config={…}, template="…", tokenizer=…)`."""

    def write(
        *, tokenizer: Tokenizer | str | None = None, config: dict[str, Any] | None = None, template: str | None = None
    ) -> Path:
        text = tokenizer if isinstance(tokenizer, str) else (tokenizer or byte_level()).to_str()
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        config = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}} if config is None else config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        return tmp_path

    return write
