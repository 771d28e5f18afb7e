"""Checkpoints of `pluglm-arch-falcon-h1`, and the knobs of its multipliers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from checkpoints import LINEAR, SIZES, YARN, Variant
from rewriting import Knob, field, on
from torch import Tensor

from pluglm.contracts import FeedForward, Part, StateSpace


def _memory(key: str, noise: Tensor) -> Tensor | None:
    """Time steps and decays for which a head remembers some three to fifty tokens."""
    if key.endswith("dt_bias"):
        return noise - 3.0
    if key.endswith("A_log"):
        return 0.5 * noise
    return None


def _variant(rope: dict[str, Any], **settings: Any) -> Variant:
    sizes = {
        **SIZES, "mamba_d_ssm": 40, "mamba_n_heads": 4, "mamba_d_head": 10, "mamba_n_groups": 2, "mamba_d_state": 9,
        "mamba_chunk_size": 7, "rope_parameters": dict(rope), "max_position_embeddings": 120,
        "key_multiplier": 1.3, "attention_in_multiplier": 0.8, "attention_out_multiplier": 1.2,
        "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.7, "ssm_multipliers": [0.8, 1.4, 0.6, 1.7, 1.15],
        "mlp_multipliers": [1.6, 0.75], "embedding_multiplier": 1.9, "lm_head_multiplier": 0.6,
    }  # fmt: skip
    return Variant("falcon_h1", {**sizes, **settings}, scale=_memory)


VARIANTS: dict[str, Variant] = {
    "falcon-h1-gated": _variant(
        LINEAR, projectors_bias=True, attention_bias=True, mlp_bias=True, mamba_proj_bias=True, mamba_rms_norm=False
    ),
    "falcon-h1-norm-before": _variant(
        YARN, mamba_rms_norm=True, mamba_norm_before_gate=True, tie_word_embeddings=True, mamba_conv_bias=False,
        mamba_d_conv=3, num_key_value_heads=3, hidden_act="gelu_pytorch_tanh",
    ),
    "falcon-h1-norm-after": _variant(
        {"rope_type": "default", "rope_theta": 150.0}, mamba_rms_norm=True, mamba_norm_before_gate=False,
        mamba_d_ssm=None, mamba_d_head="auto", mamba_n_groups=1, head_dim=10, mamba_chunk_size=64,
    ),
}  # fmt: skip


def _one_multiplier(i: int) -> Knob:
    def broken(op: StateSpace) -> StateSpace:
        if op.multipliers is None:
            return op
        z, x, B, C, dt = (m * 1.2 if j == i else m for j, m in enumerate(op.multipliers))
        return replace(op, multipliers=(z, x, B, C, dt))

    return on(StateSpace, broken)


def _scaled(place: str, name: str) -> Knob:
    return on(Part, lambda part: replace(part, **{place: getattr(part, place) * 1.1}) if part.name == name else part)


KNOBS: dict[str, Knob] = {
    **{f"ssm.multipliers of {name}": _one_multiplier(i) for i, name in enumerate(("z", "x", "B", "C", "dt"))},
    "feed_forward.gate_scale": on(
        FeedForward, lambda op: replace(op, gate_scale=op.gate_scale * 1.1) if op.gated else op),
    "feed_forward.down_scale": on(
        FeedForward, lambda op: replace(op, down_scale=op.down_scale * 1.1) if op.down_scale != 1.0 else op),
    "part.scale_in of the state space": _scaled("scale_in", "ssm"),
    "part.scale_out of the state space": _scaled("scale_out", "ssm"),
    "part.share_norm_in": field(Part, "share_norm_in", lambda _: False),
}  # fmt: skip
