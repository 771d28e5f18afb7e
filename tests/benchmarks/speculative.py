"""Tokens a second of prompt lookup against greedy decoding, over the same model: one row at a time and a batch of eight.

Three kinds of prompt, from files that the embedded model was not trained on: the head of a file given twice, so that the
second copy is to be continued; the head of a file alone; and eight of both. Rounds alternate between the two strategies,
so that a machine whose speed drifts shifts both; the tokens of each round are compared. Prints a table, then one line of
JSON. `--quick` does one short round of each, to see that everything runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from pluglm_model_pystdlib import held_out

import pluglm

PLAIN, GUESSING = "greedy", "prompt-lookup"
BATCH = 8


class FirstToken:
    """A streamer that notes when the first token came, so that prefill is left out on both sides."""

    def __init__(self) -> None:
        self.at: float | None = None

    def put(self, token_ids: torch.Tensor) -> None:
        """Called once a token."""
        if self.at is None:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing to do."""


def prompts(lm: pluglm.LanguageModel, count: int, tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """`count` prompts that repeat themselves, and as many that do not; `tokens` new ones follow."""
    assert lm.tokenizer is not None
    copied, fresh = [], []
    for text in held_out().values():
        ids = lm.tokenizer.encode(text)
        if len(ids) >= 2 * tokens and len(fresh) < count:
            head = ids[: tokens + tokens // 2]
            copied.append([*head, *head[: tokens // 4]])
            fresh.append(ids[: tokens // 2])
    if len(fresh) < count:
        raise SystemExit(f"only {len(fresh)} held-out files are long enough for --tokens {tokens}; ask for fewer.")
    return copied, fresh


def timed(lm: pluglm.LanguageModel, name: str, rows: Sequence[list[int]], tokens: int) -> tuple[list[list[int]], float]:
    """The new tokens of every row by one strategy, and the seconds after the first one."""
    strategy, first = lm.strategy(name), FirstToken()
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    config = lm.generation.updated(max_new_tokens=tokens, eos_token_id=(), pad_token_id=0)
    with torch.no_grad():
        output: Any = strategy(lm.model, ids, attention_mask=mask, generation_config=config, streamer=first)
    ended = time.perf_counter()
    assert first.at is not None
    return [output.completion(row) for row in range(len(rows))], ended - first.at


PACKAGES = {PLAIN: "standard", GUESSING: "speculative"}


def measure(lm: pluglm.LanguageModel, batches: Sequence[list[list[int]]], tokens: int, rounds: int) -> dict[str, Any]:
    """One kind of prompt: medians over rounds of the tokens a second of both, and how many guesses held."""
    speculative: Any = lm.strategy(GUESSING)
    rates: dict[str, list[float]] = {PLAIN: [], GUESSING: []}
    passes = guessed = accepted = 0
    for i in range(rounds + 1):
        seconds = {PLAIN: 0.0, GUESSING: 0.0}
        for rows in batches:
            made = {}
            for name in (PLAIN, GUESSING) if i % 2 else (GUESSING, PLAIN):
                made[name], spent = timed(lm, name, rows, tokens)
                seconds[name] += spent
            assert made[PLAIN] == made[GUESSING], "the two strategies made different tokens"
            if i == rounds:  # guesses are the same in every round
                found = speculative.statistics
                passes, guessed, accepted = passes + found.passes, guessed + found.guessed, accepted + found.accepted
        if i:  # the first round warms up
            new = sum(map(len, batches)) * (tokens - 1)
            for name, spent in seconds.items():
                rates[name].append(new / spent)
    ratios = [b / a for a, b in zip(rates[PLAIN], rates[GUESSING], strict=True)]
    return {
        "greedy_tokens_per_s": round(statistics.median(rates[PLAIN]), 1),
        "prompt_lookup_tokens_per_s": round(statistics.median(rates[GUESSING]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3),
        "guessed": guessed, "accepted": accepted,
        "acceptance_rate": round(accepted / guessed, 3) if guessed else None,
        "tokens_per_pass": round(sum(map(len, batches)) * (tokens - 1) / passes, 2),
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=6, help="of each kind, for one row at a time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default="dynamic")
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.prompts, args.rounds = 32, 1, 1
    torch.set_num_threads(args.threads)
    lm = pluglm.load("pystdlib", dtype="float32", cache=args.cache, decoding=GUESSING)
    lm.generate([1, 2], max_new_tokens=1, decoding=PLAIN)
    copied, fresh = prompts(lm, max(args.prompts, BATCH // 2), args.tokens)
    kinds = {
        "repeating": [[row] for row in copied[: args.prompts]],
        "not repeating": [[row] for row in fresh[: args.prompts]],
        f"batch of {BATCH}": [copied[: BATCH // 2] + fresh[: BATCH // 2]],
    }
    results = {}
    print(f"{'prompts':14} {'greedy':>9} {'lookup':>9}  tokens/s   ratio [spread]          accepted   tokens a pass")
    for kind, batches in kinds.items():
        result = results[kind] = measure(lm, batches, args.tokens, args.rounds)
        rate = "-" if result["acceptance_rate"] is None else f"{result['acceptance_rate']:.0%}"
        print(
            f"{kind:14} {result['greedy_tokens_per_s']:9.1f} {result['prompt_lookup_tokens_per_s']:9.1f}            "
            f"{result['ratio']:.2f} [{result['ratio_min']:.2f} … {result['ratio_max']:.2f}]  {rate:>10} "
            f"{result['tokens_per_pass']:12.2f}"
        )
    print(json.dumps({
        "model": "pystdlib", "plan": lm.plan.hash[:12], "cache": args.cache, "tokens": args.tokens,
        "prompts": args.prompts, "rounds": args.rounds, "threads": args.threads, "quick": args.quick,
        "results": results, "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
