"""The corpus: the Python standard library's source, its tokenizer, and the split that keeps some files unseen.

A file belongs to the held-out set because of the hash of its path, so the split needs no list and does not
depend on the order in which a file system returns names.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
# Sizes (bytes) a held-out file may have: long enough to say something, short enough that none dominates the figure.
HELD_OUT_MIN_BYTES, HELD_OUT_MAX_BYTES = 6_000, 60_000
# One eligible file in this many is held out.
HELD_OUT_EVERY = 14
# Never held out, because training sees their near copies: generated code pages, and the old fork of the tokenizer.
# The library is what the model is for; its tests (two thirds of the bytes) are seen half as often.
LIBRARY_REPEATS = 2
NEVER_HELD_OUT = ("encodings/", "lib2to3/")


def stdlib_files(root: Path) -> Iterator[tuple[str, str]]:
    """Every Python source file under `root` as (posix path relative to root, text), sorted, exact copies once."""
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "lib-dynload/")) or "/bad" in name:
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # test data that is meant not to parse
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield name, text


def is_test(name: str) -> bool:
    """Whether a path belongs to the standard library's own tests (trained on, never held out)."""
    return any(part in ("test", "tests", "idle_test") for part in name.split("/"))


def is_held_out(name: str, text: str) -> bool:
    """Whether this file is kept from training. Decided by its path's hash and its size alone."""
    if is_test(name) or name.startswith(NEVER_HELD_OUT):
        return False
    if not HELD_OUT_MIN_BYTES <= len(text.encode()) <= HELD_OUT_MAX_BYTES:
        return False
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_EVERY == 0


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) that any UTF-8 text round-trips through."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(
    out: Path, *, vocab_size: int, root: Path | None = None, like: Path | None = None
) -> dict[str, object]:  # fmt: skip
    """Write `tokenizer.json`, `train.bin` (uint16 ids), `heldout.json` ({path: text}) and `corpus.json` into `out`.

    like: a tokenizer.json to use instead of fitting one: a draft model must have the tokenizer of its model.
    """
    out.mkdir(parents=True, exist_ok=True)
    root = root or Path(sysconfig.get_path("stdlib"))
    train: list[tuple[str, str]] = []
    held_out: dict[str, str] = {}
    for name, text in stdlib_files(root):
        if is_held_out(name, text):
            held_out[name] = text
        else:
            train.append((name, text))
    # The vocabulary is fitted to the library itself; its tests repeat their own names too often to be representative.
    if like is not None:
        tokenizer = Tokenizer.from_file(str(like))
    else:
        tokenizer = train_tokenizer([text for name, text in train if not is_test(name)], vocab_size)
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    ids: list[int] = []
    for (name, _), encoding in zip(train, tokenizer.encode_batch([text for _, text in train]), strict=True):
        for _ in range(1 if is_test(name) else LIBRARY_REPEATS):
            ids.append(end)
            ids.extend(encoding.ids)
    facts: dict[str, object] = {
        "python": sysconfig.get_python_version(),
        "train_files": len(train),
        "train_bytes": sum(len(text.encode()) for _, text in train),
        "train_tokens": len(ids),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held_out.values()),
    }
    tokenizer.save(str(out / "tokenizer.json"))
    np.asarray(ids, dtype=np.uint16).tofile(out / "train.bin")
    (out / "heldout.json").write_text(json.dumps(held_out, indent=0, ensure_ascii=False), encoding="utf-8")
    (out / "corpus.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return facts
