"""The kinds of `Rope`: how each chooses the angular speeds (radians a position) of a head's dim/2 pairs.

Plain float32 arithmetic in the order in which published models were trained: at position 100,000 an ulp of a speed is a
visible angle, so a more exact table would be a different one. Parameters bear the names of Hugging Face's
`rope_parameters` (transformers 5.23, `modeling_rope_utils`), whose numbers the tests compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import Rope

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Speeds:
    """What a kind chooses.

    Attributes:
        short: [dim/2] float32, for rows of at most `limit` positions; for all rows if there is no limit.
        attention_factor: on cos and sin (so its square is on the scores).
        limit: a longer row uses `long`, or a base that grows with its length if `growth` is given instead.
    """

    short: Tensor
    attention_factor: float = 1.0
    limit: int | None = None
    long: Tensor | None = None
    growth: float | None = None


def exponents(rope: Rope) -> Tensor:
    """2i / dim for each pair i: [dim/2] float32."""
    return torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim


def _plain(rope: Rope) -> Tensor:
    return 1.0 / rope.theta ** exponents(rope)


def _default(rope: Rope, _: Parameters) -> Speeds:
    """theta ** (-2i / dim): Su et al. 2021, "RoFormer", section 3.4.2, equation 15."""
    return Speeds(_plain(rope))


def _linear(rope: Rope, parameters: Parameters) -> Speeds:
    """Positions divided by the factor: Chen et al. 2023, "Extending Context Window … via Positional Interpolation"."""
    return Speeds(_plain(rope) / parameters["factor"])


def _dynamic(rope: Rope, parameters: Parameters) -> Speeds:
    """As trained up to max_seq_len, then a larger base: emozilla 2023, "Dynamically Scaled RoPE"."""
    return Speeds(_plain(rope), limit=rope.max_seq_len, growth=float(parameters["factor"]))


def _proportional(rope: Rope, parameters: Parameters) -> Speeds:
    """p-RoPE: only the fastest pairs turn (Barbero et al. 2024, "Round and Round We Go!").

    Unlike partial rotation, the pairs and their exponents are those of the whole head.
    """
    turning = int(parameters.get("partial_rotary_factor", 1.0) * rope.dim // 2)
    speeds = _plain(rope) / parameters.get("factor", 1.0)
    speeds[turning:] = 0.0
    return Speeds(speeds)


def _llama3(rope: Rope, parameters: Parameters) -> Speeds:
    """Slow pairs interpolated, fast ones kept, a linear blend between: Meta's llama-models, `apply_scaling` (3.1)."""
    factor, context = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    speeds = _plain(rope)
    wavelength = 2 * math.pi / speeds
    keep = (context / wavelength - low) / (high - low)
    blended = (1 - keep) * speeds / factor + keep * speeds
    fast, slow = wavelength < context / high, wavelength > context / low
    return Speeds(torch.where(slow, speeds / factor, torch.where(fast, speeds, blended)))


def _yarn(rope: Rope, parameters: Parameters) -> Speeds:
    """NTK-by-parts and an attention temperature: Peng et al. 2023, "YaRN", sections 3.2 and 3.4.

    mscale and mscale_all_dim are DeepSeek-V2's: the quotient of two temperatures.
    """
    context = parameters["original_max_position_embeddings"]
    factor = _factor(rope, parameters)

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    def pair_of(rotations: float) -> float:
        """The (fractional) pair that turns this often within the original context."""
        return rope.dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(parameters.get("beta_fast", 32)), pair_of(parameters.get("beta_slow", 1))
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    interpolate = ((torch.arange(rope.dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    keep = 1 - interpolate
    wavelengths = rope.theta ** exponents(rope)
    speeds = 1.0 / (factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep

    attention = parameters.get("attention_factor")
    if attention is None:
        over, under = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = temperature(over) / temperature(under) if over and under else temperature(1.0)
    return Speeds(speeds, attention)


def _longrope(rope: Rope, parameters: Parameters) -> Speeds:
    """A searched factor for each pair: Ding et al. 2024, "LongRoPE", section 3; the attention factor is Phi-3's."""
    context = parameters["original_max_position_embeddings"]
    factor = _factor(rope, parameters)
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    wavelengths = rope.theta ** exponents(rope)
    short, long = (torch.tensor(parameters[name]) for name in ("short_factor", "long_factor"))
    return Speeds(1.0 / (short * wavelengths), attention, limit=context, long=1.0 / (long * wavelengths))


def _factor(rope: Rope, parameters: Parameters) -> float:
    if "factor" in parameters:
        return float(parameters["factor"])
    assert rope.max_seq_len is not None  # `rope.refusals` has looked
    return float(rope.max_seq_len / parameters["original_max_position_embeddings"])


@dataclass(frozen=True)
class Kind:
    """How a kind computes its speeds, and the names of the parameters it must and may be given."""

    compute: Callable[[Rope, Parameters], Speeds]
    required: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()


_CONTEXT = "original_max_position_embeddings"
_YARN = {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}

KINDS: dict[str, Kind] = {
    "default": Kind(_default),
    "linear": Kind(_linear, frozenset({"factor"})),
    "dynamic": Kind(_dynamic, frozenset({"factor"})),
    "yarn": Kind(_yarn, frozenset({_CONTEXT}), frozenset(_YARN)),
    "longrope": Kind(
        _longrope, frozenset({"short_factor", "long_factor", _CONTEXT}), frozenset({"factor", "attention_factor"})
    ),
    "llama3": Kind(_llama3, frozenset({"factor", "low_freq_factor", "high_freq_factor", _CONTEXT})),
    "proportional": Kind(_proportional, optional=frozenset({"factor", "partial_rotary_factor"})),
}
