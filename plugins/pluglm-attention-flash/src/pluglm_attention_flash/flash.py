"""FlashAttention as a backend: plain batches in one call, ragged ones packed, so that padding costs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pluglm.errors import InputError, UnsupportedRequestError
from pluglm_attention_flash.kernels import Finder, How, Kernel
from pluglm_attention_flash.ragged import Pieces, cut

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts import AttentionRequest, AttentionSpec, KeyInfo, KVView

VIEWS = ("dense", "paged", "quantized")
MAX_HEAD_DIM = 256
LACKS = {
    "prefix": "the kernels hide later keys from all queries of a row or from none",
    "bias": "the kernels add no tensor to the scores",
    "value-head-dim": "the kernels take values of the keys' size",
}


class FlashAttention:
    """One call of a kernel a layer."""

    views: tuple[str, ...] = VIEWS

    def __init__(self, request: AttentionRequest, kernel: Kernel) -> None:
        """Raises: UnsupportedRequestError with every reason if `kernel` cannot honour `request`."""
        self._kernel = kernel
        self.name = kernel.owner
        reasons = _request_refusals(request, kernel)
        reasons += [reason for spec in request.specs for reason in self.refusals(spec)]
        if reasons:
            raise _refused(f'attention "{kernel.label}"', reasons)
        every = {spec.alibi_slopes for spec in request.specs if spec.alibi_slopes is not None}
        self._slopes = {s: torch.tensor(s, dtype=torch.float32, device=request.device) for s in every}

    def refusals(self, spec: AttentionSpec) -> Sequence[str]:
        """Every reason why the kernel cannot compute `spec`."""
        label, offered = self._kernel.label, self._kernel.features
        reasons = [
            f"{name}: {LACKS.get(name, f'{label} has no such thing')}" for name in spec.features if name not in offered
        ]
        if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 8:
            reasons.append(f"head_dim {spec.head_dim}: the kernels take multiples of 8 up to {MAX_HEAD_DIM}")
        if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
            reasons.append(f"{spec.num_kv_heads} kv heads do not divide {spec.num_heads} heads")
        if spec.alibi_slopes is not None:
            if len(spec.alibi_slopes) != spec.num_heads:
                reasons.append(f"{len(spec.alibi_slopes)} ALiBi slopes for {spec.num_heads} heads")
            if not spec.mask.causal:
                reasons.append("alibi on later keys: the kernels lower their scores where the spec raises them")
            if spec.sinks:
                reasons.append(
                    "alibi with sinks: the kernels' ALiBi is right up to a constant, which a sink would show"
                )
        return reasons

    def prepare(self, spec: AttentionSpec, q_positions: Tensor, keys: KeyInfo) -> Pieces | int:
        """The pieces of a ragged pass; for a plain batch, the first key that any query sees.

        Raises: UnsupportedRequestError for positions that the kernels cannot count: ALiBi over keys with gaps between
            their positions, a window over a row that holds a position twice.
        """
        m, T = spec.mask, q_positions.shape[1]
        if keys.dense and keys.segments is None:
            if m.causal and (m.chunk is None or T == 1):
                return 0 if m.chunk is None else (keys.length - 1) // m.chunk * m.chunk
            if not m.causal and m.window is None and m.chunk is None:
                return 0
        pieces = cut(m, q_positions, keys)
        if pieces.gaps and spec.alibi_slopes is not None:
            raise _refused(
                f'attention "{self.name}" with ALiBi',
                ["alibi beside holes: the kernels count cells, and the keys of a row skip a position"],
            )
        if pieces.repeats and m.causal:
            raise _refused(
                f'attention "{self.name}" with a window',
                ["window over repeated positions: the kernels count cells, and a row holds a position twice"],
            )
        return pieces

    def attend(
        self, q: Tensor, view: KVView, spec: AttentionSpec, mask: Pieces | int,
        *, sinks: Tensor | None = None, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """As `AttentionBackend.attend`. Raises: InputError if the spec has sinks and none are given."""
        k, v = view.dense()
        how = self._how(spec, sinks if sinks is None else sinks.to(q.dtype))  # the kernels take no other
        if isinstance(mask, int):
            # Transposed, not copied: the kernels read any strides but the last.
            queries, seen_k, seen_v = (x.transpose(1, 2) for x in (q, k[:, :, mask:], v[:, :, mask:]))
            return self._kernel.batched(queries, seen_k, seen_v, how).transpose(1, 2)  # [B, H, T, D]
        pieces = mask.for_batch(q.shape[0])
        o = q.new_zeros(q.shape[0], q.shape[2], spec.num_heads, spec.v_head_dim)  # [B, T, H, D]
        if pieces.lengths:
            packed_k, packed_v = (x[pieces.k_rows, :, pieces.k_cells] for x in (k, v))  # [M, K, D]
            packed_q = q[pieces.q_rows, :, pieces.q_cells]  # [N, H, D]
            o[pieces.q_rows, pieces.q_cells] = self._kernel.ragged(packed_q, packed_k, packed_v, pieces, how)
        return o.transpose(1, 2)

    def _how(self, spec: AttentionSpec, sinks: Tensor | None) -> How:
        m = spec.mask
        if spec.sinks and sinks is None:
            raise InputError(
                "attend was called without sinks.", why="the layer's spec says that it has sinks.",
                fix="Pass sinks= from the layer.", argument="sinks",
            )  # fmt: skip
        return How(
            scale=spec.scale, causal=m.causal,
            # The spec's window counts the query itself, the kernels' only the keys before it. Without a causal mask
            # the pieces hold the window's keys and no others.
            window=m.window - 1 if m.window is not None and m.causal else -1,
            softcap=spec.softcap or 0.0,
            slopes=None if spec.alibi_slopes is None else self._slopes[spec.alibi_slopes],
            sinks=sinks if spec.sinks else None,
        )  # fmt: skip


def build(request: AttentionRequest, finders: Mapping[str, Finder], owner: str = "flash") -> FlashAttention:
    """The variant that the request names, or the first one that is here and honours it.

    Args:
        finders: looks for each variant's kernel, best first; a provider without variants has one, called "".
        owner: the provider's name.
    Raises: UnsupportedRequestError with every reason; for a plain "flash", with those of every variant.
    """

    def said(variant: str, reason: str) -> str:
        return f"{owner}:{variant}: {reason}" if variant else reason

    if request.variant is not None:
        if request.variant not in finders or request.variant == "":
            have = ", ".join(filter(None, finders)) or "none"
            raise _refused(f'attention "{owner}"', [f"it has no variant {request.variant!r}; it has {have}"])
        found = finders[request.variant](request.device)
        if isinstance(found, str):
            raise _refused(f'attention "{owner}:{request.variant}"', [found])
        return FlashAttention(request, replace(found, owner=owner))
    reasons = []
    for variant, find in finders.items():
        found = find(request.device)
        if isinstance(found, str):
            reasons.append(said(variant, found))
            continue
        try:
            return FlashAttention(request, replace(found, owner=owner, variant=variant and found.variant))
        except UnsupportedRequestError as e:
            reasons += [said(variant, reason) for reason in e.reasons]
    raise _refused(f'attention "{owner}"', reasons)


def _request_refusals(request: AttentionRequest, kernel: Kernel) -> list[str]:
    reasons = []
    if request.dtype not in kernel.dtypes:
        reasons.append(f"dtype {request.dtype} is not one of {', '.join(kernel.dtypes)}")
    if not set(VIEWS) & set(request.views):
        reasons.append(f"it reads {', '.join(VIEWS)} views, and the cache gives {', '.join(request.views) or 'none'}")
    reasons += [f"it has no option {name!r}" for name, _ in request.options]
    return reasons


def _refused(who: str, reasons: Sequence[str]) -> UnsupportedRequestError:
    reasons = tuple(dict.fromkeys(reasons))
    return UnsupportedRequestError(
        f"{who} cannot honour this request.", why="\n".join(reasons),
        fix='Drop what it refuses, or choose attention="sdpa" or "eager".', reasons=reasons,
    )  # fmt: skip
