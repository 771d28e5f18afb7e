"""The pieces of tokenizer.json by id and by text: what `convert_ids_to_tokens` and `len` are about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pluglm.errors import ConfigError


@dataclass(frozen=True)
class Vocabulary:
    """ids: piece -> id, added tokens included. pieces: id -> piece. base_size: pieces without the added ones."""

    ids: Mapping[str, int]
    pieces: Mapping[int, str]
    base_size: int


def read_vocabulary(folder: Path) -> Vocabulary:
    """Read it. Raises ConfigError for a file whose vocabulary has no known form."""
    path = folder / "tokenizer.json"
    document: Any = json.loads(path.read_text(encoding="utf-8"))
    vocab = document.get("model", {}).get("vocab")
    if isinstance(vocab, list):  # Unigram: pairs of a piece and its score, in the order of their ids
        ids = {entry[0]: i for i, entry in enumerate(vocab)}
    elif isinstance(vocab, dict):
        ids = dict(vocab)
    else:
        raise ConfigError(f'the vocabulary of "{path}" has no known form.', why=f"it is a {type(vocab).__name__}.",
                          fix="Download the model again.", key="model.vocab", path=str(path))  # fmt: skip
    base = len(ids)
    for token in document.get("added_tokens") or ():
        ids[token["content"]] = token["id"]
    return Vocabulary(ids, {i: piece for piece, i in ids.items()}, base)
