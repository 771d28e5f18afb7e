"""The layers of both sides of T5 (Raffel et al. 2020, section 2.1): attention, feed-forward, the bias of distances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pluglm_blocks.norm import build_norm
from pluglm_blocks.ops import ACTIVATIONS, gated_act
from pluglm_blocks.relative import relative_buckets
from pluglm_blocks.uncached import Uncached
from torch import Tensor, nn

from pluglm.contracts import AttentionBackend, AttentionSpec, Cache, DenseView, KVView, ModelParts, Norm, Step
from pluglm_arch_t5.config import T5Config


class Attention(nn.Module):
    """Multi-head attention without biases. Parameters: q, k, v [H·D, C], o [C, H·D]."""

    def __init__(self, t5: T5Config, spec: AttentionSpec, parts: ModelParts, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.backend = spec, backend_of(parts)
        C, inner = t5.hidden_size, t5.num_heads * t5.head_dim
        self.q = nn.Linear(C, inner, bias=False, dtype=dtype)
        self.k = nn.Linear(C, inner, bias=False, dtype=dtype)
        self.v = nn.Linear(C, inner, bias=False, dtype=dtype)
        self.o = nn.Linear(inner, C, bias=False, dtype=dtype)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of what is attended to: [B, S, C] -> [B, H, S, D] each."""
        return self._heads(self.k(x)), self._heads(self.v(x))

    def forward(self, x: Tensor, view: KVView, mask: Any, bias: Tensor | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]. mask: as the backend prepared it. bias: [B or 1, H, T, S]."""
        o = self.backend.attend(self._heads(self.q(x)), view, self.spec, mask, bias=bias)  # [B, H, T, D]
        out: Tensor = self.o(o.transpose(1, 2).flatten(2))  # [B, T, C]
        return out

    def _heads(self, projected: Tensor) -> Tensor:
        B, T, _ = projected.shape
        return projected.view(B, T, self.spec.num_heads, self.spec.head_dim).transpose(1, 2)  # [B, H, T, D]


class FeedForward(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)). Parameters: gate (if any), up [F, C], down [C, F]."""

    def __init__(self, t5: T5Config, parts: ModelParts, dtype: torch.dtype) -> None:
        super().__init__()
        C, inner = t5.hidden_size, t5.intermediate_size
        self.gate = nn.Linear(C, inner, bias=False, dtype=dtype) if t5.gated else None
        self.up = nn.Linear(C, inner, bias=False, dtype=dtype)
        self.down = nn.Linear(inner, C, bias=False, dtype=dtype)
        self._activation = t5.activation
        self._gated_act = parts.kernels.get("gated_act", gated_act)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        up = self.up(x)  # [B, T, F]
        h = (
            ACTIVATIONS[self._activation](up)
            if self.gate is None
            else self._gated_act(self.gate(x), up, self._activation)
        )
        out: Tensor = self.down(h)
        return out


class RelativeBias(nn.Module):
    """A scalar for each head and bucket of distances (section 2.1). Parameter: table [buckets, H]."""

    def __init__(self, t5: T5Config, *, bidirectional: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(t5.num_buckets, t5.num_heads, dtype=dtype))
        self.max_distance, self.bidirectional = t5.max_distance, bidirectional

    def forward(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Positions [B or 1, T] and [B or 1, S] -> [B or 1, H, T, S]; padding gives what the mask hides."""
        buckets = relative_buckets(
            q_positions, k_positions, self.table.shape[0], self.max_distance, self.bidirectional
        )  # [B or 1, T, S]
        return F.embedding(buckets, self.table).permute(0, 3, 1, 2)


class EncoderLayer(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)). Parameters: attn_norm, attn, mlp_norm, mlp."""

    def __init__(self, t5: T5Config, parts: ModelParts, dtype: torch.dtype) -> None:
        super().__init__()
        norm = Norm("rms", t5.hidden_size, t5.norm_eps)
        self.attn_norm = build_norm(norm, parts.kernels, dtype)
        self.attn = Attention(t5, t5.encoder_attention, parts, dtype)
        self.mlp_norm = build_norm(norm, parts.kernels, dtype)
        self.mlp = FeedForward(t5, parts, dtype)

    def forward(self, x: Tensor, mask: Any, bias: Tensor) -> Tensor:
        """[B, Te, C] -> [B, Te, C]."""
        h = self.attn_norm(x)
        x = x + self.attn(h, DenseView(*self.attn.keys(h)), mask, bias)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


@dataclass(frozen=True, slots=True)
class DecoderPass:
    """What the decoder's layers share in one pass.

    Attributes:
        cache, step: where new keys go. mask, bias: of self-attention. cross_mask: of the encoder's tokens.
        states: [B, Te, C], and positions [B, Te], of the encoder; None where the cache holds their keys.
    """

    cache: Cache | Uncached
    step: Step
    mask: Any
    bias: Tensor
    cross_mask: Any
    states: Tensor | None
    positions: Tensor | None


class DecoderLayer(nn.Module):
    """x + attn(norm(x)), x + cross(norm(x)), x + mlp(norm(x)). Parameters: as the encoder's, cross_norm and cross."""

    def __init__(self, t5: T5Config, parts: ModelParts, dtype: torch.dtype, i: int) -> None:
        super().__init__()
        norm = Norm("rms", t5.hidden_size, t5.norm_eps)
        self.slot, self.cross_slot = i, t5.num_decoder_layers + i
        self.attn_norm = build_norm(norm, parts.kernels, dtype)
        self.attn = Attention(t5, t5.decoder_attention, parts, dtype)
        self.cross_norm = build_norm(norm, parts.kernels, dtype)
        self.cross = Attention(t5, t5.cross_attention, parts, dtype)
        self.mlp_norm = build_norm(norm, parts.kernels, dtype)
        self.mlp = FeedForward(t5, parts, dtype)

    def forward(self, x: Tensor, now: DecoderPass) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        h = self.attn_norm(x)
        view = now.cache.append(self.slot, *self.attn.keys(h), now.step)
        x = x + self.attn(h, view, now.mask, now.bias)
        x = x + self.cross(self.cross_norm(x), self._source(now), now.cross_mask)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y

    def _source(self, now: DecoderPass) -> KVView:
        """The encoder's keys; projected only where no cache holds them."""
        if now.states is None:
            assert not isinstance(now.cache, Uncached)
            held = now.cache.cross(self.cross_slot)
            assert held is not None  # `T5._begin` has looked
            return held[0]
        k, v = self.cross.keys(now.states)
        if not isinstance(now.cache, Uncached):
            assert now.positions is not None
            now.cache.set_cross(self.cross_slot, k, v, now.positions)
        return DenseView(k, v)


def backend_of(parts: ModelParts) -> AttentionBackend:
    """The attention backend; a model whose description names attention always gets one."""
    assert parts.attention is not None
    return parts.attention
