"""What packing costs in quality: every installed quantizer and variant on the embedded model's held-out text.

For each: bits per byte, the share of tokens for which it would choose what the model in bfloat16 (and in float32) chooses,
the layers and tables that are packed and their bytes. Each packed model is saved and loaded, and must compute the same
before it is scored. What cannot be built is listed with the reason. Weights are packed from the embedded model's
bfloat16, products are computed in float32, or in bfloat16 where a quantizer has no other. The last line is one JSON
object.

Two bounds are asked of `native`, against the model in bfloat16: at most 2 % more bits per byte for 4 bits, 0.1 % for 8.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pluglm_model_pystdlib import held_out
from pluglm_model_pystdlib.evaluate import scored
from safetensors import safe_open

import pluglm
from pluglm import PluglmError
from pluglm.registry import Registry

MODEL = "pystdlib"
DTYPES = ("float32", "bfloat16")
#: Further rows for a quantizer: options that change what is packed. The first row of a variant has none.
#: A quick run takes the first of these alone.
OPTIONS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "native": ({"rounding": "nearest"}, {"weighting": "even"}, {"head": "none"}),
}
#: (variant of `native`, factor on bits per byte of bfloat16).
BOUNDS = (("native:int4", 1.02), ("native:int8", 1.001))


@dataclass(frozen=True)
class Row:
    """One line: what was packed how, and what it costs.

    bits_per_byte: of UTF-8, all texts together. ratio: to bfloat16. agree_*: share of tokens on which the choice is that of
    the plain model. layers, bytes: packed. seconds: loading and packing, then scoring.
    """

    quantizer: str
    options: Mapping[str, Any]
    dtype: str
    bits_per_byte: float
    ratio: float
    agree_bf16: float
    agree_f32: float
    layers: int
    bytes: int
    pack_s: float
    score_s: float


@dataclass(frozen=True)
class Score:
    """bits_per_byte, and what the model would have chosen for each token [tokens]."""

    bits_per_byte: float
    chosen: torch.Tensor

    @classmethod
    def of(cls, lm: pluglm.LanguageModel, texts: list[str]) -> Score:
        """Teacher forcing, as every quality figure of the project is taken."""
        nats, chosen = 0.0, []
        for logits, targets, _ in scored(lm, texts):
            nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            chosen.append(logits.argmax(-1))
        return cls(nats / math.log(2) / sum(len(text.encode()) for text in texts), torch.cat(chosen))

    def agreement(self, other: Score) -> float:
        """Share of tokens on which both choose the same."""
        return float((self.chosen == other.chosen).float().mean())


def wanted(registry: Registry, *, quick: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(quantizer with its variant, options) for everything installed. A quantizer's features are its variants."""
    for provider in sorted(registry.of("quantizer"), key=lambda provider: provider.name):
        variants = tuple((provider.facts or {}).get("features") or ())
        for name in [f"{provider.name}:{variant}" for variant in variants] or [provider.name]:
            for options in ({}, *OPTIONS.get(provider.name, ())[: 1 if quick else None]):
                yield name, options


def build(name: str, options: Mapping[str, Any]) -> tuple[pluglm.LanguageModel, str]:
    """The packed model in the first compute dtype that the quantizer has. Raises PluglmError: that of the first."""
    first: PluglmError | None = None
    for dtype in DTYPES:
        try:
            return pluglm.load(MODEL, dtype=dtype, quantizer=name, options={"quantizer": options}), dtype
        except PluglmError as error:
            first = first or error
    assert first is not None
    raise first


def tensors(path: Path) -> dict[str, tuple[str, int]]:
    """Name -> (dtype and shape, bytes) of a saved model."""
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = opened.get_tensor(name)
                found[name] = f"{tensor.dtype} {list(tensor.shape)}", tensor.nbytes
    return found


