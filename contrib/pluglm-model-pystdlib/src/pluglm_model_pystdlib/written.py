"""A corpus that a model has written: what a draft model is to guess is what its model says, and nothing else.

Sequence-level distillation (Kim & Rush 2016, section 3.2): the likeliest continuations of the teacher are the data.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch


def write(model: Path, corpus: Path, out: Path, *, begin: int, tokens: int, batch: int, texts: int, seed: int) -> None:
    """Write `out/train.bin`: `texts` times `begin` tokens of the corpus and `tokens` of the model, greedy.

    Args:
        model: a checkpoint. corpus, out: folders of `train prepare`; what `fit` and `export` need is copied.
        batch: rows that are generated from together. The file grows with every batch, so a run may be ended early.
    """
    import pluglm
    from pluglm.contracts import GenerationOutput

    lm = pluglm.load(model, dtype="float32", offline=True)
    strategy = lm.strategy("greedy")
    config = lm.generation.updated(max_new_tokens=tokens, eos_token_id=(), pad_token_id=0)
    ids = np.fromfile(corpus / "train.bin", dtype=np.uint16)
    draw = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "corpus.json", "heldout.json"):
        shutil.copy(corpus / name, out / name)
    with (out / "train.bin").open("wb") as file, torch.no_grad():
        for _ in range(-(-texts // batch)):
            starts = draw.integers(len(ids) - begin, size=batch)
            beginnings = torch.from_numpy(np.stack([ids[s : s + begin] for s in starts]).astype(np.int64))
            made = strategy(lm.model, beginnings, attention_mask=torch.ones_like(beginnings), generation_config=config)
            assert isinstance(made, GenerationOutput)
            file.write(made.sequences.numpy().astype(np.uint16).tobytes())
            file.flush()
