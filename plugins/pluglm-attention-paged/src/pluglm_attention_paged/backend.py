"""The backend: what it refuses, what the queries of a pass see, and which of two ways computes a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pluglm.contracts import DenseView, PagedView
from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm_attention_paged import native, online

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts import AttentionRequest, AttentionSpec, KeyInfo, KVView

DTYPES = ("float32", "float64", "bfloat16", "float16")
VIEWS = ("paged", "dense", "quantized", "latent")
VARIANTS = ("torch", "native")
#: Queries of a row up to which the library computes a call. More are a prompt: matrix products, torch's strength.
MOST_QUERIES = 16


@dataclass(frozen=True, slots=True)
class PagedMask:
    """What `prepare` found out for one pass.

    Attributes:
        start: the first key that any query sees. visible: [b, T, S] bool; None: all from `start` on.
        q_positions: [b, T] and k_positions: [b, S], int64, for ALiBi; None without it.
    """

    start: int
    visible: Tensor | None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None


class PagedAttention:
    """Attention over block tables: decode steps by the library if there is one, everything else by torch."""

    name = "paged"
    views: tuple[str, ...] = VIEWS

    def __init__(self, request: AttentionRequest) -> None:
        reasons = _request_refusals(request)
        reasons += [reason for spec in request.specs for reason in self.refusals(spec)]
        if reasons:
            raise UnsupportedRequestError(
                'attention "paged" cannot honour this request.', why="\n".join(dict.fromkeys(reasons)),
                fix="Drop what it refuses, or name another attention.", reasons=tuple(dict.fromkeys(reasons)),
            )  # fmt: skip
        self._compute = torch.float64 if torch_dtype(request.dtype) == torch.float64 else torch.float32
        native_fits = not native.misfits(request.device, request.dtype)
        self._library = native.library() if request.variant != "torch" and native_fits else None
        every = {spec.alibi_slopes for spec in request.specs if spec.alibi_slopes is not None}
        self._slopes = {s: torch.tensor(s, dtype=self._compute, device=request.device) for s in every}

    @property
    def uses_library(self) -> bool:
        """Whether decode steps are computed by the compiled library."""
        return self._library is not None

    def refusals(self, spec: AttentionSpec) -> Sequence[str]:
        """Only a spec that contradicts itself is refused."""
        reasons = []
        if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
            reasons.append(f"{spec.num_kv_heads} kv heads do not divide {spec.num_heads} heads")
        if spec.alibi_slopes is not None and len(spec.alibi_slopes) != spec.num_heads:
            reasons.append(f"{len(spec.alibi_slopes)} ALiBi slopes for {spec.num_heads} heads")
        return reasons

    def prepare(self, spec: AttentionSpec, q_positions: Tensor, keys: KeyInfo) -> PagedMask:
        """Compare every query's position with every key's, unless shapes alone settle who sees what."""
        T, S, mask = q_positions.shape[1], keys.length, spec.mask
        at = 0 if keys.dense else keys.start  # position of the first key, where keys are consecutive
        start, all_seen = 0, False
        if at is not None and keys.segments is None:
            if mask.causal:  # the queries are the last T cells, and none looks further back than the first one
                start = max(0, _first_seen(spec, at + S - T) - at)
                all_seen = T == 1
            else:
                all_seen = mask.window is None and mask.chunk is None
        visible = None if all_seen else mask.visible(q_positions, keys)
        if spec.alibi_slopes is None:
            return PagedMask(start, visible)
        return PagedMask(start, visible, q_positions, keys.positions)

    def attend(
        self, q: Tensor, view: KVView, spec: AttentionSpec, mask: PagedMask,
        *, sinks: Tensor | None = None, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `AttentionBackend.attend`. Raises: InputError if the spec has sinks or a bias and none is given."""
        kv = view if isinstance(view, PagedView | DenseView) else DenseView(*view.dense())
        sinks = _given(sinks, "sinks") if spec.sinks else None
        bias = _given(bias, "bias") if spec.bias else None
        slopes = None if spec.alibi_slopes is None else self._slopes[spec.alibi_slopes]
        more = online.Extras(sinks, bias, slopes, mask.q_positions, mask.k_positions)
        if self._library is not None and q.shape[2] <= MOST_QUERIES and not _needs_grad(q, kv, sinks, bias):
            return self._library.attend(q, kv, spec, mask.start, mask.visible, more)
        return online.attend(q, kv, spec, mask.start, mask.visible, more, compute=self._compute)


def _needs_grad(q: Tensor, view: PagedView | DenseView, *others: Tensor | None) -> bool:
    """Whether autograd must follow: the library computes numbers only."""
    if not torch.is_grad_enabled():
        return False
    kv = (view.k_pages, view.v_pages) if isinstance(view, PagedView) else (view.k, view.v)
    return any(tensor is not None and tensor.requires_grad for tensor in (q, *kv, *others))


def _first_seen(spec: AttentionSpec, position: int) -> int:
    """The first position that a causal query at `position` may see."""
    window, chunk = spec.mask.window, spec.mask.chunk
    by_window = 0 if window is None else max(0, position - window + 1)
    return max(by_window, 0 if chunk is None else position // chunk * chunk)


def _request_refusals(request: AttentionRequest) -> list[str]:
    reasons = []
    if request.dtype not in DTYPES:
        reasons.append(f"dtype {request.dtype} is not one of {', '.join(DTYPES)}")
    if not set(VIEWS) & set(request.views):
        reasons.append(f"it reads {', '.join(VIEWS)} views, and the cache gives {', '.join(request.views) or 'none'}")
    if request.variant == "native":
        reasons += native.misfits(request.device, request.dtype)
        if native.library() is None:
            reasons.append(native.MISSING)
    elif request.variant is not None and request.variant not in VARIANTS:
        reasons.append(f"its variants are {', '.join(VARIANTS)}, and {request.variant!r} was asked for")
    return reasons + [f"it has no option {name!r}" for name, _ in request.options]


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise InputError(
            f"attend was called without {name}.", why=f"the layer's spec says that it has {name}.",
            fix=f"Pass {name}= from the layer.", argument=name,
        )  # fmt: skip
    return tensor
