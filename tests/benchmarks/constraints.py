"""What holding a text to a grammar costs: microseconds a token, for compiling, for the mask, and for a whole step.

The texts are JSON, numbers and sums, in the embedded model's tokens. Each is walked through token by token; that every
token of it is allowed, and that each mask holds it, is checked in the same run. Shown are the time to compile a grammar
and read its first mask; of each token, the matcher alone (accept, then the mask) and the whole logits processor as
strategies call it (reading the row, the matcher, forbidding in the scores), which a batch of rows shares. Prints a
table, then one line of JSON. `--quick` does one round, to see that everything runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

import pluglm
from pluglm.constrained import ConstraintProcessor
from pluglm.contracts import Constraint, ConstraintRequest, Grammar, Matcher
from pluglm.registry import Registry

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["csv", "json", "xml"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "zip"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}
DOCUMENT = (
    '{"name": "Ada Lovelace", "age": 36, "tags": ["csv", "json"], '
    '"address": {"street": "12 St James Square, London", "zip": "01234"}}'
)
CASES = {
    "json_schema": (Grammar("json_schema", json.dumps(SCHEMA)), DOCUMENT),
    "json": (Grammar("json"), DOCUMENT),
    "regex": (Grammar("regex", "[0-9]{4}-[0-9]{2}-[0-9]{2}( [0-9]{2}:[0-9]{2})?"), "2026-11-21 18:22"),
    "choice": (Grammar("choice", json.dumps(["a comma", "a semicolon", "a tabulator"])), "a semicolon"),
    "lark": (
        Grammar("lark", 'start: sum\nsum: term (("+" | "-") term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]+/'),
        "1+(22-(333+4))-55555+((6)-7)",
    ),
}


def walk(matcher: Matcher, ids: list[int], masks: torch.Tensor) -> list[float]:
    """Seconds of accept and mask for each token of a text. Stops the run if one is not allowed."""
    spent = []
    matcher.allow(masks, 0)
    for token in ids:
        if not int(masks[0, token // 32]) >> token % 32 & 1:
            raise SystemExit(f"token {token} of the text is not in the mask")
        start = time.perf_counter()
        matcher.accept(token)
        matcher.allow(masks, 0)
        spent.append(time.perf_counter() - start)
    if not matcher.accepting:
        raise SystemExit("the text is not one of the grammar's")
    return spent


def steps(root: Matcher, ids: list[int], eos: tuple[int, ...], rows: int, V: int) -> list[float]:
    """Seconds of the whole processor for each token of a text in `rows` rows, the first aside."""
    prompts = torch.tensor([[1, 2, 3]] * rows)
    processor = ConstraintProcessor([root] * rows, prompts, eos)
    spent = []
    for n in range(len(ids) + 1):
        shown = torch.cat((prompts, torch.tensor([ids[:n]] * rows, dtype=torch.int64).view(rows, n)), 1)
        scores = torch.zeros(rows, V)
        start = time.perf_counter()
        kept = processor(shown, scores)
        spent.append(time.perf_counter() - start)
        if n < len(ids) and not bool((kept[:, ids[n]] == 0).all()):
            raise SystemExit(f"token {ids[n]} of the text was forbidden")
    return spent[1:]


def microseconds(spent: list[float]) -> dict[str, float]:
    """Median and the value that one in a hundred exceeds."""
    ordered = sorted(spent)
    return {
        "median_us": round(1e6 * statistics.median(ordered), 1),
        "p99_us": round(1e6 * ordered[int(0.99 * (len(ordered) - 1))], 1),
    }


def measure(
    build: Callable[[], Constraint], lm: pluglm.LanguageModel, eos: tuple[int, ...], rounds: int, rows: int
) -> dict[str, Any]:
    """All grammars of one provider."""
    assert lm.tokenizer is not None
    V = lm.model.description.vocab_size
    start = time.perf_counter()
    constraint = build()
    results: dict[str, Any] = {"vocabulary_ms": round(1e3 * (time.perf_counter() - start), 1)}
    masks = torch.empty(1, -(-V // 32), dtype=torch.int32)
    for kind, (grammar, text) in CASES.items():
        ids = lm.tokenizer.encode(text, add_special_tokens=False)
        compiled, matched, whole = [], [], []
        for i in range(rounds + 1):
            start = time.perf_counter()
            root = constraint.compile(grammar)
            root.allow(masks, 0)
            spent = time.perf_counter() - start
            alone, shared = walk(root.fork(), ids, masks), steps(root, ids, eos, rows, V)
            if i or rounds == 1:  # the first round warms up
                compiled.append(spent)
                matched += alone
                whole += shared
        results[kind] = {
            "tokens": len(ids), "compile_ms": round(1e3 * statistics.median(compiled), 2),
            "matcher": microseconds(matched), f"processor_{rows}_rows": microseconds(whole),
        }  # fmt: skip
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--rows", type=int, default=1, help="rows that the processor is shown")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    torch.set_num_threads(args.threads)
    lm = pluglm.load("pystdlib", dtype="float32")
    assert lm.tokenizer is not None
    eos = lm.generation.eos_token_id or ()
    texts = [None if i in eos or not part else part for i, part in enumerate(lm.tokenizer.token_bytes())]
    texts += [None] * (lm.model.description.vocab_size - len(texts))
    request = ConstraintRequest(len(texts), texts, eos, "cpu")
    results = {}
    print(f"{'constraint':12} {'grammar':12} {'tokens':>6} {'compile':>10}   matcher [p99]      processor [p99]")
    for provider in Registry.installed().of("constraint"):
        plugin = provider_object(provider.target)
        results[provider.name] = found = measure(
            lambda plugin=plugin: plugin.pluglm_build_constraint(request=request), lm, eos, args.rounds, args.rows
        )
        for kind in CASES:
            row = found[kind]
            matcher, whole = row["matcher"], row[f"processor_{args.rows}_rows"]
            print(
                f"{provider.name:12} {kind:12} {row['tokens']:6} {row['compile_ms']:7.2f} ms "
                f"{matcher['median_us']:7.1f} [{matcher['p99_us']:.1f}] us {whole['median_us']:9.1f} [{whole['p99_us']:.1f}] us"
            )
    print(json.dumps({
        "model": "pystdlib", "vocab_size": len(texts), "rounds": args.rounds, "rows": args.rows,
        "threads": args.threads, "quick": args.quick, "results": results, "torch": torch.__version__,
        "llguidance": version("llguidance"), "machine": platform.processor() or platform.machine(),
    }))  # fmt: skip


def provider_object(target: str) -> Any:
    """What an entry point names."""
    from importlib.metadata import EntryPoint

    return EntryPoint("constraint", target, "pluglm.constraints").load()


if __name__ == "__main__":
    main()
