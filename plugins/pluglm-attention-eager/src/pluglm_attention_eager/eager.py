"""Softmax attention in plain torch operations, in the order of the papers: the meaning of `AttentionSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import InputError, UnsupportedRequestError

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts import AttentionRequest, AttentionSpec, KeyInfo, KVView

DTYPES = ("float32", "float64", "bfloat16", "float16")
VIEWS = ("dense", "paged", "quantized", "latent")


class EagerMask(NamedTuple):
    """What `prepare` makes of a spec and this pass's positions.

    visible: [b, 1, 1, T, S] bool, b is 1 or B. alibi: [b, K, G, T, S] added to the scores, or None.
    """

    visible: Tensor
    alibi: Tensor | None


class EagerAttention:
    """Attention as it is written down. Scores and softmax in float32; in float64 for float64 inputs."""

    name = "eager"
    views: tuple[str, ...] = VIEWS

    def __init__(self, request: AttentionRequest) -> None:
        reasons = _request_refusals(request)
        reasons += [reason for spec in request.specs for reason in self.refusals(spec)]
        if reasons:
            raise UnsupportedRequestError(
                'attention "eager" cannot honour this request.', why="\n".join(dict.fromkeys(reasons)),
                fix="Drop what it refuses, or name another attention.", reasons=tuple(dict.fromkeys(reasons)),
            )  # fmt: skip
        self._compute = torch.float64 if torch_dtype(request.dtype) == torch.float64 else torch.float32

    def refusals(self, spec: AttentionSpec) -> Sequence[str]:
        """Only a spec that contradicts itself is refused."""
        reasons = []
        if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
            reasons.append(f"{spec.num_kv_heads} kv heads do not divide {spec.num_heads} heads")
        if spec.alibi_slopes is not None and len(spec.alibi_slopes) != spec.num_heads:
            reasons.append(f"{len(spec.alibi_slopes)} ALiBi slopes for {spec.num_heads} heads")
        return reasons

    def prepare(self, spec: AttentionSpec, q_positions: Tensor, keys: KeyInfo) -> EagerMask:
        """Compare every query's position with every key's, once a forward pass."""
        visible = spec.mask.visible(q_positions, keys)[:, None, None]  # [b, 1, 1, T, S]
        if spec.alibi_slopes is None:
            return EagerMask(visible, None)
        slopes = torch.tensor(spec.alibi_slopes, dtype=self._compute, device=q_positions.device)
        distance = q_positions[:, :, None] - keys.positions[:, None, :]  # [b, T, S]
        alibi = -slopes.view(1, spec.num_kv_heads, -1, 1, 1) * distance[:, None, None]  # [b, K, G, T, S]
        return EagerMask(visible, alibi)

    def attend(
        self, q: Tensor, view: KVView, spec: AttentionSpec, mask: EagerMask,
        *, sinks: Tensor | None = None, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """softmax(softcap(scale · q kᵀ) + alibi + bias, sinks) v over the visible keys.

        Args and Returns: as `AttentionBackend.attend`. Heads of one group are rows of one matrix product with their
            key head, so keys and values are not repeated (Ainslie et al. 2023, "GQA", section 2.2).
        Raises: InputError if the spec has sinks or a bias and the tensor is not given.
        """
        k, v = (x.to(self._compute) for x in view.dense())
        B, H, T, D = q.shape
        K, G, S = spec.num_kv_heads, H // spec.num_kv_heads, k.shape[2]
        rows = q.to(self._compute).reshape(B, K, G * T, D)
        s = (rows @ k.transpose(2, 3) * spec.scale).view(B, K, G, T, S)
        if spec.softcap is not None:
            s = spec.softcap * torch.tanh(s / spec.softcap)
        if mask.alibi is not None:
            s = s + mask.alibi
        if spec.bias:
            s = s + _given(bias, "bias").to(self._compute).view(-1, K, G, T, S)
        s = s.masked_fill(~mask.visible, float("-inf"))
        if spec.sinks:
            sink = _given(sinks, "sinks").to(self._compute).view(1, K, G, 1, 1).expand(B, K, G, T, 1)
            s = torch.cat((s, sink), dim=-1)  # [B, K, G, T, S + 1]
        p = torch.softmax(s, dim=-1)[..., :S]
        # A row that sees nothing is NaN after the softmax, and hidden as a whole: filling with zeros settles both.
        p = p.masked_fill(~mask.visible, 0.0)
        return (p.view(B, K, G * T, S) @ v).view(B, H, T, v.shape[3]).to(q.dtype)


def _request_refusals(request: AttentionRequest) -> list[str]:
    reasons = []
    if request.dtype not in DTYPES:
        reasons.append(f"dtype {request.dtype} is not one of {', '.join(DTYPES)}")
    if not set(VIEWS) & set(request.views):
        reasons.append(f"it reads {', '.join(VIEWS)} views, and the cache gives {', '.join(request.views) or 'none'}")
    if request.variant is not None:
        reasons.append(f"it has no variants, and {request.variant!r} was asked for")
    reasons += [f"it has no option {name!r}" for name, _ in request.options]
    return reasons


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise InputError(
            f"attend was called without {name}.", why=f"the layer's spec says that it has {name}.",
            fix=f"Pass {name}= from the layer.", argument=name,
        )  # fmt: skip
    return tensor
