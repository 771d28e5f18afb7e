"""How long discovery and `pluglm plugins list` take with many plugins installed.

    python tests/benchmarks/discovery.py [--plugins 1000] [--repeats 15]

Makes that many distributions with a manifest in a temporary directory, checks that every one is found and none imported,
and measures: cold (the index is absent and gets written), warm (it is read), and the command line above a bare
interpreter. Each as wall time and as processor time of the process, which other load on the machine disturbs less. The
files are in the system's cache throughout. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CORE = Path(__file__).resolve().parents[2] / "core"
sys.path.insert(0, str(CORE))

LIMITS_MS = {"cold": 150.0, "warm": 5.0, "list": 150.0, "import": 60.0}


def make_distribution(site: Path, number: int) -> None:
    """One small plugin with the metadata a wheel would install and a manifest of usual length."""
    name, package = f"acme-plugin-{number:04d}", f"acme_plugin_{number:04d}"
    (site / package).mkdir()
    (site / package / "__init__.py").write_text("raise SystemExit('a plugin was imported')\n")
    facts = {
        "kind": "attention",
        "name": f"fast{number:04d}",
        "summary": "Attention that is fast on the machine it was written for.",
        "api": ">=1.0,<2",
        "tier": "tuned",
        "requires": {
            "devices": ["cuda"],
            "dtypes": ["bfloat16", "float16"],
            "torch": ">=2.5",
            "packages": ["packaging>=20"],
            "head_dim": {"max": 256, "multiple_of": 8},
        },
        "features": ["causal", "window", "softcap"],
        "views": ["paged", "dense"],
        "numerics": {"kind": "tolerance", "atol": 0.001, "rtol": 0.01},
    }
    manifest = {"schema": 1, "distribution": name, "providers": [facts]}
    (site / package / "pluglm.json").write_text(json.dumps(manifest, indent=2))
    info = site / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text(f"[pluglm.attention]\nfast{number:04d} = {package}\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: made up\n\nText.\n")
    (info / "RECORD").write_text("")


def in_process(site: Path, cache: Path, repeats: int, plugins: int) -> dict[str, list[float]]:
    """Milliseconds of each cold and each warm discovery, every one checked."""
    from pluglm.discovery import discover

    times: dict[str, list[float]] = {"cold": [], "cold_cpu": [], "warm": [], "warm_cpu": []}

    def once(name: str) -> None:
        start, start_cpu = time.perf_counter(), time.process_time()
        found = discover(paths=[str(site)], index=cache)
        times[f"{name}_cpu"].append((time.process_time() - start_cpu) * 1e3)
        times[name].append((time.perf_counter() - start) * 1e3)
        assert len(found.providers) == plugins and not found.problems
        assert all(provider.facts is not None for provider in found.providers)

    for _ in range(repeats):
        shutil.rmtree(cache, ignore_errors=True)
        once("cold")
    for _ in range(repeats):
        once("warm")
    imported = [name for name in sys.modules if name.startswith("acme_") or name in {"torch", "pydantic", "pluggy"}]
    assert not imported and "importlib.metadata" not in sys.modules, imported
    return times


def process_ms(arguments: list[str], environment: dict[str, str], check: Callable[[str], bool]) -> tuple[float, float]:
    """Wall and processor time of one run of the interpreter, whose output must satisfy `check`."""
    start, start_cpu = time.perf_counter(), children_cpu_s()
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=True)
    elapsed = (time.perf_counter() - start) * 1e3
    assert check(run.stdout), run.stdout[:500]
    return elapsed, (children_cpu_s() - start_cpu) * 1e3


def children_cpu_s() -> float:
    """Processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processes(site: Path, cache: Path, repeats: int, plugins: int) -> dict[str, list[float]]:
    """Wall times above a bare interpreter that was started just before, so that other load weighs on both."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(CORE), str(site)]), PLUGLM_CACHE_DIR=str(cache))
    environment["PLUGLM_CONFIG_DIR"] = str(cache / "config")
    listing = ["-m", "pluglm.cli", "plugins", "list"]
    times: dict[str, list[float]] = {name + unit: [] for name in ("bare", "import", "list") for unit in ("", "_cpu")}
    for round_ in range(repeats + 1):
        bare = process_ms(["-c", "pass"], environment, lambda out: not out)
        imported = process_ms(["-c", "import pluglm"], environment, lambda out: not out)
        listed = process_ms(listing, environment, lambda out: out.count("acme-plugin-") == plugins)
        if round_:  # the first one writes the index and the compiled modules
            for position, unit in enumerate(("", "_cpu")):
                times["bare" + unit].append(bare[position])
                times["import" + unit].append(imported[position] - bare[position])
                times["list" + unit].append(listed[position] - bare[position])
    return times


def main() -> None:
    """Measure, print the table, then the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plugins", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        site, cache = Path(folder, "site"), Path(folder, "cache")
        site.mkdir()
        for number in range(options.plugins):
            make_distribution(site, number)
        time.sleep(0.1)  # the index leaves out directories that changed a moment ago
        times = in_process(site, cache, options.repeats, options.plugins)
        times |= processes(site, cache, options.repeats, options.plugins)
    print(f"{'ms':<12}{'median':>9}{'min':>9}{'max':>9}{'limit':>9}   n={options.repeats}, {options.plugins} plugins")
    figures = {}
    for name, values in times.items():
        median = statistics.median(values)
        figures[name] = {
            "median_ms": round(median, 2),
            "min_ms": round(min(values), 2),
            "max_ms": round(max(values), 2),
        }
        limit = f"{LIMITS_MS[base]:9.0f}" if (base := name.removesuffix("_cpu")) in LIMITS_MS else f"{'':9}"
        print(f"{name:<12}{median:>9.2f}{min(values):>9.2f}{max(values):>9.2f}{limit}")
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count()}
    print(
        json.dumps({"benchmark": "discovery", "plugins": options.plugins, "n": options.repeats, **machine, **figures})
    )


if __name__ == "__main__":
    main()
