"""Checkpoints of `pluglm-arch-phi`."""

from __future__ import annotations

from typing import Any

from checkpoints import BEFORE, DYNAMIC, LINEAR, SIZES, Variant, longrope
from torch import Tensor

#: Heads of 8 dimensions, of which 6 or 4 turn.
_PHI3 = {**SIZES, "original_max_position_embeddings": BEFORE, "max_position_embeddings": 120}
_PHI = {
    key: value for key, value in {**SIZES, "layer_norm_eps": 1e-4, "max_position_embeddings": 120}.items()
    if key != "rms_norm_eps"
}  # fmt: skip


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """Phi-3 as its files spell it: the length stands beside the factors, and no part of a head is named."""
    said = dict(config)
    inner = said.pop("rope_parameters")
    factors = {name: inner[name] for name in ("short_factor", "long_factor")}
    return {**said, "rope_theta": inner["rope_theta"], "rope_scaling": {"type": "longrope", **factors}}


def _loud(name: str, noise: Tensor) -> Tensor | None:
    """A head as large as an embedding, so that gelu and its approximation differ."""
    return 0.5 * noise if name == "lm_head.weight" else None


def _partial(pairs: int, part: float, **more: Any) -> dict[str, Any]:
    return {**longrope(pairs), "partial_rotary_factor": part, **more}


VARIANTS: dict[str, Variant] = {
    "phi3-longrope": Variant(
        "phi3",
        {
            **_PHI3, "num_key_value_heads": 3, "tie_word_embeddings": True,
            "rope_parameters": {key: value for key, value in longrope(4).items() if key != "factor"},
        },
        spell=_older,
    ),
    "phi3-partial": Variant(
        "phi3", {**_PHI3, "sliding_window": 13, "hidden_act": "gelu", "rope_parameters": _partial(3, 0.75)}
    ),
    "phi3-plain": Variant("phi3", {**_PHI3, "sliding_window": 11, "rope_parameters": {
        "rope_type": "default", "rope_theta": 90.0, "partial_rotary_factor": 0.5}}),
    "phi-plain": Variant(
        "phi", {**_PHI, "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}, "hidden_act": "gelu"},
        scale=_loud,
    ),
    "phi-norms": Variant(
        "phi",
        {
            **_PHI, "rope_parameters": {**DYNAMIC, "partial_rotary_factor": 0.75}, "qk_layernorm": True,
            "max_position_embeddings": BEFORE, "num_key_value_heads": 3, "tie_word_embeddings": True,
        },
        v4=True,
    ),
}  # fmt: skip
