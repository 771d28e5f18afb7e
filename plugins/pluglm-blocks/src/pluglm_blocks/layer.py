"""One layer: residual branches, each the sum of its parts, bound once so that a pass looks nothing up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pluglm.contracts import Branch
from pluglm.contracts import Layer as LayerProgram
from pluglm_blocks.norm import build_norm

if TYPE_CHECKING:
    from pluglm_blocks.context import BuildContext
    from pluglm_blocks.pass_state import PassState


@dataclass(frozen=True, slots=True)
class _BoundPart:
    """A part's modules and factors; None for what does nothing."""

    op: nn.Module
    norm_in: nn.Module | None
    norm_out: nn.Module | None
    scale_in: float | None
    scale_out: float | None
    share_norm_in: bool


class Layer(nn.Module):
    """x = x + scale * sum(scale_out * norm_out(op(scale_in * norm_in(x))) for each part), branch after branch.

    Parameters: `<part>.…`, `<part>_norm_in.…`, `<part>_norm_out.…`. A submodule may be replaced by assignment.
    """

    def __init__(self, layer: LayerProgram, context: BuildContext) -> None:
        super().__init__()
        self._branches = layer.branches
        self._read_as = context.dtype if context.program.float32_residual else None
        self._bound: tuple[tuple[float | None, tuple[_BoundPart, ...]], ...] = ()
        for part in (part for branch in layer.branches for part in branch.parts):
            if part.norm_in is not None:
                self.add_module(f"{part.name}_norm_in", build_norm(part.norm_in, context.kernels, context.dtype))
            self.add_module(part.name, context.build(part.op))
            if part.norm_out is not None:
                self.add_module(f"{part.name}_norm_out", build_norm(part.norm_out, context.kernels, context.dtype))

    def forward(self, x: Tensor, state: PassState) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        for scale, parts in self._bound or self._bind():
            total: Tensor | None = None
            residual, x = x, x if self._read_as is None else x.to(self._read_as)
            first = x  # what the first part reads
            for part in parts:
                if part.share_norm_in:
                    h = first
                else:
                    h = x if part.norm_in is None else part.norm_in(x)
                    first = h if total is None else first
                if part.scale_in is not None:
                    h = h * part.scale_in
                h = part.op(h, state)
                if part.norm_out is not None:
                    h = part.norm_out(h)
                if part.scale_out is not None:
                    h = h * part.scale_out
                total = h if total is None else total + h
            assert total is not None  # a branch has parts: checked at build
            x = residual + total if scale is None else residual + total * scale
        return x

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self._bound = ()  # a replaced part must not live on in what was bound

    def _bind(self) -> tuple[tuple[float | None, tuple[_BoundPart, ...]], ...]:
        self._bound = tuple((_unless_one(branch.scale), self._bind_parts(branch)) for branch in self._branches)
        return self._bound

    def _bind_parts(self, branch: Branch) -> tuple[_BoundPart, ...]:
        return tuple(
            _BoundPart(
                op=getattr(self, part.name),
                norm_in=getattr(self, f"{part.name}_norm_in", None),
                norm_out=getattr(self, f"{part.name}_norm_out", None),
                scale_in=_unless_one(part.scale_in),
                scale_out=_unless_one(part.scale_out),
                share_norm_in=part.share_norm_in,
            )
            for part in branch.parts
        )


def _unless_one(scale: float) -> float | None:
    return None if scale == 1.0 else scale
