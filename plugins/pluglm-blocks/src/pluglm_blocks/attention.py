"""The attention part: projections, norms and rotation around a backend that computes, and a cache that keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pluglm.contracts import Attention, KVSlot, KVView
from pluglm_blocks import norm as norms
from pluglm_blocks import ops, rope
from pluglm_blocks.norm import build_norm

if TYPE_CHECKING:
    from pluglm_blocks.context import BuildContext
    from pluglm_blocks.pass_state import PassState


class SelfAttention(nn.Module):
    """Vaswani et al. 2017, section 3.2, with grouped heads (Ainslie et al. 2023) and rotary positions (Su et al. 2021).

    Parameters: q [H·D, C], k [K·D, C], v [K·Dv, C], o [C, H·Dv], with biases as the op says; q_norm, k_norm;
    sinks [H]; bias_table [buckets, H]. A layer that shares another's keys has no k, k_norm and v.
    """

    def __init__(self, op: Attention, context: BuildContext) -> None:
        super().__init__()
        spec, plan, hidden_size, dtype = op.spec, context.plan, context.program.embedding.hidden_size, context.dtype
        assert context.parts.attention is not None  # `refusals` has looked
        H, K, D, Dv = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_head_dim
        self.spec, self.slot, self.clip = spec, plan.source(op.slot), op.qkv_clip
        self.shares, self.is_shared = self.slot != op.slot, plan.is_shared(op.slot)
        self.backend = context.parts.attention

        self.q = nn.Linear(hidden_size, H * D, bias=op.q_bias, dtype=dtype)
        if not self.shares:
            self.k = nn.Linear(hidden_size, K * D, bias=op.k_bias, dtype=dtype)
            self.v = nn.Linear(hidden_size, K * Dv, bias=op.v_bias, dtype=dtype)
        self.o = nn.Linear(H * Dv, hidden_size, bias=op.o_bias, dtype=dtype)

        self.norm_over = op.qk_norm_over if op.qk_norm is not None else None
        if op.qk_norm is not None:
            self.q_norm = build_norm(op.qk_norm, context.kernels, dtype)
            if not self.shares:
                size = D if op.qk_norm_over == "head" else K * D
                self.k_norm = build_norm(replace(op.qk_norm, size=size), context.kernels, dtype)

        self.interleaved = op.rope is not None and op.rope.interleaved
        self.rotation = plan.rotation(op.rope) if op.rope is not None else None
        self._rope = context.kernels.get("rope", ops.rope)
        self.temperature = plan.temperature(*op.query_temperature) if op.query_temperature is not None else None
        self.mask = plan.mask(spec, op.slot)
        self.sinks = nn.Parameter(torch.zeros(H, dtype=dtype)) if spec.sinks else None
        self.buckets, self.bias_table = None, None
        if op.relative_buckets is not None:
            self.buckets = plan.relative(*op.relative_buckets, not spec.mask.causal, op.slot)
            self.bias_table = nn.Parameter(torch.zeros(op.relative_buckets[0], H, dtype=dtype))

    def forward(self, x: Tensor, state: PassState) -> Tensor:
        """[B, T, C] -> [B, T, C]. Appends this pass's keys and values to the slot, unless another layer has."""
        q = self._heads(self.q(x), self.spec.num_heads, self.q_norm if self.norm_over else None)  # [B, H, T, D]
        if self.shares:
            view = state.views[self.slot]
            assert view is not None  # an earlier layer wrote it: checked at build
            if self.rotation is not None:
                q = self._rope(q, *state.rotations[self.rotation], self.interleaved)
        else:
            k = self._heads(self.k(x), self.spec.num_kv_heads, self.k_norm if self.norm_over else None)  # [B, K, T, D]
            v = self._heads(self.v(x), self.spec.num_kv_heads, None)  # [B, K, T, Dv]
            if self.rotation is not None:
                q, k = self._rotate(q, k, *state.rotations[self.rotation])
            view = state.cache.append(self.slot, k, v, state.step)
            if self.is_shared:
                state.views[self.slot] = view
        if self.temperature is not None:
            q = (q * state.temperatures[self.temperature]).to(q.dtype)
        o = self._attend(q, view, state)  # [B, H, T, Dv]
        out: Tensor = self.o(o.transpose(1, 2).flatten(2))  # [B, T, C]
        return out

    def _heads(self, projected: Tensor, num_heads: int, norm: nn.Module | None) -> Tensor:
        """[B, T, heads·D] -> [B, heads, T, D], clipped and normalised."""
        if self.clip is not None:
            projected = projected.clamp(-self.clip, self.clip)
        if norm is not None and self.norm_over == "all":
            projected = norm(projected)
        heads = projected.reshape(*projected.shape[:2], num_heads, -1)  # [B, T, heads, D]
        if norm is not None and self.norm_over == "head":
            heads = norm(heads)
        return heads.transpose(1, 2)

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q and k in one call: a decode step is bound by the number of calls, and a prefill hardly sees the copy."""
        both = self._rope(torch.cat((q, k), dim=1), cos, sin, self.interleaved)  # [B, H + K, T, D]
        H = self.spec.num_heads
        return both[:, :H], both[:, H:]

    def _attend(self, q: Tensor, view: KVView, state: PassState) -> Tensor:
        bias = None
        if self.buckets is not None and self.bias_table is not None:
            bias = F.embedding(state.buckets[self.buckets], self.bias_table).permute(0, 3, 1, 2)  # [B or 1, H, T, S]
        return self.backend.attend(q, view, self.spec, state.masks[self.mask], sinks=self.sinks, bias=bias)


def refusals(op: Attention, context: BuildContext) -> list[str]:
    """Every reason why this part cannot be built; empty: it can. (That the slot is written once: `checks`.)"""
    spec, reasons = op.spec, []
    H, K, D = spec.num_heads, spec.num_kv_heads, spec.head_dim
    if context.parts.attention is None:
        reasons.append("no attention backend was given")
    if op.cross:
        reasons.append("cross-attention needs an encoder; a decoder program has none")
    if H % K:
        reasons.append(f"{K} key-value heads do not divide {H} heads")
    if spec.alibi_slopes is not None and len(spec.alibi_slopes) != H:
        reasons.append(f"{len(spec.alibi_slopes)} ALiBi slopes for {H} heads")
    if (op.relative_buckets is not None) != spec.bias:
        reasons.append("relative_buckets and spec.bias go together")
    if op.rope is not None:
        reasons += rope.refusals(op.rope)
        if op.rope.dim > D:
            reasons.append(f"rope dim {op.rope.dim} exceeds head_dim {D}")
    if op.qk_norm is not None:
        reasons += norms.refusals(op.qk_norm)
        if op.qk_norm.size != (expected := D if op.qk_norm_over == "head" else H * D):
            reasons.append(f"qk_norm over {op.qk_norm_over!r} has size {op.qk_norm.size}, the queries need {expected}")
        if op.qkv_clip is not None:
            reasons.append("qkv_clip with qk_norm: families differ in which comes first")
    return reasons + _slot_refusals(op, context)


def _slot_refusals(op: Attention, context: BuildContext) -> list[str]:
    spec, slot = op.spec, context.program.slots[context.plan.source(op.slot)]
    if not isinstance(slot, KVSlot):
        return [f"slot {op.slot} is a {slot.kind} slot; attention needs keys and values"]
    reasons = []
    held = (slot.num_kv_heads, slot.head_dim, slot.v_head_dim)
    if held != (needed := (spec.num_kv_heads, spec.head_dim, spec.v_head_dim)):
        reasons.append(f"slot {op.slot} holds (heads, key size, value size) {held}, the layer needs {needed}")
    window, chunk = spec.mask.window, spec.mask.chunk
    if slot.window is not None and (window is None or window > slot.window):
        reasons.append(
            f"slot {op.slot} may drop keys beyond a window of {slot.window}, the mask reads {window or 'all'}"
        )
    if slot.chunk is not None and chunk != slot.chunk:
        reasons.append(f"slot {op.slot} may drop keys of earlier chunks of {slot.chunk}, the mask's chunk is {chunk}")
    return reasons
