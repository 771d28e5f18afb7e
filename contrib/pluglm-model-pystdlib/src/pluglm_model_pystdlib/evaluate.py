"""Bits per byte on the held-out files, beside what xz needs: `python -m pluglm_model_pystdlib.evaluate --help`.

Every quality figure of the project (quantization, cache compression) is measured here, so that figures compare.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pluglm_model_pystdlib import held_out

if TYPE_CHECKING:
    from pluglm import LanguageModel

# A window is scored from its middle on, so that each scored token has at least half a context before it.
STRIDE_SHARE = 0.5


@dataclass(frozen=True)
class Quality:
    """bits_per_byte: of UTF-8, all files together. top1: share of tokens that the model would have chosen."""

    bits_per_byte: float
    top1: float
    files: int
    bytes: int
    tokens: int


def quality(lm: LanguageModel, *, max_files: int | None = None) -> Quality:
    """Score the held-out files with teacher forcing, without a cache; each file follows an end-of-text token."""
    import torch

    tokenizer = lm.tokenizer
    context = lm.model.description.max_seq_len
    assert tokenizer is not None and context is not None
    stride = int(context * STRIDE_SHARE)
    files = list(held_out().values())[:max_files]
    nats, hits, tokens = 0.0, 0, 0
    for text in files:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        end = ids.shape[1]
        scored = 1  # position of the first token that is not scored yet
        start = 0
        while scored < end:
            stop = min(start + context, end)
            with torch.no_grad():
                logits = lm.model(ids[:, start:stop], use_cache=False).logits[0].float()
            targets = ids[0, scored:stop]
            rows = logits[scored - 1 - start : stop - 1 - start]
            nats += torch.nn.functional.cross_entropy(rows, targets, reduction="sum").item()
            hits += int((rows.argmax(-1) == targets).sum())
            tokens += len(targets)
            scored, start = stop, stop - stride if stop < end else stop
    size = sum(len(text.encode()) for text in files)
    return Quality(nats / math.log(2) / size, hits / tokens, len(files), size, tokens)


def xz_bits_per_byte(*, max_files: int | None = None) -> dict[str, float]:
    """What `xz -9e` needs for the same files: each by itself, and all in one stream, which favours it."""
    files = [text.encode() for text in list(held_out().values())[:max_files]]
    size = sum(map(len, files))

    def packed(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return {"each": 8 * sum(map(packed, files)) / size, "together": 8 * packed(b"".join(files)) / size}


def main() -> None:
    """The command line: human lines first, the last one JSON."""
    import pluglm

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="pystdlib")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantizer", default=None)
    parser.add_argument("--max-files", type=int, default=None)
    args = parser.parse_args()
    lm = pluglm.load(args.model, dtype=args.dtype, quantizer=args.quantizer)
    result, xz = quality(lm, max_files=args.max_files), xz_bits_per_byte(max_files=args.max_files)
    print(f"{result.files} files, {result.bytes} bytes, {result.tokens} tokens")
    print(f"model  {result.bits_per_byte:.4f} bits per byte, {result.top1:.1%} of tokens guessed")
    print(f"xz -9e {xz['each']:.4f} bits per byte each by itself, {xz['together']:.4f} in one stream")
    print(json.dumps({**asdict(result), "xz": xz, "plan": lm.plan.hash}))


if __name__ == "__main__":
    main()
