"""Bits per byte on the held-out files, beside what xz needs: `python -m pluglm_model_pystdlib.evaluate --help`.

Every quality figure of the project (quantization, cache compression) is measured here, so that figures compare. With
`--cache` the text goes through a cache in short pieces, so that what a query reads is mostly what the cache gives back;
`--table` does that for full precision and for every width and variant of the layout `quantized`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pluglm_model_pystdlib import held_out

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm import LanguageModel

# A window is scored from its middle on, so that each scored token has at least half a context before it.
STRIDE_SHARE = 0.5
# Tokens of a pass through a cache. Few: a token reads those of its own pass in full precision.
PIECE = 32
# The rows of the table: the cache and its options. The tail of cells in full precision is as short as a piece.
ROWS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("dynamic", {}),
    *((name, {"bits": bits, "residual": PIECE}) for bits in (8, 4, 2) for name in ("quantized", "quantized:hqq")),
)


@dataclass(frozen=True)
class Quality:
    """bits_per_byte: of UTF-8, all files together. top1: share of tokens that the model would have chosen.

    cache_bytes: of the longest cache, for each of its cells, spare room included; None: scored without a cache.
    """

    bits_per_byte: float
    top1: float
    files: int
    bytes: int
    tokens: int
    cache_bytes: float | None = None


def quality(lm: LanguageModel, *, max_files: int | None = None, piece: int | None = None) -> Quality:
    """Score the held-out files with teacher forcing; each file follows an end-of-text token.

    Args:
        piece: tokens of a pass through a cache of the planned layout; None: without a cache, a window in one pass.
    """
    import torch

    files = list(held_out().values())[:max_files]
    nats, hits, tokens = 0.0, 0, 0
    longest: tuple[int, int] | None = None  # cells and bytes
    for rows, targets, held in scored(lm, files, piece=piece):
        longest = max(filter(None, (longest, held)), default=None)
        nats += torch.nn.functional.cross_entropy(rows, targets, reduction="sum").item()
        hits += int((rows.argmax(-1) == targets).sum())
        tokens += len(targets)
    size = sum(len(text.encode()) for text in files)
    per_cell = longest[1] / longest[0] if longest else None
    return Quality(nats / math.log(2) / size, hits / tokens, len(files), size, tokens, per_cell)


def scored(
    lm: LanguageModel, texts: Iterable[str], *, piece: int | None = None
) -> Iterator[tuple[Tensor, Tensor, tuple[int, int] | None]]:
    """Each token of the texts once, in windows: float32 logits [T, V], the tokens that came [T], the cache's size.

    Args:
        piece: as for `quality`; the cache's size is its cells and bytes, None without one.
    """
    import torch

    tokenizer = lm.tokenizer
    context = lm.model.description.max_seq_len
    assert tokenizer is not None and context is not None
    stride = int(context * STRIDE_SHARE)
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        end = ids.shape[1]
        done = 1  # position of the first token that is not scored yet
        start = 0
        while done < end:
            stop = min(start + context, end)
            logits, held = _logits(lm, ids[:, start:stop], piece)
            yield logits[done - 1 - start : stop - 1 - start], ids[0, done:stop], held
            done, start = stop, stop - stride if stop < end else stop


def _logits(lm: LanguageModel, ids: Tensor, piece: int | None) -> tuple[Tensor, tuple[int, int] | None]:
    """Float32 logits [T, V] of one window [1, T], and the cells and bytes of the cache that it went through."""
    import torch

    with torch.no_grad():
        if piece is None:
            return lm.model(ids, use_cache=False).logits[0].float(), None
        cache = lm.new_cache(capacity=ids.shape[1])
        parts = (ids[:, start : start + piece] for start in range(0, ids.shape[1], piece))
        passes = [lm.model(part, past_key_values=cache, use_cache=True).logits[0] for part in parts]
        return torch.cat(passes).float(), (cache.length, cache.nbytes)


def xz_bits_per_byte(*, max_files: int | None = None) -> dict[str, float]:
    """What `xz -9e` needs for the same files: each by itself, and all in one stream, which favours it."""
    files = [text.encode() for text in list(held_out().values())[:max_files]]
    size = sum(map(len, files))

    def packed(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    return {"each": 8 * sum(map(packed, files)) / size, "together": 8 * packed(b"".join(files)) / size}


def table(
    model: str, dtype: str, *, max_files: int | None, piece: int, options: Mapping[str, Any], quantizer: str | None
) -> list[dict[str, Any]]:
    """Print bits per byte of every row of `ROWS`, and return them. options: set over those of a packed row."""
    import pluglm

    chosen = [(name, {**own, **options} if own else {}) for name, own in ROWS]
    models = [  # all before the first is scored: what a row needs and is not installed is told at once
        pluglm.load(model, dtype=dtype, quantizer=quantizer, cache=name, options={"cache": asked})
        for name, asked in chosen
    ]
    print("| cache | bits | bits per byte | to full precision | tokens guessed | bytes a cell |")
    print("|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for (name, asked), lm in zip(chosen, models, strict=True):
        found = quality(lm, max_files=max_files, piece=piece)
        full = rows[0]["bits_per_byte"] if rows else found.bits_per_byte
        ratio = found.bits_per_byte / full
        rows.append({"cache": name, "options": asked, **asdict(found), "ratio": ratio, "plan": lm.plan.hash})
        print(
            f"| {name} | {asked.get('bits', dtype)} | {found.bits_per_byte:.4f} | {ratio:.4f} | {found.top1:.2%} "
            f"| {found.cache_bytes:.0f} |",
            flush=True,
        )
    return rows


def _option(text: str) -> tuple[str, Any]:
    """KEY=JSON of the command line."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=JSON; write for example bits=4.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"the value of {key} is not JSON ({error}); write for example {key}=4."
        ) from error


