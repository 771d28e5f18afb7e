"""Attention by torch's scaled_dot_product_attention: what it can leave out of the mask is decided once a pass.

Grouped heads are never expanded. Where the kernel would repeat keys and values (torch's composite one does, which runs
for value heads of another size, and off the CPU in most cases with a mask), and where it is faster, the heads of a
group become further query rows of their key head: [B, H, T, D] is [B, K, G·T, D]. That is the same product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import InputError, UnsupportedRequestError

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts import AttentionRequest, AttentionSpec, KeyInfo, KVView

DTYPES = ("float32", "float64", "bfloat16", "float16")
VIEWS = ("dense", "paged", "quantized", "latent")


@dataclass(frozen=True, slots=True)
class SdpaMask:
    """What `prepare` decided for one pass.

    Attributes:
        start: the first key that any query sees; the ones before it are cut off.
        rows: G·T if heads are folded into query rows, 0 if not.
        causal: let the kernel hide later keys by shape.
        additive: 0 where a query looks and -inf where not, plus ALiBi; [b, 1 or H, T, S - start], or folded to
            [b, 1 or K, rows, S - start] unless the layer adds a bias of its own first. None: nothing is hidden.
        blind: [b, 1, T, 1], True where a query sees no key; None where that cannot be.
    """

    start: int = 0
    rows: int = 0
    causal: bool = False
    additive: Tensor | None = None
    blind: Tensor | None = None


class SdpaAttention:
    """One call of scaled_dot_product_attention a layer."""

    name = "sdpa"
    views: tuple[str, ...] = VIEWS

    def __init__(self, request: AttentionRequest) -> None:
        self._cpu = request.device.partition(":")[0] == "cpu"
        self._half = request.dtype in ("bfloat16", "float16")
        reasons = _request_refusals(request)
        reasons += [reason for spec in request.specs for reason in self.refusals(spec)]
        if reasons:
            raise UnsupportedRequestError(
                'attention "sdpa" cannot honour this request.', why="\n".join(dict.fromkeys(reasons)),
                fix='Choose attention="eager", which computes all of it.', reasons=tuple(dict.fromkeys(reasons)),
            )  # fmt: skip
        dtype = torch_dtype(request.dtype)
        # 0 and -inf are exact in every dtype. Biases are not: beside half precision they stay in float32.
        self._mask_dtype = dtype
        self._bias_dtype = torch.float32 if self._half else dtype
        every = {spec.alibi_slopes for spec in request.specs if spec.alibi_slopes is not None}
        self._slopes = {s: torch.tensor(s, dtype=self._bias_dtype, device=request.device) for s in every}

    def refusals(self, spec: AttentionSpec) -> Sequence[str]:
        """Every reason why torch's function cannot compute `spec`."""
        reasons = []
        if spec.softcap is not None:
            reasons.append(f"softcap {spec.softcap}: torch's function has no cap on scores")
        if spec.sinks:
            reasons.append("sinks: torch's function has no extra logit, and a zero key would copy the cache each token")
        if (spec.alibi_slopes is not None or spec.bias) and self._half and not self._cpu:
            reasons.append("ALiBi or a bias in half precision: off the CPU torch's function would round it")
        if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
            reasons.append(f"{spec.num_kv_heads} kv heads do not divide {spec.num_heads} heads")
        if spec.alibi_slopes is not None and len(spec.alibi_slopes) != spec.num_heads:
            reasons.append(f"{len(spec.alibi_slopes)} ALiBi slopes for {spec.num_heads} heads")
        return reasons

    def prepare(self, spec: AttentionSpec, q_positions: Tensor, keys: KeyInfo) -> SdpaMask | None:
        """Leave out what the shapes alone settle; write the rest as one additive mask. None: no mask, not folded."""
        T, S, m = q_positions.shape[1], keys.length, spec.mask
        start, rest = 0, "mask"
        at = 0 if keys.dense else keys.start  # position of the first key, where keys are consecutive
        if at is not None and keys.segments is None:
            if m.causal:
                # Consecutive keys: the queries are the last T cells, and none looks further back than the first one.
                start = max(0, _first_seen(spec, at + S - T) - at)
                if T == 1:
                    rest = "none"
                elif T == S and _first_seen(spec, at + S - 1) <= at and (not m.prefix or keys.prefix_lengths is None):
                    rest = "causal"
            elif m.window is None and m.chunk is None:
                rest = "none"
        if rest == "causal" and (spec.alibi_slopes is not None or spec.bias or self._expands(spec, causal=True)):
            rest = "mask"
        rows = T * (spec.num_heads // spec.num_kv_heads) if self._folds(spec, T, S - start, rest) else 0
        additive = blind = None
        if rest == "mask" or spec.alibi_slopes is not None:
            additive, blind = self._additive(spec, q_positions, keys, start)
            if rows and not spec.bias:
                additive = _fold(additive, spec, rows)
        if not (start or rows or spec.bias or rest != "none" or additive is not None):
            return None
        return SdpaMask(start, rows, rest == "causal", additive, blind)

    def attend(
        self, q: Tensor, view: KVView, spec: AttentionSpec, mask: SdpaMask | None,
        *, sinks: Tensor | None = None, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `AttentionBackend.attend`. Raises: InputError if the spec has a bias and none is given."""
        k, v = view.dense()
        if mask is None:  # a decode step; nothing is looked up here that it does not need
            grouped = spec.num_heads != spec.num_kv_heads
            return scaled_dot_product_attention(q, k, v, scale=spec.scale, enable_gqa=grouped)
        H, K = spec.num_heads, spec.num_kv_heads
        if mask.start:
            k, v = k[:, :, mask.start :], v[:, :, mask.start :]
        additive = self._with_bias(mask, spec, bias) if spec.bias else mask.additive
        if mask.rows:
            folded = q.reshape(-1, K, mask.rows, spec.head_dim)  # [B, K, G·T, D]
            o = scaled_dot_product_attention(folded, k, v, additive, scale=spec.scale)
            o = o.reshape(-1, H, mask.rows * K // H, spec.v_head_dim)  # [B, H, T, Dv]
        else:
            o = scaled_dot_product_attention(
                q, k, v, additive, is_causal=mask.causal, scale=spec.scale, enable_gqa=K != H
            )
        return o if mask.blind is None else o.masked_fill(mask.blind, 0.0)

    def _folds(self, spec: AttentionSpec, T: int, S: int, rest: str) -> bool:
        """Whether heads become query rows. Measured on two CPU cores, see the README."""
        if spec.num_heads == spec.num_kv_heads or rest == "causal":
            return False
        return self._expands(spec, causal=False) or (T <= 16 and (self._half or S >= 64))

    def _expands(self, spec: AttentionSpec, *, causal: bool) -> bool:
        """Whether torch would repeat the keys of grouped heads."""
        if spec.num_heads == spec.num_kv_heads:
            return False
        fused = self._cpu or (causal and self._half)  # flash attention, the only fused kernel that groups by itself
        return not fused or spec.head_dim != spec.v_head_dim

    def _additive(
        self, spec: AttentionSpec, q_positions: Tensor, keys: KeyInfo, start: int
    ) -> tuple[Tensor, Tensor | None]:
        """The mask as `SdpaMask.additive` says, not folded, and its blind queries."""
        k_positions = keys.positions[:, start:]
        visible = spec.mask.visible(q_positions, keys, start=start)[:, None]  # [b, 1, T, S]
        if spec.alibi_slopes is not None:
            slopes = self._slopes[spec.alibi_slopes].view(1, -1, 1, 1)
            additive = -slopes * (q_positions[:, None, :, None] - k_positions[:, None, None, :])  # [b, H, T, S]
        else:
            dtype = self._bias_dtype if spec.bias else self._mask_dtype
            additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        # Of consecutive keys a causal query sees itself; nothing else is known without asking the device.
        sure = (keys.dense or keys.start is not None) and spec.mask.causal and keys.segments is None
        return additive.masked_fill(~visible, float("-inf")), None if sure else ~visible.any(dim=-1, keepdim=True)

    def _with_bias(self, mask: SdpaMask, spec: AttentionSpec, bias: Tensor | None) -> Tensor:
        """The layer's bias and the mask in one additive tensor."""
        if bias is None:
            raise InputError(
                "attend was called without bias.", why="the layer's spec says that it has one.",
                fix="Pass bias= from the layer.", argument="bias",
            )  # fmt: skip
        additive = bias[..., mask.start :].to(self._bias_dtype)
        if mask.additive is not None:
            additive = additive + mask.additive
        return _fold(additive, spec, mask.rows) if mask.rows else additive


def _first_seen(spec: AttentionSpec, position: int) -> int:
    """The first position that a causal query at `position` may see."""
    window, chunk = spec.mask.window, spec.mask.chunk
    by_window = 0 if window is None else max(0, position - window + 1)
    return max(by_window, 0 if chunk is None else position // chunk * chunk)


def _fold(additive: Tensor, spec: AttentionSpec, rows: int) -> Tensor:
    """[b, H, T, S] -> [b, K, G·T, S]; a mask that all heads share, [b, 1, T, S] -> [b, 1, 1 or G·T, S]."""
    b, heads, T, S = additive.shape
    if heads > 1:
        return additive.reshape(b, spec.num_kv_heads, rows, S)
    return additive if T == 1 else additive.repeat(1, 1, rows // T, 1)


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
