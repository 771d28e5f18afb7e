"""Checkpoints of `pluglm-arch-gpt-oss`, and the knobs of its experts and sinks."""

from __future__ import annotations

from dataclasses import replace

from checkpoints import LINEAR, YARN, Variant, rotary
from rewriting import Knob, field, on

from pluglm.contracts import AttentionSpec, Experts

#: Limits that many of the random gates exceed.
EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 3, "swiglu_limit": 0.9, "swiglu_alpha": 1.3, "head_dim": 10}

VARIANTS: dict[str, Variant] = {
    "gpt-oss-alternating": rotary(
        "gpt_oss", {**YARN, "truncate": False}, {**EXPERTS, "num_hidden_layers": 4, "sliding_window": 12}
    ),
    "gpt-oss-unbiased": rotary(
        "gpt_oss", LINEAR,
        {
            **EXPERTS, "num_experts_per_tok": 2, "attention_bias": False, "num_key_value_heads": 3, "swiglu_limit": 1.4,
            "sliding_window": 9, "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        },
        tied=True, v4=True,
    ),
}  # fmt: skip

KNOBS: dict[str, Knob] = {
    "experts.scoring of the chosen": on(
        Experts, lambda op: replace(op, scoring="sigmoid") if op.scoring == "softmax_topk" else op
    ),
    "experts.router_bias": field(Experts, "router_bias", lambda _: False),
    "experts.clamp": on(Experts, lambda op: op if op.clamp is None else replace(op, clamp=op.clamp * 1.2)),
    "experts.clamp none": on(Experts, lambda op: replace(op, clamp=None, alpha=1.0)),
    "experts.clamp for another activation": on(
        Experts,
        lambda op: (
            op if op.clamp is None else replace(op, clamp=None, alpha=1.0, expert=replace(op.expert, activation="gelu"))
        ),
    ),
    "experts.alpha": on(Experts, lambda op: op if op.clamp is None else replace(op, alpha=op.alpha * 1.2)),
    "spec.sinks": field(AttentionSpec, "sinks", lambda _: False),
}
