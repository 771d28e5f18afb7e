"""Rotary angles: one table for each distinct `Rope`; the decoder asks it once a forward pass, for all layers together.

Two kinds depend on how long the text is (dynamic, longrope). They look at the highest position of each row *of this
pass*, on the device: no synchronisation, and a row's result does not depend on its neighbours in the batch
(transformers 5.23 takes the batch's highest position and, for dynamic, what it remembers of earlier calls; on a single
growing text the numbers are the same). As there, keys that are cached already keep the rotation they were written with:
a text that outgrows the limit while it is decoded or prefilled in chunks differs from the same text in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pluglm.contracts import Rope
from pluglm_blocks.rope_kinds import KINDS, exponents


class RotaryTable:
    """cos and sin of one `Rope`. No module: it holds nothing that belongs to a checkpoint or could be trained.

    The speeds are computed on the CPU at construction, also under `torch.device("meta")`, and move to the device of
    the positions on first use.
    """

    def __init__(self, rope: Rope) -> None:
        with torch.device("cpu"):
            self._speeds = KINDS[rope.kind].compute(rope, dict(rope.parameters))
            self._short, self._exponents = self._speeds.short, exponents(rope)
            self._long = torch.empty(0) if self._speeds.long is None else self._speeds.long
        self._theta, self._dim = rope.theta, rope.dim

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every position's angles, times the kind's attention factor.

        Args:
            positions: [B or 1, T] int64, none negative.
        Returns: two float32 tensors [B or 1, T, dim/2].
        """
        if self._short.device != positions.device:
            self._short, self._long = self._short.to(positions.device), self._long.to(positions.device)
            self._exponents = self._exponents.to(positions.device)
        angles = positions[..., None].float() * self.speeds(positions)  # [B, T, dim/2]
        factor = self._speeds.attention_factor
        if factor == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * factor, angles.sin() * factor

    def speeds(self, positions: Tensor) -> Tensor:
        """Radians a position, float32: [dim/2], or [B or 1, 1, dim/2] for a kind that looks at the length."""
        limit, factor = self._speeds.limit, self._speeds.growth
        if limit is None:
            return self._short
        length = positions.amax(dim=-1)[:, None, None] + 1
        if factor is None:
            return torch.where(length > limit, self._long, self._short)
        # The base grows with the length; emozilla 2023, "Dynamically Scaled RoPE", as told in "YaRN", section 3.3.
        base = self._theta * (factor * length / limit - (factor - 1)) ** (self._dim / (self._dim - 2))
        return torch.where(length > limit, 1.0 / base**self._exponents, self._short)


def refusals(rope: Rope) -> list[str]:
    """Every reason why no table can be made of this `Rope`; empty: one can."""
    if rope.kind not in KINDS:
        return [f"rope kind {rope.kind!r} is not one of {', '.join(KINDS)}"]
    kind, given = KINDS[rope.kind], {name for name, _ in rope.parameters}
    reasons = []
    if rope.dim <= 0 or rope.dim % 2:
        reasons.append(f"rope dim {rope.dim} is not a positive even number")
    if missing := sorted(kind.required - given):
        reasons.append(f"rope {rope.kind!r} needs the parameters {missing}")
    if surplus := sorted(given - kind.required - kind.optional):
        reasons.append(f"rope {rope.kind!r} has no parameters {surplus}")
    if rope.kind == "dynamic" and (rope.max_seq_len is None or rope.dim <= 2):
        reasons.append("rope 'dynamic' needs max_seq_len and a dim above 2")
    if rope.kind in ("yarn", "longrope") and "factor" not in given and rope.max_seq_len is None:
        reasons.append(f"rope {rope.kind!r} needs a factor, or max_seq_len to derive it from")
    for name, value in rope.parameters:
        if name in ("short_factor", "long_factor") and (not isinstance(value, tuple) or len(value) != rope.dim // 2):
            reasons.append(f"rope {rope.kind!r} needs a tuple of {rope.dim // 2} numbers as {name}, one a pair")
    return reasons
