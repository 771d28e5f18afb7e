"""The functions of flash_attn 2 and 3 as their documentation describes them, in float64 and head by head.

They check what a CUDA kernel would: the dtypes and shapes of the lengths, and that the last dimension is contiguous.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

CALLS: list[str] = []


def one_sequence(q, k, v, *, scale, causal, window_size, softcap, alibi_slopes=None, s_aux=None):
    """q: [T, H, D]; k, v: [S, K, D] -> [T, H, D]. Query i stands at cell i + S - T; the window is inclusive."""
    T, H, _ = q.shape
    S, K, _ = k.shape
    diagonal, cells = torch.arange(T)[:, None] + S - T, torch.arange(S)[None]
    left, right = window_size
    seen = torch.ones(T, S, dtype=torch.bool)
    if causal:
        right = 0
    if left >= 0:
        seen &= cells >= diagonal - left
    if right >= 0:
        seen &= cells <= diagonal + right
    o = torch.zeros(T, H, v.shape[2], dtype=torch.float64)
    for h in range(H):
        key, value = k[:, h * K // H].double(), v[:, h * K // H].double()
        s = q[:, h].double() @ key.T * scale
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        if alibi_slopes is not None:
            assert alibi_slopes.dtype == torch.float32
            s = s - alibi_slopes[h].double() * (diagonal - cells).abs()
        weights = s.exp().masked_fill(~seen, 0.0)
        total = weights.sum(dim=1, keepdim=True)
        if s_aux is not None:
            total = total + s_aux[h].double().exp()
        o[:, h] = weights / total.clamp(min=1e-300) @ value
    return o.to(q.dtype)


def over_batch(q, k, v, **how):
    CALLS.append("batched")
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert q.shape[0] == k.shape[0] == v.shape[0]
    return torch.stack([one_sequence(q[b], k[b], v[b], **how) for b in range(q.shape[0])])


def over_pieces(q, k, v, cu_q, cu_k, max_q, max_k, **how):
    CALLS.append("ragged")
    for starts, packed, longest in ((cu_q, q, max_q), (cu_k, k, max_k)):
        assert starts.dtype == torch.int32
        assert int(starts[0]) == 0
        assert int(starts[-1]) == len(packed)
        assert int(starts.diff().max()) == longest
        assert int(starts.diff().min()) > 0
    bounds = zip(cu_q.tolist(), cu_q[1:].tolist(), cu_k.tolist(), cu_k[1:].tolist(), strict=False)
    return torch.cat([one_sequence(q[a:b], k[c:d], v[c:d], **how) for a, b, c, d in bounds])


def flash_attn() -> SimpleNamespace:
    """The module of flash_attn 2.6 and later."""

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        how = {"scale": softmax_scale, "causal": causal, "window_size": window_size}
        return over_batch(q, k, v, softcap=softcap, alibi_slopes=alibi_slopes, **how)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        how = {"scale": softmax_scale, "causal": causal, "window_size": window_size}
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return over_pieces(q, k, v, *lengths, softcap=softcap, alibi_slopes=alibi_slopes, **how)

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


def flash_attn_interface(*, early: bool = False) -> SimpleNamespace:
    """The module of flash_attn 3, from a build with sinks; an early one returns the log-sum-exp, too."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, s_aux=None):
        how = {"scale": softmax_scale, "causal": causal, "window_size": window_size}
        o = over_batch(q, k, v, softcap=softcap, s_aux=s_aux, **how)
        return (o, None) if early else o

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, s_aux=None,
    ):  # fmt: skip
        how = {"scale": softmax_scale, "causal": causal, "window_size": window_size}
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        o = over_pieces(q, k, v, *lengths, softcap=softcap, s_aux=s_aux, **how)
        return (o, None) if early else o

    return SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
