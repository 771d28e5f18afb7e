"""Weight maps: how a checkpoint's tensors become a module's parameters, and the way back.

A map is a table of rules that reads both ways, so that what was loaded can be saved in the layout it came from. Every
tensor of a checkpoint is accounted for: named by a rule, or ignored on purpose with a reason, or the load is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Transform(Protocol):
    """Turns a rule's source tensors into its target tensors. Both directions are exact."""

    def apply(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """Checkpoint order -> module order."""
        ...

    def invert(self, targets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Module order -> checkpoint order."""
        ...

    def shapes(self, sources: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """What `apply` does to shapes, so that a mismatch is found before a byte is read."""
        ...


@dataclass(frozen=True)
class Split:
    """One tensor -> several along `dim` (fused qkv, fused gate and up)."""

    sizes: tuple[int, ...]
    dim: int = 0

    def apply(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """Views of the source; nothing is copied."""
        (tensor,) = sources
        import torch

        return torch.split(tensor, list(self.sizes), dim=self.dim)

    def invert(self, targets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Concatenate."""
        import torch

        return (torch.cat(list(targets), dim=self.dim),)

    def shapes(self, sources: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """Raises ValueError if the sizes do not add up to the source's."""
        (shape,) = sources
        if not -len(shape) <= self.dim < len(shape):
            raise ValueError(f"there is no dimension {self.dim} to split")
        at = self.dim % len(shape)
        if shape[at] != sum(self.sizes):
            raise ValueError(f"dimension {self.dim} is {shape[at]}, the parts {self.sizes} need {sum(self.sizes)}")
        return [(*shape[:at], size, *shape[at + 1 :]) for size in self.sizes]


@dataclass(frozen=True)
class SplitGroups:
    """One tensor whose `dim` is dealt out in groups -> several, each with its share of every group.

    `[..., groups * sum(sizes), ...]` holds, group after group, `sizes[0]` rows of the first part, `sizes[1]` of the
    second, and so on: q, k and v of each head (BLOOM: `(H, (D, D, D))`), the queries of a group with their key and
    value (Falcon: `(K, (G * D, D, D))`), gate and up in turns (gpt-oss: `(F, (1, 1))`).
    """

    groups: int
    sizes: tuple[int, ...]
    dim: int = 0

    def apply(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """A group's rows become neighbours of the next group's: copies, but for parts of one row a group, as views."""
        (tensor,) = sources
        import torch

        at = self.dim % tensor.ndim
        dealt = tensor.reshape(*tensor.shape[:at], self.groups, sum(self.sizes), *tensor.shape[at + 1 :])
        return [part.flatten(at, at + 1) for part in torch.split(dealt, list(self.sizes), dim=at + 1)]

    def invert(self, targets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Deal the parts back into their groups."""
        import torch

        at = self.dim % targets[0].ndim
        parts = [
            part.reshape(*part.shape[:at], self.groups, size, *part.shape[at + 1 :])
            for part, size in zip(targets, self.sizes, strict=True)
        ]
        return (torch.cat(parts, dim=at + 1).flatten(at, at + 1),)

    def shapes(self, sources: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """Raises ValueError if the groups do not add up to the source's."""
        return Split(tuple(self.groups * size for size in self.sizes), self.dim).shapes(sources)


@dataclass(frozen=True)
class Transpose:
    """The last two dimensions exchanged (GPT-2 stores [in, out], gpt-oss [E, in, out])."""

    def apply(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """[..., in, out] -> [..., out, in]. Copies: on a CPU, 16-bit products over a view took 20 times as long."""
        return [tensor.mT.contiguous() for tensor in sources]

    def invert(self, targets: Sequence[Tensor]) -> Sequence[Tensor]:
        """[..., out, in] -> [..., in, out]."""
        return [tensor.mT for tensor in targets]

    def shapes(self, sources: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """Raises ValueError for what is not a matrix, or several."""
        if any(len(shape) < 2 for shape in sources):
            raise ValueError(f"only matrices can be transposed, found shapes {list(sources)}")
        return [(*shape[:-2], shape[-1], shape[-2]) for shape in sources]


@dataclass(frozen=True)
class Stack:
    """Several tensors of one shape -> one with a new first dimension (a list of experts)."""

    def apply(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """n of [...] -> [n, ...]."""
        import torch

        return (torch.stack(list(sources)),)

    def invert(self, targets: Sequence[Tensor]) -> Sequence[Tensor]:
        """[n, ...] -> n of [...]."""
        (tensor,) = targets
        return tensor.unbind(0)

    def shapes(self, sources: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """Raises ValueError if the shapes differ."""
        if len(set(sources)) != 1:
            raise ValueError(f"tensors of different shapes cannot be stacked: {sorted(set(sources))}")
        return [(len(sources), *sources[0])]


@dataclass(frozen=True)
class Chain:
    """Transforms one after another."""

    steps: tuple[Transform, ...]

    def apply(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """First step first."""
        for step in self.steps:
            sources = step.apply(sources)
        return sources

    def invert(self, targets: Sequence[Tensor]) -> Sequence[Tensor]:
        """Last step first."""
        for step in reversed(self.steps):
            targets = step.invert(targets)
        return targets

    def shapes(self, sources: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """First step first."""
        for step in self.steps:
            sources = step.shapes(sources)
        return sources


@dataclass(frozen=True)
class WeightRule:
    """Named tensors of the checkpoint -> named parameters of the module.

    Attributes:
        sources: whole names in the checkpoint. targets: whole names in the module.
        transform: between them; None: one to one, unchanged.
        optional: the checkpoint may lack the sources, all of them together (a tied head that some files repeat); the
            target need not be a parameter.
        tied_to: with `optional`: when the sources are there, they must equal this parameter.
        layout: one of several ways in which publishers store the same parameters (experts one by one, or fused). Of the
            layouts that a map names, a file is read in the one that most of its tensors belong to, and written in the
            first; a rule without one is of every layout.
        dtype: of the targets, where the model's would lose what matters (a router's correction: "float32").
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform | None = None
    optional: bool = False
    tied_to: str | None = None
    layout: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class WeightMap:
    """All rules of one model, and what is ignored on purpose.

    Attributes:
        ignored: patterns (`fnmatch`) of checkpoint names that carry no weight, with the reason
            ("*.rotary_emb.inv_freq": "computed from the config").
        prefixes: spellings of one optional prefix that publishers leave out or add ("model.", ""); tried in order.
    """

    rules: tuple[WeightRule, ...]
    ignored: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ("",)


def rules(table: Mapping[str, str], *, layers: Iterable[int] = ()) -> list[WeightRule]:
    """Expand a one-to-one table; `{}` in both names stands for the layer's number.

    Example: rules({"model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.up.weight"}, layers=range(2))
    """
    numbers = list(layers)
    expanded = []
    for source, target in table.items():
        for i in numbers if "{}" in source else [0]:
            expanded.append(WeightRule((source.replace("{}", str(i)),), (target.replace("{}", str(i)),)))
    return expanded