def _count(text: str) -> int:
    """A whole number of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on.")
    return int(text)


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="pystdlib")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantizer", default=None)
    parser.add_argument("--max-files", type=_count, default=None, help="only the first files, by path")
    parser.add_argument("--cache", default=None, help="score through a cache of this layout; left out: without one")
    parser.add_argument(
        "--cache-option", type=_option, action="append", default=[], metavar="KEY=JSON", help="may be repeated"
    )
    parser.add_argument("--piece", type=_count, default=PIECE, help="tokens of a pass through the cache")
    parser.add_argument(
        "--table", action="store_true", help="full precision and every width and variant of `quantized`"
    )
    args = parser.parse_args(arguments)
    if args.table and args.cache:
        parser.error("--table chooses the caches itself: leave out --cache.")
    if args.cache_option and not (args.table or args.cache):
        parser.error("--cache-option is for a cache: name it with --cache, or use --table.")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command line: human lines first, the last one JSON."""
    import pluglm

    args = _arguments(arguments)
    options = dict(args.cache_option)
    if args.table:
        rows = table(
            args.model, args.dtype, max_files=args.max_files, piece=args.piece, options=options,
            quantizer=args.quantizer,
        )  # fmt: skip
        print(f"{rows[0]['files']} files, {rows[0]['bytes']} bytes, {rows[0]['tokens']} tokens; pieces of {args.piece}")
        print(json.dumps({"dtype": args.dtype, "piece": args.piece, "rows": rows}))
        return
    lm = pluglm.load(
        args.model, dtype=args.dtype, quantizer=args.quantizer, cache=args.cache or "auto", options={"cache": options}
    )
    result = quality(lm, max_files=args.max_files, piece=args.piece if args.cache else None)
    xz = xz_bits_per_byte(max_files=args.max_files)
    print(f"{result.files} files, {result.bytes} bytes, {result.tokens} tokens")
    print(f"model  {result.bits_per_byte:.4f} bits per byte, {result.top1:.1%} of tokens guessed")
    if result.cache_bytes is not None:
        print(f"cache  {args.cache}, {result.cache_bytes:.0f} bytes a cell, pieces of {args.piece} tokens")
    print(f"xz -9e {xz['each']:.4f} bits per byte each by itself, {xz['together']:.4f} in one stream")
    print(json.dumps({**asdict(result), "xz": xz, "plan": lm.plan.hash}))


if __name__ == "__main__":
    main()
