"""What a cache layout and an attention backend cost above the plain torch calls, one token at a time.

Two tables, for 512 and 4096 held cells: appending one token to every installed layout, against two `narrow().copy_` a
layer; and appending and attending, each backend over each kind of view, against the same and
`scaled_dot_product_attention`. Both sides work on equal numbers in rounds that alternate, so that a machine whose speed
drifts shifts both, and what they compute is compared in the same run. The last line is one JSON object; its
`overhead_us` is what sdpa over a static cache adds to the torch calls, for each layer and token.
"""

from __future__ import annotations

import argparse
import gc
import json
import pkgutil
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pluglm.contracts import AttentionRequest, AttentionSpec, Cache, CacheLayout, CacheRequest, KVSlot
from pluglm.errors import CacheError, UnsupportedRequestError
from pluglm.provider import Provider
from pluglm.registry import Registry

K, D = 8, 64
SCALE = D**-0.5
REACH = 1024  # of windows and chunks
#: µs a layer and token that sdpa over a static cache may add to the torch calls.
BOUND = 3.0
#: Times that what is compared with `BOUND` is laid out anew: where tensors happen to lie is worth microseconds.
PLACES = 9
#: Kind of view -> the layout that hands it out. BACKENDS: those that decode on a CPU.
VIEWS = {"dense": "static", "paged": "paged", "quantized": "quantized"}
BACKENDS = ("sdpa", "eager", "paged")


@dataclass(frozen=True)
class Sizes:
    """layers of the model, tokens of a round (appended behind the held cells), rounds."""

    layers: int
    tokens: int
    rounds: int


class Tokens:
    """Keys, values and queries that both sides use: prompts [1, K, held, D] and one token [1, K, 1, D] a step."""

    def __init__(self, held: int, sizes: Sizes) -> None:
        draw = torch.Generator().manual_seed(held)

        def normal(count: int) -> list[Tensor]:
            return [torch.randn(1, K, count, D, generator=draw) for _ in range(sizes.layers)]

        self.held, self.sizes = held, sizes
        self.k, self.v = normal(held), normal(held)
        self.new_k, self.new_v, self.q = normal(sizes.tokens), normal(sizes.tokens), normal(sizes.tokens)
        self.steps = [[(k[:, :, i : i + 1].contiguous(), v[:, :, i : i + 1].contiguous(), q[:, :, i : i + 1].contiguous())
                       for k, v, q in zip(self.new_k, self.new_v, self.q, strict=True)]
                      for i in range(sizes.tokens)]  # fmt: skip


class Raw:
    """The plain torch calls."""

    def __init__(self, tokens: Tokens, *, attends: bool) -> None:
        room = tokens.held + tokens.sizes.tokens
        self.tokens, self.attends = tokens, attends
        self.storage = [(torch.zeros(1, K, room, D), torch.zeros(1, K, room, D)) for _ in tokens.k]
        for (kept_k, kept_v), k, v in zip(self.storage, tokens.k, tokens.v, strict=True):
            kept_k.narrow(2, 0, tokens.held).copy_(k)
            kept_v.narrow(2, 0, tokens.held).copy_(v)
        self.outputs: list[Tensor] = []

    def prepare(self) -> None:
        """Nothing: each round writes the same cells."""

    def run(self) -> None:
        """One round."""
        outputs, attends = [], self.attends
        for i, step in enumerate(self.tokens.steps):
            at = self.tokens.held + i
            for (kept_k, kept_v), (k, v, q) in zip(self.storage, step, strict=True):
                kept_k.narrow(2, at, 1).copy_(k)
                kept_v.narrow(2, at, 1).copy_(v)
                k, v = kept_k.narrow(2, 0, at + 1), kept_v.narrow(2, 0, at + 1)
                if attends:
                    outputs.append(scaled_dot_product_attention(q, k, v, scale=SCALE))
        self.outputs = outputs


