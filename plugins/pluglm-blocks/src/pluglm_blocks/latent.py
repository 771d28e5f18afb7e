"""Latent attention: what is cached is one small vector a token, and two ways to attend to it with the same meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pluglm.contracts import DenseView, KVView, LatentAttention, LatentSlot, Norm
from pluglm_blocks import ops, rope
from pluglm_blocks.norm import build_norm

if TYPE_CHECKING:
    from pluglm_blocks.context import BuildContext
    from pluglm_blocks.pass_state import PassState


class LatentSelfAttention(nn.Module):
    """DeepSeek-AI 2024, "DeepSeek-V2", section 2.1, equations 37 to 47. R: kv_rank, N: nope_dim, Dr: rope.dim.

    Parameters: q [H·D, C], or q_down [q_rank, C], q_norm [q_rank] and q_up [H·D, q_rank]; kv_down [R + Dr, C],
    kv_norm [R]; k_up [H, N, R] and v_up [H, Dv, R], no linear layers, as one of the two ways uses them transposed;
    o [C, H·Dv].
    """

    def __init__(self, op: LatentAttention, context: BuildContext) -> None:
        super().__init__()
        plan, hidden_size, dtype = context.plan, context.program.embedding.hidden_size, context.dtype
        assert context.parts.attention is not None  # `refusals` has looked
        self.spec, self.absorbed, self.slot = op.spec, op.absorbed, op.slot
        self._q_sizes, self._kv_sizes = [op.nope_dim, op.rope.dim], [op.kv_rank, op.rope.dim]
        self.backend = context.parts.attention
        H, D, Dv, R = op.spec.num_heads, op.spec.head_dim, op.spec.v_head_dim, op.kv_rank

        self.low_rank_q = op.q_rank is not None
        if op.q_rank is None:
            self.q = nn.Linear(hidden_size, H * D, bias=False, dtype=dtype)
        else:
            self.q_down = nn.Linear(hidden_size, op.q_rank, bias=op.bias, dtype=dtype)
            self.q_norm = build_norm(Norm("rms", op.q_rank, op.norm_eps), context.kernels, dtype)
            self.q_up = nn.Linear(op.q_rank, H * D, bias=False, dtype=dtype)
        self.kv_down = nn.Linear(hidden_size, R + op.rope.dim, bias=op.bias, dtype=dtype)
        self.kv_norm = build_norm(Norm("rms", R, op.norm_eps), context.kernels, dtype)
        self.k_up = nn.Parameter(torch.zeros(H, op.nope_dim, R, dtype=dtype))
        self.v_up = nn.Parameter(torch.zeros(H, Dv, R, dtype=dtype))
        self.o = nn.Linear(H * Dv, hidden_size, bias=op.bias, dtype=dtype)

        self.interleaved, self.rotation = op.rope.interleaved, plan.rotation(op.rope)
        self._rope = context.kernels.get("rope", ops.rope)
        self.expands, absorbs = way_of(op, expanded=True), way_of(op, expanded=False)
        self.mask = plan.mask(self.spec, op.slot, self.expands)
        self.absorbed_mask = plan.mask(self.absorbed, op.slot, absorbs)

    def forward(self, x: Tensor, state: PassState) -> Tensor:
        """[B, T, C] -> [B, T, C]. Appends this pass's latents and rotary keys to the slot."""
        H, T = self.spec.num_heads, x.shape[1]
        q_nope, q_rope = torch.split(self._queries(x), self._q_sizes, dim=-1)  # [B, H, T, N], [B, H, T, Dr]
        latent, k_rope = torch.split(self.kv_down(x), self._kv_sizes, dim=-1)  # [B, T, R], [B, T, Dr]
        rotated = torch.cat((q_rope, k_rope[:, None]), dim=1)  # [B, H + 1, T, Dr]
        rotated = self._rope(rotated, *state.rotations[self.rotation], self.interleaved)
        view = state.cache.append(self.slot, rotated[:, H], self.kv_norm(latent), state.step)
        attend = self._expanded if self.expands(T, state.step.keys(self.slot).length) else self._absorbed
        o = attend(q_nope, rotated[:, :H], view, state)  # [B, H, T, Dv]
        out: Tensor = self.o(o.transpose(1, 2).flatten(2))  # [B, T, C]
        return out

    def _queries(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, H, T, D], not rotated."""
        q: Tensor = self.q_up(self.q_norm(self.q_down(x))) if self.low_rank_q else self.q(x)
        return q.view(*q.shape[:2], self.spec.num_heads, self.spec.head_dim).transpose(1, 2)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, view: KVView, state: PassState) -> Tensor:
        """Keys and values of every head from the latents, and ordinary attention: equations 42 to 47."""
        key, latent = view.dense()  # [B, 1, S, R + Dr], [B, 1, S, R]
        k_nope, v = self._up(latent[:, 0], self.k_up), self._up(latent[:, 0], self.v_up)  # [B, H, S, N], [B, H, S, Dv]
        k_rope = key[..., latent.shape[-1] :].expand(-1, self.spec.num_heads, -1, -1)  # the same for every head
        k = torch.cat((k_nope, k_rope), dim=-1)  # [B, H, S, D]
        q = torch.cat((q_nope, q_rope), dim=-1)  # [B, H, T, D]
        return self.backend.attend(q, DenseView(k, v), self.spec, state.masks[self.mask])

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, view: KVView, state: PassState) -> Tensor:
        """q·(U c) is (Uᵀ q)·c: the queries go through the up-projection, and the latents are keys and values."""
        q = torch.cat((_by_head(q_nope, self.k_up), q_rope), dim=-1)  # [B, H, T, R + Dr]
        o = self.backend.attend(q, view, self.absorbed, state.masks[self.absorbed_mask])  # [B, H, T, R]
        return _by_head(o, self.v_up.mT)

    def _up(self, latent: Tensor, weight: Tensor) -> Tensor:
        """[B, S, R] and [H, n, R] -> [B, H, S, n]."""
        up = F.linear(latent, weight.flatten(0, 1))  # [B, S, H·n]
        return up.view(*up.shape[:2], *weight.shape[:2]).transpose(1, 2)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """[B, H, T, n] and [H, n, m] -> [B, H, T, m]: one product a head for all rows, so that no weight is repeated."""
    B, H, T, _ = x.shape
    product = torch.bmm(x.transpose(0, 1).flatten(1, 2), weight)  # [H, B·T, m]
    return product.view(H, B, T, -1).transpose(0, 1)


@dataclass(frozen=True)
class Way:
    """When a pass goes one of the two ways: whichever takes fewer multiplications. Follows from the shapes alone.

    For T queries over S keys a head expands S latents and compares vectors of N + Dr + Dv numbers, or it takes T
    queries and outputs through the up-projections and compares vectors of R + Dr + R numbers:

        S·R·(N + Dv) + T·S·(N + Dr + Dv)   against   T·R·(N + Dv) + T·S·(2·R + Dr)

    So a prompt without a past is expanded, a single token after some others is not (DeepSeek-V3's sizes: fewer than
    about 170 tokens after a long past).

    Attributes:
        a_key: multiplications that expand one latent, R·(N + Dv). a_pair: saved for one query and key, 2·R - N - Dv.
        expanded: which way this is.
    """

    a_key: int
    a_pair: int
    expanded: bool

    def __call__(self, T: int, S: int) -> bool:
        """Whether a pass of T new tokens, S with those before, goes this way."""
        return ((S - T) * self.a_key < T * S * self.a_pair) is self.expanded


def way_of(op: LatentAttention, *, expanded: bool) -> Way:
    """One of the two ways of an op. Layers of equal sizes have equal ways, and share their masks."""
    outside = op.nope_dim + op.spec.v_head_dim
    return Way(op.kv_rank * outside, 2 * op.kv_rank - outside, expanded)


def refusals(op: LatentAttention, context: BuildContext) -> list[str]:
    """Every reason why this part cannot be built; empty: it can. (That the slot is written once: `checks`.)"""
    spec, backend, reasons = op.spec, context.parts.attention, []
    if backend is None:
        reasons.append("no attention backend was given")
    elif missing := {"dense", "latent"} - set(backend.views):
        reasons.append(f"attention backend {backend.name} does not read {' and '.join(sorted(missing))} views")
    for name, size in (("nope_dim", op.nope_dim), ("kv_rank", op.kv_rank), ("q_rank", op.q_rank)):
        if size is not None and size < 1:
            reasons.append(f"{name} is {size}, not a positive number")
    if spec.num_kv_heads != spec.num_heads:
        reasons.append(f"{spec.num_heads} heads have {spec.num_kv_heads} keys; expanded latents give each its own")
    if spec.head_dim != op.nope_dim + op.rope.dim:
        reasons.append(f"head_dim {spec.head_dim} is not nope_dim {op.nope_dim} + rope dim {op.rope.dim}")
    if spec.alibi_slopes is not None and len(spec.alibi_slopes) != spec.num_heads:
        reasons.append(f"{len(spec.alibi_slopes)} ALiBi slopes for {spec.num_heads} heads")
    if spec.sinks or spec.bias:
        reasons.append("sinks and a bias on scores are parameters that latent attention does not have")
    return reasons + rope.refusals(op.rope) + _slot_refusals(op, context)


def _slot_refusals(op: LatentAttention, context: BuildContext) -> list[str]:
    slot = context.program.slots[op.slot]
    if not isinstance(slot, LatentSlot):
        return [f"slot {op.slot} is a {slot.kind} slot; latent attention needs one of its own for latents"]
    held, needed = (slot.latent_dim, slot.rope_dim), (op.kv_rank, op.rope.dim)
    return [] if held == needed else [f"slot {op.slot} holds (latent, rotary) sizes {held}, the layer needs {needed}"]
