"""Tokens a second of speculative decoding against plain decoding, over the same model: what each kind of guess is worth.

Kinds, from files that the embedded model was not trained on:

    lookup, repeating   the head of a file and its beginning again, so that the second copy is to be continued; one row
    lookup, fresh       the head of a file, drawn at temperature 1, so that the text hardly repeats itself; one row
    lookup, batch of 8  four rows of each, greedy
    lookup, mixed       the same eight, drawn at temperature 0.7: some repeat themselves, and the batch waits for others
    draft model         the head of a file, greedy, guessed by pystdlib-draft; one row
    draft and copies    the same, where the text does not say by itself what is likely to follow
    early exit          the same, guessed by the model's own first layers

Rounds alternate between the two strategies, and which one goes first, so that a machine whose speed drifts shifts both;
a round's ratio compares its own two halves, and the table shows the median of the ratios. The tokens of the two are
compared in every round: they must be the same, one for one. Prompts are read before the clock starts. Prints a table,
then one line of JSON. `--quick` does one short round of each, to see that everything runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pluglm_model_pystdlib import held_out

import pluglm

BATCH = 8
#: What the kinds are asked to reach, as ratios.
BOUNDS = {
    "lookup, repeating": 1.5, "lookup, fresh": 0.95, "lookup, batch of 8": 1.0, "lookup, mixed": 1.0, "draft model": 1.2,
    "draft and copies": 1.2, "early exit": None,
}  # fmt: skip


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


@dataclass(frozen=True)
class Kind:
    """One line of the table.

    Attributes:
        batches: rows of token ids that are generated from together. guessing: the strategy. said: settings of both
            strategies. own: settings of `guessing` alone.
    """

    batches: Sequence[Sequence[list[int]]]
    guessing: str
    said: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)


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


def kinds(lm: pluglm.LanguageModel, args: argparse.Namespace) -> dict[str, Kind]:
    """What is measured, by name."""
    copied, fresh = prompts(lm, max(args.prompts, BATCH // 2), args.tokens)
    draft = pluglm.load("pystdlib-draft", dtype="float32", executor=args.draft_executor or args.executor)
    alone = [[row] for row in fresh[: args.prompts]]
    eight = copied[: BATCH // 2] + fresh[: BATCH // 2]
    count = {"num_assistant_tokens": args.guess, "assistant_confidence_threshold": args.confidence}
    found = {
        "lookup, repeating": Kind([[row] for row in copied[: args.prompts]], "prompt-lookup"),
        "lookup, fresh": Kind(alone, "prompt-lookup", {"temperature": 1.0, "seed": 1}),
        f"lookup, batch of {BATCH}": Kind([eight], "prompt-lookup"),
        "lookup, mixed": Kind([eight], "prompt-lookup", {"temperature": 0.7, "seed": 1}),
        "draft model": Kind(alone, "assisted", own={"assistant_model": draft, **count}),
        "draft and copies": Kind(
            alone, "assisted", own={"assistant_model": draft, "prompt_lookup_num_tokens": 10, **count}
        ),
        "early exit": Kind(alone, "early-exit", own={"assistant_early_exit": args.layers, **count}),
    }
    return {name: kind for name, kind in found.items() if not args.only or name in args.only}


def timed(
    lm: pluglm.LanguageModel, strategy: Any, rows: Sequence[list[int]], tokens: int, said: Mapping[str, Any]
) -> tuple[list[list[int]], float]:
    """The new tokens of every row by one strategy, and the seconds after the first one."""
    first, width = FirstToken(), max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    config = lm.generation.updated(max_new_tokens=tokens, eos_token_id=(), pad_token_id=0, **said)
    with torch.no_grad():
        output: Any = strategy(lm.model, ids, attention_mask=mask, generation_config=config, streamer=first)
    ended = time.perf_counter()
    assert first.at is not None
    return [output.completion(row) for row in range(len(rows))], ended - first.at


def measure(lm: pluglm.LanguageModel, kind: Kind, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds of the tokens a second of both, of their ratios, and how many guesses held."""
    plain: Any = lm.strategy("sampling" if kind.said else "greedy")
    guessing: Any = lm.strategy(kind.guessing)
    rates: dict[str, list[float]] = {"plain": [], "guessing": []}
    passes = guessed = accepted = 0
    for i in range(rounds + 1):
        seconds = {"plain": 0.0, "guessing": 0.0}
        for number, rows in enumerate(kind.batches):
            made = {}
            order = [("plain", plain, kind.said), ("guessing", guessing, {**kind.said, **kind.own})]
            for name, strategy, said in order if (i + number) % 2 else reversed(order):
                made[name], spent = timed(lm, strategy, rows, tokens, said)
                seconds[name] += spent
            assert made["plain"] == made["guessing"], "the two strategies made different tokens"
            if i == rounds:  # guesses are the same in every round
                found = guessing.statistics
                passes, guessed, accepted = passes + found.passes, guessed + found.guessed, accepted + found.accepted
        if i or rounds == 1:  # the first round warms up
            new = sum(map(len, kind.batches)) * (tokens - 1)
            for name, spent in seconds.items():
                rates[name].append(new / spent)
    ratios = [b / a for a, b in zip(rates["plain"], rates["guessing"], strict=True)]
    return {
        "plain_tokens_per_s": round(statistics.median(rates["plain"]), 1),
        "guessing_tokens_per_s": round(statistics.median(rates["guessing"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3),
        "guessed": guessed, "accepted": accepted,
        "acceptance_rate": round(accepted / guessed, 3) if guessed else None,
        "tokens_per_pass": round(sum(map(len, kind.batches)) * (tokens - 1) / passes, 2),
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=6, help="of each kind, for one row at a time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", default="dynamic")
    parser.add_argument("--guess", type=int, default=5, help="tokens that the draft model and the first layers guess")
    parser.add_argument("--confidence", type=float, default=0.4, help="below which a guess ends")
    parser.add_argument("--layers", type=int, default=2, help="of the model, for early exit")
    parser.add_argument("--executor", default="auto", help="what runs the model")
    parser.add_argument("--draft-executor", help="what runs the draft model, if it is not the same")
    parser.add_argument("--only", nargs="*", choices=sorted(BOUNDS), help="of the kinds")
    parser.add_argument("--quick", action="store_true", help="see that it runs; the figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.prompts, args.rounds = 24, 1, 1
    torch.set_num_threads(args.threads)
    lm = pluglm.load("pystdlib", dtype="float32", cache=args.cache, executor=args.executor)
    results = {}
    print(f"{'':18}    plain guessing tokens/s   ratio [spread]       bound  accepted  tokens a pass")
    for name, kind in kinds(lm, args).items():
        result = results[name] = measure(lm, kind, args.tokens, args.rounds)
        rate = "-" if result["acceptance_rate"] is None else f"{result['acceptance_rate']:.0%}"
        bound = BOUNDS[name]
        print(
            f"{name:18} {result['plain_tokens_per_s']:8.1f} {result['guessing_tokens_per_s']:8.1f}            "
            f"{result['ratio']:5.2f} [{result['ratio_min']:.2f} … {result['ratio_max']:.2f}]  "
            f"{'-' if bound is None else f'{bound:.2f}':>6}  {rate:>8}  {result['tokens_per_pass']:13.2f}",
            flush=True,
        )
    print(json.dumps({
        "model": "pystdlib", "plan": lm.plan.hash[:12], "cache": args.cache, "tokens": args.tokens,
        "prompts": args.prompts, "rounds": args.rounds, "threads": args.threads, "guess": args.guess, "confidence": args.confidence,
        "layers": args.layers, "executor": args.executor, "draft_executor": args.draft_executor, "quick": args.quick, "bounds": BOUNDS,
        "results": results, "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
