"""Checkpoints of `pluglm-arch-gemma`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from checkpoints import BEFORE, DYNAMIC, LINEAR, SIZES, YARN, Variant
from rewriting import Knob, on
from torch import Tensor

from pluglm.contracts import Attention, AttentionSpec, DecoderProgram, Head

SLIDING = {"rope_type": "default", "rope_theta": 60.0}


def _about_one(name: str, noise: Tensor) -> Tensor | None:
    """Norms are stored less one. An own head is as large as an embedding, so that gelu and its approximation differ."""
    if "norm" in name:
        return 0.3 * noise
    return 0.5 * noise if "lm_head" in name else None


def _gemma(model_type: str, settings: dict[str, Any], rope: dict[str, Any] | None, **more: Any) -> Variant:
    sizes = {**SIZES, "head_dim": 10, "max_position_embeddings": 120, **settings}
    return Variant(model_type, sizes if rope is None else {**sizes, "rope_parameters": rope}, scale=_about_one, **more)


def _by_type(full: dict[str, Any]) -> dict[str, Any]:
    return {"full_attention": full, "sliding_attention": SLIDING}


def _older(config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3 as Transformers 4 first wrote it: one base a layer type, a pattern instead of types."""
    said = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")}
    full, sliding = (config["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
    scaling = {key: value for key, value in full.items() if key != "rope_theta"}
    return {
        **said, "rope_theta": full["rope_theta"], "rope_local_base_freq": sliding["rope_theta"],
        "rope_scaling": scaling, "sliding_window_pattern": 2,
    }  # fmt: skip


_GEMMA2 = {"sliding_window": 11, "query_pre_attn_scalar": 7, "num_hidden_layers": 4}
VARIANTS: dict[str, Variant] = {
    "gemma-plain": _gemma("gemma", {}, LINEAR, v4=True),
    "gemma-biases": _gemma(
        "gemma",
        {"attention_bias": True, "num_key_value_heads": 3, "tie_word_embeddings": False, "hidden_act": "gelu"}, YARN,
    ),
    "gemma2-capped": _gemma(
        "gemma2",
        {
            **_GEMMA2, "attn_logit_softcapping": 2.5, "final_logit_softcapping": 9.0,
            "max_position_embeddings": BEFORE,
        },
        DYNAMIC, v4=True,
    ),
    "gemma2-types": _gemma(
        "gemma2",
        {
            **_GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": 7.0, "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "tie_word_embeddings": False, "hidden_activation": "silu",
        },
        LINEAR,
    ),
    "gemma3-types": _gemma(
        "gemma3_text",
        {
            "sliding_window": 9, "query_pre_attn_scalar": 13, "attention_bias": True, "num_key_value_heads": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "final_logit_softcapping": 8.0, "tie_word_embeddings": False,
        },
        _by_type(LINEAR),
    ),
    "gemma3-pattern": _gemma(
        "gemma3_text",
        {"sliding_window": 12, "query_pre_attn_scalar": 6, "num_hidden_layers": 4, "sliding_window_pattern": 2},
        _by_type({"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}), spell=_older,
    ),
}  # fmt: skip


def _of_layers(windowed: bool) -> Knob:
    """Another base on the layers with a window, or on those without."""

    def change(op: Attention) -> Attention:
        if op.rope is None or (op.spec.mask.window is not None) is not windowed:
            return op
        return replace(op, rope=replace(op.rope, theta=op.rope.theta * 1.5))

    return on(Attention, change)


def _ropes_exchanged(program: DecoderProgram) -> DecoderProgram | None:
    """Each layer type turns as the other one should."""
    ropes = {op.rope for op in program.ops() if isinstance(op, Attention) and op.rope is not None}
    if len(ropes) != 2:
        return None
    return on(Attention, lambda op: replace(op, rope=next(rope for rope in ropes if rope != op.rope)))(program)


KNOBS: dict[str, Knob] = {
    "rope.theta of layers with a window": _of_layers(windowed=True),
    "rope.theta of layers without one": _of_layers(windowed=False),
    "attention.rope of the other layer type": _ropes_exchanged,
    "spec.softcap none": on(AttentionSpec, lambda spec: replace(spec, softcap=None)),
    "head.softcap none": on(Head, lambda head: replace(head, softcap=None)),
    "norm.offset of q and k": on(
        Attention, lambda op: op if op.qk_norm is None else replace(op, qk_norm=replace(op.qk_norm, offset=0.2))
    ),
}
