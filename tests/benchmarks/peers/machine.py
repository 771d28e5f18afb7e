"""What a figure was measured on, and with what."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

#: Of the flags of a CPU, those that the kernels of any contender choose by.
CHOSEN_BY = ("avx", "fma", "f16c", "amx", "sse4_2", "neon", "asimd", "sve", "i8mm", "bf16")


def first_line(command: list[str]) -> str:
    """What a command says first; "" if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return (done.stdout.strip().splitlines() or [""])[0]


def _cpu_facts() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in lines}


def cpu_model() -> str:
    """As the system calls it."""
    return (
        _cpu_facts().get("model name") or first_line(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    )


def cpu_flags() -> list[str]:
    """Sorted; empty where the system does not say."""
    facts = _cpu_facts()
    said = (facts.get("flags") or facts.get("Features") or "").split()
    return sorted(flag for flag in said if flag.startswith(CHOSEN_BY))


def free_memory() -> int | None:
    """Bytes that processes may still take without anything being pushed out; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def commit() -> str:
    """Of this repository; with a mark if files differ from it."""
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    return first_line(asked) or "unknown"
