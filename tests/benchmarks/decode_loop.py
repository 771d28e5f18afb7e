"""What pluglm adds to a token: `lm.complete` against a bare loop over the module with preallocated tensors, same tokens.

Rounds alternate between the two, so that a machine whose speed drifts shifts both; the tokens of each round are compared.
Prints a table, then one line of JSON. `--model` takes any model that `pluglm.load` does.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch

import pluglm
from pluglm.contracts import ForwardInput


def bare(lm: pluglm.LanguageModel, ids: torch.Tensor, count: int) -> tuple[list[int], float]:
    """Greedy tokens by the module alone, and the seconds after the first one."""
    cache = lm.new_cache(capacity=ids.shape[1] + count)
    run, tokens = lm.model.executor.run, []
    positions = torch.arange(ids.shape[1] + count)[None]
    with torch.no_grad():
        logits = run(ForwardInput(ids, positions[:, : ids.shape[1]], cache, dense=True, logits_to_keep=1)).logits
        started = time.perf_counter()
        for i in range(count):
            token = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(token))
            if i + 1 < count:
                at = ids.shape[1] + i
                logits = run(ForwardInput(token, positions[:, at : at + 1], cache, dense=True, logits_to_keep=1)).logits
        return tokens, time.perf_counter() - started


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


def through(lm: pluglm.LanguageModel, ids: torch.Tensor, count: int) -> tuple[list[int], float]:
    """The same tokens by the strategy, and the seconds after the first one."""
    config = lm.generation.updated(max_new_tokens=count, eos_token_id=(), pad_token_id=0)
    strategy, first = lm.strategy(), FirstToken()
    with torch.no_grad():
        output = strategy(lm.model, ids, generation_config=config, streamer=first)
    ended = time.perf_counter()
    assert first.at is not None
    return output.completion(0), ended - first.at


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pystdlib")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm = pluglm.load(args.model, dtype="float32", cache="static", decoding="greedy")
    assert lm.tokenizer is not None
    ids = torch.tensor([lm.tokenizer.encode("def read_csv(path):")])
    rounds = []
    for i in range(args.rounds + 1):
        plain, plain_s = bare(lm, ids, args.tokens)
        tokens, tokens_s = through(lm, ids, args.tokens)
        assert tokens == plain, "the two sides made different tokens"
        if i:  # the first round warms up
            rounds.append((plain_s / args.tokens, tokens_s / args.tokens))
    added = [(b - a) * 1e6 for a, b in rounds]
    bare_us = statistics.median(a for a, _ in rounds) * 1e6
    fastest = (min(b for _, b in rounds) - min(a for a, _ in rounds)) * 1e6
    result = {
        "model": args.model, "plan": lm.plan.hash[:12], "tokens": args.tokens, "rounds": args.rounds,
        "threads": args.threads, "bare_us_per_token": round(bare_us, 1),
        "added_us_per_token": round(statistics.median(added), 1),
        "added_min_us": round(min(added), 1), "added_max_us": round(max(added), 1),
        "fastest_added_us": round(fastest, 1),
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(f"bare forward loop       {bare_us:9.1f} µs a token (median of {args.rounds} rounds)")
    print(
        f"added by the strategy   {result['added_us_per_token']:9.1f} µs a token "
        f"[{result['added_min_us']} … {result['added_max_us']}]; the fastest rounds differ by {fastest:.1f} µs"
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