class Cached:
    """The same through a layout and, if there is one, a backend."""

    def __init__(self, tokens: Tokens, layout: CacheLayout, backend: Any = None) -> None:
        self.tokens, self.layout, self.backend = tokens, layout, backend
        self.spec = AttentionSpec(K, K, D, D, SCALE)
        self.cache: Cache | None = None
        self.outputs: list[Tensor] = []

    def prepare(self) -> None:
        """The cache at its held cells again: cropped, where it can be, else filled anew."""
        if self.cache is not None:
            try:
                self.cache.crop(self.tokens.held)
                return
            except CacheError:
                pass
        tokens = self.tokens
        cache = self.cache = self.layout.new(batch_size=1, capacity=tokens.held + tokens.sizes.tokens)
        step = cache.begin(cache.next_positions(tokens.held), dense=True)
        for slot, (k, v) in enumerate(zip(tokens.k, tokens.v, strict=True)):
            cache.append(slot, k, v, step)
        cache.commit(step)

    def run(self) -> None:
        """One round."""
        cache, backend, spec, outputs = self.cache, self.backend, self.spec, []
        assert cache is not None
        for new in self.tokens.steps:
            positions = cache.next_positions(1)
            step = cache.begin(positions, dense=cache.dense)
            if backend is None:
                for slot, (k, v, _) in enumerate(new):
                    cache.append(slot, k, v, step)
            else:
                mask = backend.prepare(spec, positions, step.keys(0))
                for slot, (k, v, q) in enumerate(new):
                    outputs.append(backend.attend(q, cache.append(slot, k, v, step), spec, mask))
            cache.commit(step)
        self.outputs = outputs


def measure(raw: Raw, other: Cached, sizes: Sizes) -> list[tuple[float, float]]:
    """(raw, other) in µs a layer and token, for each round; the first round warms up and is left out.

    As in `timeit`, nothing is collected within a round: both sides keep their outputs, and whichever comes upon the
    threshold would pay for the other's.
    """
    per = 1e6 / (sizes.layers * sizes.tokens)
    rounds = []
    gc.freeze()  # what is there already need not be looked through after each round
    for number in range(sizes.rounds + 1):
        seconds = {}
        for side in (raw, other) if number % 2 else (other, raw):
            side.prepare()
            gc.collect()
            gc.disable()
            started = time.perf_counter()
            side.run()
            seconds[side] = time.perf_counter() - started
            gc.enable()
        if number:
            rounds.append((seconds[raw] * per, seconds[other] * per))
    return rounds


def verify(raw: Raw, other: Cached, tolerance: float) -> float:
    """The largest difference between what both sides kept and computed. Raises AssertionError if it is too large."""
    cache = other.cache
    assert cache is not None and cache.length >= raw.tokens.sizes.tokens
    worst = 0.0
    for slot, kept in enumerate(raw.storage):
        for mine, theirs in zip(kept, cache.read(slot).dense(), strict=True):
            count = min(theirs.shape[2], mine.shape[2])  # a window, or what is not forgotten: the last ones
            count = raw.tokens.sizes.tokens if count < mine.shape[2] else count
            worst = max(worst, float((mine[:, :, -count:] - theirs[:, :, -count:]).abs().max()))
    assert len(other.outputs) in (0, len(raw.outputs))
    for mine, theirs in zip(raw.outputs, other.outputs, strict=False):
        worst = max(worst, float((mine - theirs).abs().max()))
    assert worst <= tolerance, f"{other.layout.name} differs by {worst:.2g}, more than {tolerance:.2g}"
    return worst


def tolerance_of(facts: Mapping[str, Any]) -> float:
    """What its package says of a provider: 0 for bitwise, beside which products may be summed in another order."""
    numerics = facts.get("numerics") or {}
    return float(numerics.get("atol", 0.0)) + 1e-5


def slots_of(facts: Mapping[str, Any], layers: int) -> tuple[KVSlot, ...]:
    """Slots that a layout makes: plain ones, or with a reach if it makes no others."""
    kinds = facts.get("slots") or ("kv",)
    if "kv" in kinds:
        return (KVSlot(K, D, D),) * layers
    return ((KVSlot(K, D, D, window=REACH) if "window" in kinds else KVSlot(K, D, D, chunk=REACH)),) * layers


def build_layout(provider: Provider, slots: tuple[KVSlot, ...], views: tuple[str, ...]) -> CacheLayout:
    """The layout of an installed provider."""
    request = CacheRequest(slots, views, "cpu", "float32", rotations=(None,) * len(slots))
    layout: CacheLayout = pkgutil.resolve_name(provider.target).pluglm_build_cache(request=request)
    return layout


def row(what: str, held: int, rounds: list[tuple[float, float]], difference: float) -> dict[str, Any]:
    """One line of a table."""
    ratios, added = [b / a for a, b in rounds], [b - a for a, b in rounds]
    return {
        "what": what, "held": held, "n": len(rounds), "us": statistics.median(b for _, b in rounds),
        "raw_us": statistics.median(a for a, _ in rounds), "ratio": statistics.median(ratios),
        "ratio_min": min(ratios), "ratio_max": max(ratios), "added_us": statistics.median(added),
        "added_min_us": min(added), "added_max_us": max(added), "max_difference": difference,
    }  # fmt: skip


