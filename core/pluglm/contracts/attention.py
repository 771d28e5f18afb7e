"""What an attention layer asks for, and the backend that computes it: mask and product in one object.

A mask is described, never passed around as a matrix. Who may see whom follows from three things: the positions of
the queries, the positions of the keys that the cache hands out (a negative position is padding or a hole), and the
layer's `MaskSpec`. A backend turns that into whatever its kernel wants, once a forward pass for each distinct spec,
or refuses while the plan is made. So a mask cannot be forgotten, and a layout that stores keys out of order (a ring,
pages, a sink and a window) needs no rule of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts.views import KeyInfo, KVView


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query may see. All conditions hold together; padding and holes (position < 0) are never seen.

    Attributes:
        causal: a key at a later position is not seen.
        window: sliding window: only keys with `q_position - k_position < window`. None: no limit.
            (Beltagy et al. 2020, "Longformer", section 3.1; counted as in Mistral: the window includes the query.)
        chunk: only keys of the same chunk, `k_position // chunk == q_position // chunk` (Llama 4). None: no limit.
        prefix: keys of the row's prefix (`KeyInfo.prefix_lengths`) are seen by every query of the prefix as well:
            a prefix language model (Raffel et al. 2020, "T5", section 3.2.1).
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    prefix: bool = False

    def visible(self, q_positions: Tensor, keys: KeyInfo, *, start: int = 0) -> Tensor:
        """The meaning of a description: whether each query sees each key. For backends that want a matrix.

        Args:
            q_positions: [B or 1, T]. keys: as in `AttentionBackend.prepare`.
            start: leave out the keys before this one.
        Returns: [B or 1, T, S - start] bool. Padding sees nothing and is not seen.
        """
        q, k = q_positions[:, :, None], keys.positions[:, None, start:]
        seen = (q >= 0) & (k >= 0)
        if self.causal:
            earlier = k <= q
            if self.prefix and keys.prefix_lengths is not None:
                length = keys.prefix_lengths[:, None, None]
                earlier = earlier | ((q < length) & (k < length))
            seen = seen & earlier
        if self.window is not None:
            seen = seen & (q - k < self.window)
        if self.chunk is not None:
            seen = seen & (q // self.chunk == k // self.chunk)
        if keys.segments is not None and keys.q_segments is not None:
            seen = seen & (keys.q_segments[:, :, None] == keys.segments[:, None, start:])
        return seen


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer's arithmetic, without its weights. Equal specs share one prepared mask.

    The order is: scale, soft cap, ALiBi and bias, mask, softmax (with sinks), values.

    Attributes:
        num_heads: H. num_kv_heads: K, divides H (Ainslie et al. 2023, "GQA").
        head_dim: D of queries and keys. v_head_dim: size of a value head (differs from D in latent attention).
        scale: factor on q·k before anything else.
        mask: who may see whom.
        softcap: s -> softcap * tanh(s / softcap) on scaled scores (Gemma 2, section 2). None: off.
        sinks: one learned logit a head joins the softmax and is dropped after it (gpt-oss); comes as `sinks=[H]`.
        alibi_slopes: one a head; adds -slope * (q_position - k_position) (Press et al. 2022, "ALiBi"). None: off.
        bias: a tensor [1 or B, H, T, S] is added to the scaled scores (T5's relative buckets); comes as `bias=`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    mask: MaskSpec = MaskSpec()
    softcap: float | None = None
    sinks: bool = False
    alibi_slopes: tuple[float, ...] | None = None
    bias: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """What a backend must offer for this layer, in the words of `pluglm.json`."""
        wanted = {
            "grouped-heads": self.num_kv_heads != self.num_heads,
            "value-head-dim": self.v_head_dim != self.head_dim,
            "bidirectional": not self.mask.causal,
            "window": self.mask.window is not None,
            "chunk": self.mask.chunk is not None,
            "prefix": self.mask.prefix,
            "softcap": self.softcap is not None,
            "sinks": self.sinks,
            "alibi": self.alibi_slopes is not None,
            "bias": self.bias,
        }
        return tuple(name for name, needed in wanted.items() if needed)


@dataclass(frozen=True)
class AttentionRequest:
    """What the planner asks an attention provider to build for one model.

    Attributes:
        specs: every distinct spec of the model's layers.
        device: torch device string. dtype: of q, k and v, torch name without "torch." ("bfloat16").
        views: KV views that the chosen cache layout gives, best first.
        variant: what the user wrote after the colon ("flash:3"), or None.
        options: keyword options from the user; an unknown one must be refused.
    """

    specs: tuple[AttentionSpec, ...]
    device: str
    dtype: str
    views: tuple[str, ...] = ("dense",)
    variant: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


@runtime_checkable
class AttentionBackend(Protocol):
    """Computes attention. Stateless between calls; one object serves all layers of a model.

    `prepare` runs once a forward pass for each distinct (spec, cache layer group), `attend` once a layer.
    """

    @property
    def name(self) -> str:
        """The provider's short name."""
        ...

    @property
    def views(self) -> tuple[str, ...]:
        """Kinds of KV view (`KVView.kind`) it reads, best first."""
        ...

    def refusals(self, spec: AttentionSpec) -> Sequence[str]:
        """Every reason why this backend cannot honour `spec` on its device and dtype; empty: it can."""
        ...

    def prepare(self, spec: AttentionSpec, q_positions: Tensor, keys: KeyInfo) -> Any:
        """Build this forward pass's mask in the form the kernel wants.

        Args:
            q_positions: [B, T] int64, absolute; negative: padding. A row of B=1 serves all rows.
            keys: what the cache says of the keys that `attend` will be given in this pass.
        Returns: an object only this backend understands; None may mean "no mask needed".
        """
        ...

    def attend(
        self,
        q: Tensor,
        view: KVView,
        spec: AttentionSpec,
        mask: Any,
        *,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend from the new queries to every key of the view.

        Args:
            q: [B, H, T, D].
            view: keys and values, [B, K, S, D] and [B, K, S, Dv] in a dense view.
            mask: what `prepare` returned for this spec in this pass.
            sinks: [H] if `spec.sinks`. bias: [1 or B, H, T, S] if `spec.bias`.
        Returns: [B, H, T, Dv] in q's dtype. A query that sees no key gives zeros, never NaN; what a padding query
                gives is not used, but finite.
        """
        ...
