"""Mamba 2's mixer: a short convolution, then a selective state space, blocked for many tokens and recurrent for one.

The two forms give the same numbers (Dao & Gu 2024, section 6, "SSD"): the recurrence reads a token at a time; the
blocked one is attention without a softmax inside a chunk, and the recurrence from chunk to chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pluglm.contracts import Norm, StateSpace
from pluglm_blocks import norm as norms
from pluglm_blocks import ops
from pluglm_blocks.ops import ACTIVATIONS

if TYPE_CHECKING:
    from pluglm_blocks.context import BuildContext
    from pluglm_blocks.pass_state import PassState
    from pluglm_blocks.ragged import Ragged


class Mamba2Mixer(nn.Module):
    """Dao & Gu 2024, section 7.1, with the parallel projections of figure 6.

    Parameters: those of `StateSpace`. Shapes below: I inner_size, H heads of P dimensions, G groups, N state_size.

    Padding leaves both states of its row as they were, wherever it stands: a row's real tokens are moved to its front
    (`Ragged`), the convolution's tail is what precedes their end, and a time step of zero neither decays the state nor
    adds to it.
    """

    def __init__(self, op: StateSpace, context: BuildContext) -> None:
        super().__init__()
        C, dtype = context.program.embedding.hidden_size, context.dtype
        self.slot, self.op = op.slot, op
        self.in_proj = nn.Linear(C, op.inner_size + op.conv_size + op.num_heads, bias=op.in_bias, dtype=dtype)
        self.conv = nn.Conv1d(
            op.conv_size, op.conv_size, op.conv_kernel, groups=op.conv_size, bias=op.conv_bias, dtype=dtype
        )
        self.dt_bias = nn.Parameter(torch.zeros(op.num_heads, dtype=dtype))
        self.A_log = nn.Parameter(torch.zeros(op.num_heads, dtype=dtype))
        self.D = nn.Parameter(torch.ones(op.num_heads, dtype=dtype))
        self.norm = GatedNorm(op.norm, op.norm_groups, op.norm_before_gate, dtype) if op.norm is not None else None
        self.out_proj = nn.Linear(op.inner_size, C, bias=op.out_bias, dtype=dtype)
        self._act = ACTIVATIONS[op.activation]

    def forward(self, x: Tensor, state: PassState) -> Tensor:
        """[B, T, C] -> [B, T, C]. Moves the slot's states on by this pass's tokens."""
        ragged, kept = state.ragged, state.cache.state(self.slot)
        if ragged is not None:
            x = ragged.to_front(x)
        z, u, dt = self._project(x)
        tail, h = self._start(kept, u)
        u, tail = self._convolve(u, tail, ragged)
        y, h = self._scan(u, self._time_step(dt, ragged), h)
        if kept:
            kept["conv"].copy_(tail)
            kept["ssm"].copy_(h)
        y = y * F.silu(z.float()) if self.norm is None else self.norm(y, z)
        out: Tensor = self.out_proj(y.to(x.dtype))  # [B, T, C]
        return out if ragged is None else ragged.to_places(out)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, T, I], what is convolved [B, T, I + 2·G·N], and dt [B, T, H]."""
        op, GN = self.op, self.op.num_groups * self.op.state_size
        projected = self.in_proj(x)
        if op.multipliers is None:
            z, u, dt = torch.split(projected, [op.inner_size, op.conv_size, op.num_heads], dim=-1)
            return z, u, dt
        parts = torch.split(projected, [op.inner_size, op.inner_size, GN, GN, op.num_heads], dim=-1)
        z, *xBC, dt = (part * scale for part, scale in zip(parts, op.multipliers, strict=True))
        return z, torch.cat(xBC, dim=-1), dt

    def _start(self, kept: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's tail [B, channels, kernel - 1] and the state [B, H, P, N] float32 before this pass."""
        op = self.op
        if not kept:
            tail = u.new_zeros(u.shape[0], op.conv_size, op.conv_kernel - 1)
            return tail, u.new_zeros(u.shape[0], op.num_heads, op.head_dim, op.state_size, dtype=torch.float32)
        h = kept["ssm"]  # overwritten at the end of the pass, but a graph needs what it was
        return kept["conv"].to(u.dtype), h.clone() if torch.is_grad_enabled() else h

    def _convolve(self, u: Tensor, tail: Tensor, ragged: Ragged | None) -> tuple[Tensor, Tensor]:
        """The activated causal convolution of u [B, T, channels] behind its tail, and the tail of what is to come."""
        window = torch.cat((tail, u.mT), dim=2)  # [B, channels, kernel - 1 + T]
        if u.shape[1] == 1:  # one output: a dot product, which costs a convolution's overhead less
            convolved = (window * self.conv.weight[:, 0]).sum(2, keepdim=True)
            if self.conv.bias is not None:
                convolved = convolved + self.conv.bias[:, None]
        else:
            convolved = self.conv(window)  # [B, channels, T]
        if ragged is None:
            tail = window[:, :, u.shape[1] :]
        else:
            ends = ragged.counts + torch.arange(tail.shape[2], device=u.device)  # [B or 1, kernel - 1]
            tail = window.gather(2, ends[:, None].expand(tail.shape))
        return self._act(convolved).mT, tail

    def _time_step(self, dt: Tensor, ragged: Ragged | None) -> Tensor:
        """softplus(dt + bias), clamped: [B, T, H] float32; zero for padding."""
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(self.op.dt_min, self.op.dt_max)
        return dt if ragged is None else dt * ragged.real[:, :, None]

    def _scan(self, u: Tensor, dt: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """y [B, T, I] float32 from what was convolved, and the state after it."""
        op, G = self.op, self.op.num_groups
        x, B, C = torch.split(u.float(), [op.inner_size, G * op.state_size, G * op.state_size], dim=-1)
        x = torch.unflatten(x, 2, (op.num_heads, op.head_dim))  # [B, T, H, P]
        B, C = (torch.unflatten(t, 2, (G, op.state_size)) for t in (B, C))  # [B, T, G, N]
        A = -torch.exp(self.A_log.float())  # [H]
        if u.shape[1] == 1:
            y, h = recurrence(x, dt, A, B, C, h)
        else:
            y, h = ssd(x, dt, A, B, C, h, op.chunk_size)
        y = y + self.D.float()[:, None] * x
        return y.flatten(2), h


class GatedNorm(nn.Module):
    """norm(y * silu(z)), or norm(y) * silu(z); in float32. Parameters: weight [I] and bias [I], as the norm has them.

    Dao & Gu 2024, section 7.1. With several groups each part of I is normalised by itself (for tensor parallelism,
    section 8.1).
    """

    def __init__(self, norm: Norm, num_groups: int, before_gate: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.eps, self.offset, self.cast_late = norm.kind, norm.eps, norm.offset, norm.cast_late
        self.num_groups, self.before_gate = num_groups, before_gate
        self.weight = nn.Parameter(torch.full((norm.size,), 1.0 - norm.offset, dtype=dtype)) if norm.weight else None
        self.bias = nn.Parameter(torch.zeros(norm.size, dtype=dtype)) if norm.bias else None

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y [B, T, I] float32 and z [B, T, I] -> [B, T, I] float32; rounded to z's dtype before the weight, unless
        `cast_late`."""
        gate = F.silu(z.float())
        if not self.before_gate:
            y = y * gate
        parts = torch.unflatten(y, -1, (self.num_groups, -1))
        if self.kind == "rms":
            parts = ops.rms_norm(parts, None, self.eps, 0.0)
        else:
            parts = ops.layer_norm(parts, None, None, self.eps)
        y = parts.flatten(-2)
        if not self.cast_late:
            y = y.to(z.dtype).float()
        if self.weight is not None:
            y = y * (self.weight.float() + self.offset)
        if self.bias is not None:
            y = y + self.bias.float()
        return y * gate if self.before_gate else y


def recurrence(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token: h = exp(dt·A)·h + dt·x ⊗ B; y = h·C.

    Args:
        x: [B, 1, H, P]. dt: [B, 1, H]. A: [H], negative. B, C: [B, 1, G, N], of H / G neighbouring heads each.
        h: [B, H, P, N].
    Returns: y [B, 1, H, P] and the new h; all float32.
    Source: Dao & Gu 2024, equation 2, with the discretisation of Mamba (Gu & Dao 2023, section 2, simplified for B).
    """
    each = x.shape[2] // B.shape[2]
    B, C = B[:, 0].repeat_interleave(each, 1), C[:, 0].repeat_interleave(each, 1)  # [B, H, N]
    decay = torch.exp(dt[:, 0] * A)  # [B, H]
    h = h * decay[:, :, None, None] + (dt[:, 0, :, None] * x[:, 0])[..., None] * B[:, :, None]
    return (h @ C[..., None])[..., 0][:, None], h


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, chunk_size: int) -> tuple[Tensor, Tensor]:
    """Many tokens, in chunks: what `recurrence` gives for one after another.

    The chunks are taken in turn, so the memory beyond the result is that of one; the last one may be shorter.

    Args: as in `recurrence`, with T tokens.
    Returns: y [B, T, H, P] and the state [B, H, P, N] after the last token; all float32.
    Source: Dao & Gu 2024, section 6 (block decomposition) and listing 1.
    """
    G = B.shape[2]
    h = torch.unflatten(h, 1, (G, -1))  # [B, G, H/G, P, N]
    x = torch.unflatten(x * dt[..., None], 2, (G, -1)).permute(0, 2, 3, 1, 4)  # [B, G, H/G, T, P]
    a = torch.unflatten(dt * A, 2, (G, -1)).permute(0, 2, 3, 1)  # [B, G, H/G, T]
    B, C = (t.transpose(1, 2)[:, :, None] for t in (B, C))  # [B, G, 1, T, N]
    outputs = []
    for x_, a_, B_, C_ in zip(*(torch.split(t, chunk_size, 3) for t in (x, a, B, C)), strict=True):
        decay = torch.exp(segment_sums(a_))  # [B, G, H/G, t, s], from after s up to t
        y = (C_ @ B_.mT * decay) @ x_  # what the chunk's own tokens add
        from_start = torch.exp(a_.cumsum(3))[..., None]  # [B, G, H/G, t, 1]
        outputs.append(y + (C_ @ h.mT) * from_start)  # and the state before it
        h = h * from_start[..., -1:, :] + (x_ * decay[..., -1, :, None]).mT @ B_
    return torch.cat(outputs, 3).permute(0, 3, 1, 2, 4).flatten(2, 3), h.flatten(1, 2)


def segment_sums(a: Tensor) -> Tensor:
    """[..., T] -> [..., T, T]: at (t, s) the sum of a over s + 1 … t; -inf above the diagonal.

    Sums, not differences of sums: those cancel where a is large (Dao & Gu 2024, section 6, listing 1, "segsum").
    """
    T = a.shape[-1]
    seen = torch.ones(T, T, dtype=torch.bool, device=a.device).tril(-1)
    sums = a[..., None].expand(*a.shape, T).masked_fill(~seen, 0.0).cumsum(-2)
    return sums.masked_fill(seen.mT, -torch.inf)


def refusals(op: StateSpace, context: BuildContext) -> list[str]:
    """Every reason why this part cannot be built; empty: it can. (That the slot is written once: `checks`.)"""
    reasons = []
    for name in ("inner_size", "num_heads", "head_dim", "num_groups", "state_size", "conv_kernel", "chunk_size"):
        if getattr(op, name) < 1:
            reasons.append(f"{name} is {getattr(op, name)}; it must be above zero")
    if reasons:
        return reasons  # the checks below divide by some of them
    if op.num_heads * op.head_dim != op.inner_size:
        reasons.append(f"{op.num_heads} heads of {op.head_dim} dimensions do not make an inner_size of {op.inner_size}")
    if op.num_heads % op.num_groups:
        reasons.append(f"{op.num_groups} groups do not divide {op.num_heads} heads")
    if op.activation not in ACTIVATIONS:
        reasons.append(f"activation {op.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if op.dt_min < 0 or (op.dt_max is not None and op.dt_max < op.dt_min):
        reasons.append(f"a time step between {op.dt_min} and {op.dt_max} is none at all, or runs backwards")
    multipliers: tuple[float, ...] | None = op.multipliers
    if multipliers is not None and len(multipliers) != 5:
        reasons.append(f"{len(multipliers)} multipliers for z, x, B, C and dt, which are five")
    reasons += _norm_refusals(op)
    slot = context.program.slots[op.slot]
    if slot != op.state_slot:
        reasons.append(f"slot {op.slot} is {slot}; the layer needs {op.state_slot}")
    return reasons


def _norm_refusals(op: StateSpace) -> list[str]:
    if op.norm is None:
        same = op.norm_groups == 1 and not op.norm_before_gate
        return [] if same else ["norm_groups and norm_before_gate are of a norm, and there is none"]
    reasons = norms.refusals(op.norm)
    if op.norm.size != op.inner_size:
        reasons.append(f"the gated norm has size {op.norm.size}, the inner_size is {op.inner_size}")
    if op.norm_groups < 1 or op.inner_size % op.norm_groups:
        reasons.append(f"{op.norm_groups} groups of the norm do not divide an inner_size of {op.inner_size}")
    return reasons