def show(line: dict[str, Any]) -> None:
    """A line for people."""
    print(f"{line['what']:34}{line['held']:6}{line['raw_us']:9.2f}{line['us']:9.2f}{line['added_us']:9.2f}"
          f"{line['ratio']:8.2f} [{line['ratio_min']:.2f} … {line['ratio_max']:.2f}]"
          f"{line['max_difference']:10.1g}", flush=True)  # fmt: skip


def appending(providers: list[Provider], tokens: Tokens) -> list[dict[str, Any]]:
    """Every layout against two copies and two views a layer."""
    lines = []
    for provider in providers:
        facts = provider.facts or {}
        layout = build_layout(provider, slots_of(facts, tokens.sizes.layers), tuple(facts.get("views") or ("dense",)))
        raw, other = Raw(tokens, attends=False), Cached(tokens, layout)
        rounds = measure(raw, other, tokens.sizes)
        lines.append(row(f"append {provider.name}", tokens.held, rounds, verify(raw, other, tolerance_of(facts))))
        show(lines[-1])
    return lines


def attending(
    providers: Mapping[str, Provider], backends: Mapping[str, Provider], tokens: Tokens,
    views: Sequence[str] = tuple(VIEWS),
) -> list[dict[str, Any]]:  # fmt: skip
    """Every backend over every kind of view against the torch calls."""
    lines = []
    spec = AttentionSpec(K, K, D, D, SCALE)
    for name in (name for name in BACKENDS if name in backends):
        for view in views:
            hook = pkgutil.resolve_name(backends[name].target).pluglm_build_attention
            try:
                backend = hook(request=AttentionRequest((spec,), "cpu", "float32", (view,)))
            except UnsupportedRequestError as error:
                print(f"{name} over {view}: refused, {error.reasons[0]}")
                continue
            provider = providers[VIEWS[view]]
            layout = build_layout(provider, (KVSlot(K, D, D),) * tokens.sizes.layers, (view,))
            raw, other = Raw(tokens, attends=True), Cached(tokens, layout, backend)
            rounds = measure(raw, other, tokens.sizes)
            difference = verify(raw, other, tolerance_of(provider.facts or {}))
            lines.append(row(f"{name} over {view} ({provider.name})", tokens.held, rounds, difference))
            show(lines[-1])
    return lines


def commit() -> str:
    """Of this repository; with a mark if files differ from it."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not for figures")
    parser.add_argument("--held", type=int, nargs="*", default=(512, 4096), help="cells of the tables; none: no table")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = Sizes(args.layers, 8, 3) if args.quick else Sizes(args.layers, 32, 25)
    registry = Registry.installed()
    layouts = sorted(registry.of("cache"), key=lambda provider: provider.name)
    backends = {provider.name: provider for provider in registry.of("attention")}
    lines = []
    print(f"{'µs a layer and token':34}{'held':>6}{'torch':>9}{'pluglm':>9}{'added':>9}{'ratio':>8}{'max diff':>28}")
    with torch.no_grad():
        for held in args.held:
            tokens = Tokens(held, sizes)
            lines += appending(layouts, tokens)
            lines += attending({provider.name: provider for provider in layouts}, backends, tokens)
        # Where calls and not numbers take the time: what is added shows best beside little work.
        (static,) = (provider for provider in layouts if provider.name == "static")
        overheads = []
        for _ in range(PLACES):
            few = Tokens(32, Sizes(args.layers, 8, sizes.rounds * 4))
            overheads += attending({"static": static}, {"sdpa": backends["sdpa"]}, few, views=("dense",))
    added = sorted(line["added_us"] for line in overheads)
    result = {
        "quick": args.quick, "layers": args.layers, "K": K, "D": D, "dtype": "float32", "threads": args.threads,
        "tokens": sizes.tokens, "overhead_us": round(statistics.median(added), 2),
        "overhead_range_us": [round(added[0], 2), round(added[-1], 2)], "bound_us": BOUND,
        "lines": [{k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()} for line in lines],
        "torch": torch.__version__, "python": platform.python_version(), "commit": commit(),
        "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(f"sdpa over static adds {statistics.median(added):.2f} µs a layer and token to the torch calls (bound {BOUND:g}): "
          f"the median of {PLACES} places in memory, each the median of {overheads[0]['n']} rounds "
          f"[{added[0]:.2f} … {added[-1]:.2f}]")  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