def packed_bytes(lm: pluglm.LanguageModel, plain: Mapping[str, tuple[str, int]], text: str) -> int:
    """Save the model, see that what is read back computes the same, and count what the plain model does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        lm.save(Path(folder) / "packed")
        again = pluglm.load(Path(folder) / "packed")
        assert lm.tokenizer is not None
        ids = torch.tensor([lm.tokenizer.encode(text)[:64]])
        with torch.no_grad():
            assert torch.equal(again.model(ids).logits, lm.model(ids).logits), "what was saved computes something else"
        held = tensors(Path(folder) / "packed")
    return sum(size for name, (kind, size) in held.items() if plain.get(name, ("", 0))[0] != kind)


def replaced(plain: pluglm.LanguageModel, packed: pluglm.LanguageModel) -> int:
    """How many linear layers and token tables of the plain model are something else in the packed one."""
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    names = [name for name, module in plain.model.module.named_modules() if isinstance(module, kinds)]
    return sum(not isinstance(packed.model.module.get_submodule(name), kinds) for name in names)


def run(texts: list[str], *, quick: bool) -> tuple[list[Row], dict[str, str], Score]:
    """Every row, the reasons of what was passed over, and the score of the model in bfloat16."""
    plain = {dtype: pluglm.load(MODEL, dtype=dtype) for dtype in DTYPES}
    held = {}
    for dtype, lm in plain.items():
        with tempfile.TemporaryDirectory() as folder:
            lm.save(Path(folder) / "plain")
            held[dtype] = tensors(Path(folder) / "plain")
    scores = {dtype: Score.of(lm, texts) for dtype, lm in plain.items()}
    base = scores["bfloat16"]
    rows, passed = [], {}

    def add(
        name: str,
        options: Mapping[str, Any],
        dtype: str,
        score: Score,
        layers: int,
        size: int,
        times: tuple[float, float],
    ) -> None:
        rows.append(Row(
            name, options, dtype, score.bits_per_byte, score.bits_per_byte / base.bits_per_byte, score.agreement(base),
            score.agreement(scores["float32"]), layers, size, *times,
        ))  # fmt: skip
        show(rows[-1])

    for dtype in reversed(DTYPES):
        add("none", {}, dtype, scores[dtype], 0, 0, (0.0, 0.0))
    for name, options in wanted(Registry.installed(), quick=quick):
        started = time.perf_counter()
        try:
            lm, dtype = build(name, options)
        except PluglmError as error:
            passed[f"{name} {dict(options) or ''}".strip()] = " ".join(f"{error.what} {error.why}".split())
            continue
        loaded = time.perf_counter()
        score = Score.of(lm, texts)
        ended = time.perf_counter()
        layers = replaced(plain[dtype], lm)
        size = packed_bytes(lm, held[dtype], texts[0])
        add(name, options, dtype, score, layers, size, (loaded - started, ended - loaded))
    return rows, passed, base


def show(row: Row) -> None:
    """A line for people."""
    options = ", ".join(f"{name}={value}" for name, value in row.options.items())
    print(f"| {row.quantizer} | {options} | {row.dtype} | {row.bits_per_byte:.4f} | {row.ratio:.4f} | {row.agree_bf16:.2%} "
          f"| {row.agree_f32:.2%} | {row.layers} | {row.bytes:,} |", flush=True)  # fmt: skip


def bounds(rows: list[Row]) -> dict[str, bool]:
    """Whether each bound is met; a row that is not there is not."""
    met = {}
    for name, factor in BOUNDS:
        found = [row for row in rows if row.quantizer == name and not row.options]
        met[name] = bool(found) and found[0].ratio <= factor
        print(f"{name}: at most {factor} times the bits per byte of bfloat16: {'met' if met[name] else 'missed'}"
              + (f" ({found[0].ratio:.5f})" if found else " (not installed)"))  # fmt: skip
    return met


def commit() -> str:
    """Of this repository; with a mark if files differ from it."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="1,500 characters, fewer rows: to see that it works, not for figures"
    )
    parser.add_argument("--max-files", type=int, default=3, help="held-out files, by path; all: 25")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = list(held_out().values())[: args.max_files]
    if args.quick:
        texts = [texts[0][:1500]]
    print("| quantizer | options | computed in | bits per byte | to bfloat16 | as bfloat16 chooses | as float32 chooses "
          "| layers | bytes |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    rows, passed, base = run(texts, quick=args.quick)
    for name, reason in passed.items():
        print(f"{name} is passed over: {reason}")
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} texts, {size} bytes, {len(base.chosen)} tokens")
    met = bounds(rows)
    print(json.dumps({
        "quick": args.quick, "texts": len(texts), "bytes": size, "tokens": len(base.chosen), "threads": args.threads,
        "rows": [asdict(row) for row in rows], "passed_over": passed, "bounds_met": met, "torch": torch.__version__,
        "python": platform.python_version(), "commit": commit(), "machine": platform.processor() or platform.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
