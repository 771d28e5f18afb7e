"""The null cache: a pass that attends within itself and keeps nothing, behind the part of `Cache` the decoder uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from pluglm.contracts import DenseView, KeyInfo, KVView, Step


@dataclass(slots=True)
class UncachedStep:
    """One pass; its keys are its own tokens, the same for every slot."""

    count: int
    info: KeyInfo

    def keys(self, slot: int) -> KeyInfo:
        """This pass's positions."""
        return self.info


class Uncached:
    """Stateless; one serves all passes. The signatures are `Cache`'s."""

    def begin(
        self,
        positions: Tensor,
        *,
        dense: bool = False,
        prefix_lengths: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> UncachedStep:
        """A pass whose keys are `positions`. dense: the caller knows that they are 0, 1, … in every row."""
        count = positions.shape[1]
        return UncachedStep(count, KeyInfo(positions, count, dense, prefix_lengths, segments, segments))

    def append(self, slot: int, k: Tensor, v: Tensor, step: Step) -> KVView:
        """The new keys and values are all there are."""
        return cast("KVView", DenseView(k, v))

    def commit(self, step: Step) -> None:
        """Nothing to count."""
