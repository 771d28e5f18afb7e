"""Microseconds of a decode step's `attend` above the bare torch call, and bytes it allocates. Verified in the same run."""

from __future__ import annotations

import json
import platform
import statistics
import time
import warnings

import pluglm_attention_sdpa
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from pluglm.contracts import AttentionRequest, AttentionSpec, DenseView, KeyInfo


def measure(K: int, S: int, dtype: str = "float32", H: int = 8, D: int = 64) -> dict[str, object]:
    """H heads on K key heads, one new token, S keys."""
    spec = AttentionSpec(H, K, D, D, D**-0.5)
    backend = pluglm_attention_sdpa.pluglm_build_attention(request=AttentionRequest((spec,), "cpu", dtype))
    t = getattr(torch, dtype)
    q, k, v = torch.randn(1, 1, H, D, dtype=t).transpose(1, 2), *torch.randn(2, 1, K, S, D, dtype=t).unbind(0)
    folded, view, positions = q.reshape(1, K, H // K, D), DenseView(k, v), torch.arange(S)[None]
    mask = backend.prepare(spec, positions[:, -1:], KeyInfo(positions, S, dense=True))
    ways = {
        "attend": lambda: backend.attend(q, view, spec, mask),
        "torch, same call": (lambda: scaled_dot_product_attention(folded, k, v, scale=spec.scale)) if mask else
        (lambda: scaled_dot_product_attention(q, k, v, scale=spec.scale, enable_gqa=H != K)),
        "torch, enable_gqa": lambda: scaled_dot_product_attention(q, k, v, scale=spec.scale, enable_gqa=H != K),
    }  # fmt: skip
    want = scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=spec.scale, enable_gqa=H != K)
    torch.testing.assert_close(ways["attend"]().double(), want, atol=1e-5 if dtype == "float32" else 1e-2, rtol=1e-2)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(300):
        for name, way in ways.items():
            start = time.perf_counter()
            for _ in range(20):
                way()
            times[name].append((time.perf_counter() - start) / 20 * 1e6)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        ways["attend"]()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in record.key_averages())
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    kv_bytes = k.nbytes + v.nbytes
    return {"H": H, "K": K, "S": S, "dtype": dtype, "us": medians, "allocated_bytes": allocated, "kv_bytes": kv_bytes}


def main() -> None:
    """A table, then one JSON line."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [measure(K, S, dtype) for dtype in ("float32", "bfloat16") for K in (8, 2) for S in (32, 256, 1024)]
    for row in rows:
        print({**row})
    print(json.dumps({"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "n": 300, "rows": rows}))


if __name__ == "__main__":
    main()
