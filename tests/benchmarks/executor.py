"""Decode speed of the executors `cpu` and `eager`: one token a pass, the same tokens, on the same caches.

Two models: the embedded one in float32, and one of the shape of SmolLM2-135M in bfloat16, with random weights, written to
a temporary folder. Both also with packed weights of 8 and 4 bits (`pluglm-quantizer-native`), which both executors read,
computed in float32, and natively with activations rounded to 8 bits as well. Before anything is timed both executors run
the same tokens and their logits are compared; then rounds alternate between the two, so that a machine whose speed drifts
shifts both. Prints a table, then one line of JSON. `--quick` makes fewer and shorter rounds.

And of what pluglm adds around the native executor's calls: greedy decoding of one row by the strategy, less what the
calls into the library take; in runs of tokens, and pass by pass, as a call goes that has a stopping criterion. It is
processor time of the calling thread, so that other processes on the machine count less; on a busy one they still do.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pluglm
from pluglm.contracts import ForwardInput, GenerationConfig

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
#: Largest difference of logits: absolute for plain float32; else relative to the largest logit of the pass. Rounded
#: activations are no bound of this package's, but a measurement: beyond it something else is wrong.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "packed": 1e-3, "rounded": 2e-1}
PROMPT = 16


def write_random(folder: Path) -> None:
    """A checkpoint of SMOLLM2_135M's shape; matrices keep the scale of vectors."""
    C, F, D = SMOLLM2_135M["hidden_size"], SMOLLM2_135M["intermediate_size"], 64
    H, K = SMOLLM2_135M["num_attention_heads"], SMOLLM2_135M["num_key_value_heads"]
    shapes: dict[str, Sequence[int]] = {
        "input_layernorm": (C,), "post_attention_layernorm": (C,), "self_attn.q_proj": (H * D, C),
        "self_attn.k_proj": (K * D, C), "self_attn.v_proj": (K * D, C), "self_attn.o_proj": (C, H * D),
        "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
    }  # fmt: skip
    names = {f"model.layers.{i}.{name}.weight": shape for i in range(SMOLLM2_135M["num_hidden_layers"])
             for name, shape in shapes.items()}  # fmt: skip
    names |= {"model.embed_tokens.weight": (SMOLLM2_135M["vocab_size"], C), "model.norm.weight": (C,)}
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in names.items():
        noise = torch.randn(shape, generator=draw)
        weights[name] = (1 + 0.1 * noise if len(shape) == 1 else noise / shape[-1] ** 0.5).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SMOLLM2_135M))


def decode(lm: pluglm.LanguageModel, tokens: torch.Tensor, *, keep: bool = False) -> tuple[list[torch.Tensor], float]:
    """Feed tokens [1, n] one by one after a prompt of PROMPT of them: logits (if `keep`) and seconds."""
    n = tokens.shape[1]
    cache, run, kept = lm.new_cache(capacity=n), lm.model.executor.run, []
    positions = torch.arange(n)[None]
    with torch.inference_mode():
        run(ForwardInput(tokens[:, :PROMPT], positions[:, :PROMPT], cache, dense=True, logits_to_keep=1))
        started = time.perf_counter()
        for i in range(PROMPT, n):
            logits = run(
                ForwardInput(tokens[:, i : i + 1], positions[:, i : i + 1], cache, dense=True, logits_to_keep=1)
            ).logits
            if keep:
                kept.append(logits)
        return kept, time.perf_counter() - started


def difference(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor], kind: str) -> float:
    """The largest difference of logits, as TOLERANCE counts it."""
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        apart = float((a.float() - b.float()).abs().max())
        worst = max(worst, apart if kind == "float32" else apart / float(b.float().abs().max()))
    return worst


