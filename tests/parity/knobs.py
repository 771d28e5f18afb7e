"""Every knob of a program, and how to break it alone: the same weights must then give other logits.

A knob is a function from a program to the program with one thing changed, or None if the program does not have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from checkpoints import FAMILIES
from rewriting import Knob, field, nodes, on, parameter, without

from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    Embedding,
    Experts,
    FeedForward,
    Head,
    KVSlot,
    MaskSpec,
    Norm,
    Part,
    Rope,
)


def _norm_of(part: str, place: str) -> Knob:
    def change(node: Part) -> Part:
        norm = getattr(node, place)
        if node.name != part or norm is None:
            return node
        return replace(node, **{place: replace(norm, eps=0.05)})

    return on(Part, change)


def _moved(part: Part) -> Part:
    return replace(part, norm_in=part.norm_out, norm_out=part.norm_in)


def _narrower(r: Rope) -> Rope:
    """The same rotation without its slowest pair."""
    numbers = tuple((k, v[:-1] if isinstance(v, tuple) else v) for k, v in r.parameters)
    return Rope(r.kind, r.theta, r.dim - 2, max_seq_len=r.max_seq_len, parameters=numbers)


def _windows(change: Callable[[int], int | None]) -> Knob:
    def resized(node: Any) -> Any:
        return node if node.window is None else replace(node, window=change(node.window))

    return on((MaskSpec, KVSlot), resized)  # type: ignore[arg-type]


def _rotate_all(program: DecoderProgram) -> DecoderProgram | None:
    rope = next((node for node in nodes(program) if isinstance(node, Rope)), None)
    return None if rope is None else on(Attention, lambda op: replace(op, rope=rope))(program)


def _rotate_the_others(program: DecoderProgram) -> DecoderProgram | None:
    """Rotary positions on exactly those layers that have none."""
    found = [node.rope for node in nodes(program) if isinstance(node, Attention)]
    rope = next((rope for rope in found if rope is not None), None)
    if rope is None or None not in found:
        return None
    return on(Attention, lambda op: replace(op, rope=None if op.rope is not None else rope))(program)


def _window_of_the_others(program: DecoderProgram) -> DecoderProgram | None:
    """The window on exactly those layers that have none."""
    window = next((slot.window for slot in program.slots if isinstance(slot, KVSlot) and slot.window), None)
    if window is None or all(isinstance(slot, KVSlot) and slot.window for slot in program.slots):
        return None
    return on((MaskSpec, KVSlot), lambda node: replace(node, window=None if node.window else window))(program)  # type: ignore[arg-type]


def _of_feed_forwards(change: Callable[[FeedForward], FeedForward]) -> Knob:
    """Change dense parts and experts, but not those whose clamp has an activation of its own."""

    def changed(node: Any) -> Any:
        if isinstance(node, FeedForward):
            return change(node)
        return node if node.clamp is None else replace(node, expert=replace(node.expert, activation="silu", gated=True))

    return on((FeedForward, Experts), changed)  # type: ignore[arg-type]


OTHER = {"silu": "gelu", "gelu": "gelu_tanh", "gelu_tanh": "gelu", "relu": "silu"}
_KNOBS: dict[str, Knob] = {
    "rope.kind": on(Rope, lambda r: Rope("default", r.theta, r.dim) if r.kind != "default" else r),
    "rope.kind of plain positions": on(
        Rope, lambda r: Rope("linear", r.theta, r.dim, r.interleaved, (("factor", 2.0),)) if r.kind == "default" else r),
    "rope.theta": field(Rope, "theta", lambda theta: theta * 1.2),
    "rope.dim": on(Attention, lambda op: op if op.rope is None else replace(op, rope=_narrower(op.rope))),
    "rope.interleaved": field(Rope, "interleaved", lambda _: True),
    "rope.max_seq_len": on(Rope, lambda r: replace(r, max_seq_len=r.max_seq_len + 7) if r.kind == "dynamic" else r),
    "rope.factor": parameter("factor", lambda factor: factor * 1.5),
    "rope.original_max_position_embeddings": parameter("original_max_position_embeddings", lambda n: n * 2),
    "rope.beta_fast": parameter("beta_fast", lambda beta: beta / 3),
    "rope.beta_slow": parameter("beta_slow", lambda beta: beta / 3),
    "rope.mscale": without("mscale"),
    "rope.mscale_all_dim": without("mscale_all_dim"),
    "rope.truncate": without("truncate"),
    "rope.low_freq_factor": parameter("low_freq_factor", lambda factor: factor * 2),
    "rope.high_freq_factor": parameter("high_freq_factor", lambda factor: factor * 2),
    "rope.short_factor": parameter("short_factor", lambda factors: factors[::-1]),
    "rope.long_factor": parameter("long_factor", lambda factors: factors[::-1]),
    "rope.partial_rotary_factor": without("partial_rotary_factor"),
    "attention.rope everywhere": _rotate_all,
    "attention.rope on the other layers": _rotate_the_others,
    "attention.rope nowhere": field(Attention, "rope", lambda _: None),
    "attention.q_bias": field(Attention, "q_bias", lambda _: False),
    "attention.k_bias": on(Attention, lambda op: op if op.rope is None else replace(op, k_bias=False)),
    "attention.v_bias": field(Attention, "v_bias", lambda _: False),
    "attention.o_bias": field(Attention, "o_bias", lambda _: False),
    "attention.qk_norm": field(Attention, "qk_norm", lambda _: None),
    "attention.qk_norm.eps": on(
        Attention, lambda op: op if op.qk_norm is None else replace(op, qk_norm=replace(op.qk_norm, eps=0.05))),
    "spec.scale": field(AttentionSpec, "scale", lambda scale: scale * 1.1),
    "spec.softcap": field(AttentionSpec, "softcap", lambda _: 5.0),
    "mask.causal": field(MaskSpec, "causal", lambda _: False),
    "mask.window + 1": _windows(lambda window: window + 1),
    "mask.window - 1": _windows(lambda window: window - 1),
    "mask.window none": _windows(lambda _: None),
    "mask.window on the other layers": _window_of_the_others,
    "norm.eps before attention": _norm_of("attn", "norm_in"),
    "norm.eps before feed-forward": _norm_of("mlp", "norm_in"),
    "norm.eps after attention": _norm_of("attn", "norm_out"),
    "norm.eps after feed-forward": _norm_of("mlp", "norm_out"),
    "norm.eps at the end": on(DecoderProgram, lambda p: replace(p, final_norm=replace(p.final_norm, eps=0.05))),
    "norm.offset": on(Norm, lambda norm: replace(norm, offset=0.1)),
    "norm.kind": on(Norm, lambda norm: replace(norm, kind="layer")),
    "norm.weight": on(Norm, lambda norm: replace(norm, weight=False, offset=0.0)),
    "norm.bias": field(Norm, "bias", lambda _: False),
    "norm.kind of layer norms": on(
        Norm, lambda norm: replace(norm, kind="rms", bias=False) if norm.kind == "layer" else norm),
    "final_norm": field(DecoderProgram, "final_norm", lambda _: None),
    "part.norms moved": on(Part, _moved),
    "part.share_norm_in": field(Part, "share_norm_in", lambda _: False),
    "part.scale_in": field(Part, "scale_in", lambda _: 1.1),
    "part.scale_out": field(Part, "scale_out", lambda _: 1.1),
    "branch.scale": field(Branch, "scale", lambda scale: scale * 1.1),
    "feed_forward.activation": _of_feed_forwards(lambda ff: replace(ff, activation=OTHER[ff.activation])),
    "feed_forward.gated": _of_feed_forwards(lambda ff: replace(ff, gated=False, gate_scale=1.0)),
    "feed_forward.bias": field(FeedForward, "bias", lambda _: False),
    "embedding.scale": on(Embedding, lambda e: e if e.norm is not None else replace(e, scale=e.scale * 1.1)),
    "head.scale": field(Head, "scale", lambda scale: scale * 1.1),
    "head.softcap": field(Head, "softcap", lambda _: 5.0),
    "head.bias": field(Head, "bias", lambda _: False),
    "head.tied": field(Head, "tied", lambda tied: not tied),
}  # fmt: skip

#: Fields that no twin breaks, and why that is so.
_NOT_BROKEN = {
    "Norm.size": "another size does not load", "Norm.cast_late": "rounds elsewhere; float32 has nothing to round",
    "Attention.k_bias": "without rotation it moves all scores of a query by one number; with it, `attention.k_bias`",
    "Attention.slot": "names a place", "Attention.op": "names a class", "FeedForward.op": "names a class",
    "Attention.qk_norm_over": "the other way needs weights of another size",
    "AttentionSpec.num_heads": "another number does not load; which head reads which keys: `swap the heads`",
    "AttentionSpec.num_kv_heads": "the same", "AttentionSpec.head_dim": "another size does not load",
    "AttentionSpec.v_head_dim": "the same", "KVSlot.num_kv_heads": "sizes of the cache",
    "KVSlot.head_dim": "sizes of the cache", "KVSlot.v_head_dim": "sizes of the cache",
    "FeedForward.gated": "a gate has weights of its own", "FeedForward.hidden_size": "another size does not load", "FeedForward.intermediate_size": "the same",
    "Embedding.vocab_size": "the same", "Embedding.hidden_size": "the same", "Part.name": "names a place",
    "DecoderProgram.max_seq_len": "a limit, not a number of the computation",
    "DecoderProgram.version": "of the format",
}  # fmt: skip

KNOBS: dict[str, Knob] = dict(_KNOBS)
NOT_BROKEN: dict[str, str] = dict(_NOT_BROKEN)
for _family in FAMILIES:
    KNOBS |= getattr(_family, "KNOBS", {})
    NOT_BROKEN |= getattr(_family, "NOT_BROKEN", {})
