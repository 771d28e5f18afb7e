"""What the families with Mamba 2's mixer read alike."""

from __future__ import annotations

from typing import Any

from pluglm_blocks.reading.config import Config, refuse

#: How Transformers 5 spells `Infinity`, which JSON does not have. `pluglm.checkpoint` reads 4's spelling as this.
_INFINITY = {"__float__": "Infinity"}


def read_time_step_limit(reader: Config) -> tuple[float, float | None]:
    """`time_step_limit`: (lowest, highest) time step; the highest is None where there is no limit (the default).

    Raises: ConfigError unless it is two numbers, in order and not negative; the second may be infinite.
    """
    limit: list[Any] = reader.take("time_step_limit", list, [0.0, _INFINITY])
    low: Any
    high: Any
    low, high = limit if len(limit) == 2 else (None, None)
    unlimited = high == _INFINITY or high == float("inf")
    numbers = [low] if unlimited else [low, high]
    if not all(type(number) in (int, float) for number in numbers) or not 0 <= low <= (low if unlimited else high):
        why = "Expected the lowest and the highest, neither below zero; the second may be infinite."
        refuse("time_step_limit", f"The config limits the time step to {limit}.", why)
    return float(low), None if unlimited else float(high)