def compare(
    model: str, dtype: str, count: int, rounds: int, options: dict[str, Any], quantizer: str | None = None
) -> dict[str, Any]:
    """Verify, then time both executors on one model. options: of the native one."""
    how: dict[str, Any] = {
        "dtype": dtype,
        "device": "cpu",
        "cache": "static",
        "attention": "sdpa",
        "decoding": "greedy",
    }
    packing: dict[str, Any] = {}
    if quantizer is not None:
        how["quantizer"], packing = quantizer, {"quantizer": {"rounding": "nearest"}}  # the quickest: speed is the same
    native = pluglm.load(model, executor="cpu", options={"executor": options, **packing}, **how)
    eager = pluglm.load(model, executor="eager", options=packing, **how)
    kind = dtype if quantizer is None else "rounded" if options.get("activations") == "int8" else "packed"
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, native.model.description.vocab_size, (1, PROMPT + count), generator=draw)
    apart = difference(decode(native, tokens, keep=True)[0], decode(eager, tokens, keep=True)[0], kind)
    assert apart <= TOLERANCE[kind], f"{model}: logits are {apart} apart"
    times = [(decode(native, tokens)[1] / count, decode(eager, tokens)[1] / count) for _ in range(rounds)]
    ratios = [b / a for a, b in times]
    executor: Any = native.model.executor
    return {
        "model": "SmolLM2-135M shape" if Path(model).is_dir() else model, "dtype": dtype, "quantizer": quantizer,
        "activations": executor.activations, "tokens": count,
        "rounds": rounds, "isa": executor.isa, "threads": executor.threads, "logits_apart": apart,
        "cpu_tokens_s": round(1 / statistics.median(a for a, _ in times), 1),
        "eager_tokens_s": round(1 / statistics.median(b for _, b in times), 1),
        "ratio": round(statistics.median(ratios), 2), "ratio_min": round(min(ratios), 2),
        "ratio_max": round(max(ratios), 2),
    }  # fmt: skip


def around(count: int, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    """Microseconds a token that are spent outside of the library, of a call that makes `count` tokens."""
    how: dict[str, Any] = {"dtype": "float32", "device": "cpu", "cache": "static", "attention": "sdpa"}
    lm = pluglm.load("pystdlib", executor="cpu", decoding="greedy", options={"executor": options}, **how)
    cache, inside = lm.new_cache(capacity=count), 0.0
    library, strategy = lm.model.executor._library, lm.strategy()  # type: ignore[attr-defined]

    def timed(call: Any) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal inside
            started = time.thread_time()
            done = call(*arguments)
            inside += time.thread_time() - started
            return done

        return run

    def outside(criteria: Sequence[Any]) -> tuple[float, list[int]]:
        nonlocal inside
        cache.reset()
        inside, started = 0.0, time.thread_time()
        with torch.no_grad():
            output: Any = strategy(
                lm.model, torch.tensor([[5]]), past_key_values=cache, stopping_criteria=criteria,
                generation_config=GenerationConfig(max_new_tokens=count, pad_token_id=0),
            )  # fmt: skip
        return (time.thread_time() - started - inside) / count * 1e6, output.completion(0)

    library.step, library.decode = timed(library.step), timed(library.decode)
    never = [lambda ids, _: torch.zeros(len(ids), dtype=torch.bool)]
    assert outside(())[1] == outside(never)[1], "runs of tokens are not the tokens of single passes"
    times = [(outside(())[0], outside(never)[0]) for _ in range(rounds)]
    runs, passes = zip(*times, strict=True)
    return {
        "tokens": count, "rounds": rounds, "runs_us": round(statistics.median(runs), 2),
        "runs_us_min": round(min(runs), 2), "runs_us_max": round(max(runs), 2),
        "passes_us": round(statistics.median(passes), 2), "passes_us_min": round(min(passes), 2),
        "passes_us_max": round(max(passes), 2),
    }  # fmt: skip


def every_form(model: str, dtype: str, count: int, rounds: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Plain weights in the model's dtype; packed ones in float32, exact and with rounded activations."""
    results = [compare(model, dtype, count, rounds, options)]
    for quantizer in ("native:int8", "native:int4"):
        for activations in ("float32", "int8"):
            given = {**options, "activations": activations}
            results.append(compare(model, "float32", count, rounds, given, quantizer))
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="an instruction set instead of the best")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    count, rounds = (48, 3) if args.quick else (256, 9)
    options: dict[str, Any] = {"isa": args.isa} if args.isa else {}
    options["threads"] = args.threads
    results = every_form("pystdlib", "float32", count, rounds, options)
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder))
        results += every_form(folder, "bfloat16", count, rounds, options)
    print(f"{'model':20} {'weights':12} {'x':8} {'cpu':>9} {'eager':>9}  tokens/s, median of {rounds} rounds")
    for r in results:
        print(f"{r['model']:20} {r['quantizer'] or r['dtype']:12} {r['activations']:8} "
              f"{r['cpu_tokens_s']:9.1f} {r['eager_tokens_s']:9.1f}  "
              f"ratio {r['ratio']} [{r['ratio_min']} … {r['ratio_max']}], logits {r['logits_apart']:.1e} apart")  # fmt: skip
    added = around(count, rounds, options)
    print(f"around the library's calls, greedy, one row: {added['runs_us']} µs a token "
          f"[{added['runs_us_min']} … {added['runs_us_max']}] in runs, {added['passes_us']} "
          f"[{added['passes_us_min']} … {added['passes_us_max']}] pass by pass")  # fmt: skip
    machine = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    print(json.dumps({"results": results, "around": added, **machine}))


if __name__ == "__main__":
    main()
