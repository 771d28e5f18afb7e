"""Views: keys and values as a layout stores them, handed to attention with the positions they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class KeyInfo:
    """What the keys that one slot hands out in one forward pass are, in the order of the view.

    Attributes:
        positions: [B, S] or [1, S] int64 absolute positions; negative: padding or a hole.
        length: S.
        dense: known on the host, without asking the device: cell j holds position j in every row, no padding, no holes
            and, under a causal mask, the queries are the last T cells (so it can be aligned by shape alone).
        start: the same for keys from a later cell on: cell j holds position start + j in every row. None: not known.
            `dense` is start == 0; a layout that has dropped old keys says start > 0 and not dense.
        prefix_lengths: [B] int64, how many leading positions form a prefix (prefix language models). None: none.
        segments: [B, S] int64, keys of another segment than the query's are not seen (packed sequences). None: one.
        q_segments: [B, T] int64, the queries' segments; given with `segments`.
    """

    positions: Tensor
    length: int
    dense: bool
    prefix_lengths: Tensor | None = None
    segments: Tensor | None = None
    q_segments: Tensor | None = None
    start: int | None = None


@runtime_checkable
class KVView(Protocol):
    """Keys and values as a layout stores them. `kind` says which class it is; a backend reads the kinds it declares.

    Storage that a view covers is finite everywhere, also in cells that are masked: 0 * NaN is NaN in every kernel.
    """

    @property
    def kind(self) -> str:
        """The class of view, as backends declare it: "dense", "paged", "quantized", "latent"."""
        ...

    def dense(self) -> tuple[Tensor, Tensor]:
        """k [B, K, S, D] and v [B, K, S, Dv] in the compute dtype, materialised if they are stored otherwise."""
        ...


@dataclass(slots=True)
class DenseView:
    """Plain tensors. k: [B, K, S, D]; v: [B, K, S, Dv]; may be strided views of a larger buffer.

    Made once a layer and token: not frozen, since that takes four times as long to make.
    """

    k: Tensor
    v: Tensor
    kind: ClassVar[str] = "dense"

    def dense(self) -> tuple[Tensor, Tensor]:
        """The tensors themselves."""
        return self.k, self.v


@dataclass(frozen=True)
class PagedView:
    """Keys and values in fixed-size pages (Kwon et al. 2023, "PagedAttention", section 4.1).

    k_pages: [P, page_size, K, D]; v_pages: [P, page_size, K, Dv]; block_table: [B, N] int32 page numbers, in order;
    lengths: [B] int32 tokens held by each row; length: cells of the longest. Cell j of row b is entry j % page_size of
    page block_table[b, j // page_size].
    """

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    lengths: Tensor
    length: int
    kind: Literal["paged"] = "paged"

    def dense(self) -> tuple[Tensor, Tensor]:
        """Gather the pages of every row. Cells past a row's length hold what their page holds: mask them."""

        def gather(pages: Tensor) -> Tensor:
            rows = pages[self.block_table.long()]  # [B, N, page, K, D]
            return rows.flatten(1, 2)[:, : self.length].transpose(1, 2)  # [B, K, S, D]

        return gather(self.k_pages), gather(self.v_pages)


@dataclass(frozen=True)
class QuantizedView:
    """Packed blocks and a residual of recent tokens in full precision (Liu et al. 2024, "KIVI", section 3.2).

    blocks: the layout's own packed form. residual: the tail, dense. unpack: blocks -> dense k and v.
    """

    blocks: Any
    residual: DenseView
    unpack: Any
    kind: Literal["quantized"] = "quantized"

    def dense(self) -> tuple[Tensor, Tensor]:
        """Unpack every block and append the residual."""
        import torch

        k, v = self.unpack(self.blocks)
        return torch.cat((k, self.residual.k), dim=2), torch.cat((v, self.residual.v), dim=2)


@dataclass(frozen=True)
class LatentView:
    """Compressed tokens. latent: [B, S, latent_dim]; rope: [B, S, rope_dim]. Only latent attention reads it."""

    latent: Tensor
    rope: Tensor
    kind: Literal["latent"] = "latent"

    def dense(self) -> tuple[Tensor, Tensor]:
        """k = (latent, rope) and v = latent as one head, [B, 1, S, ·]: what absorbed queries attend to.

        Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.2 (the up-projections are absorbed into q and the output).
        """
        import torch

        return torch.cat((self.latent, self.rope), dim=-1)[:, None], self.latent[:, None]
