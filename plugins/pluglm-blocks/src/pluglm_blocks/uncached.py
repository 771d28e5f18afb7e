"""The null cache: a pass that attends within itself and keeps nothing, behind the part of `Cache` the decoder uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from pluglm.contracts import DenseView, KeyInfo, KVView, LatentSlot, LatentView, Slot, Step


@dataclass(slots=True)
class UncachedStep:
    """One pass; its keys are its own tokens, the same for every slot."""

    count: int
    info: KeyInfo

    def keys(self, slot: int) -> KeyInfo:
        """This pass's positions."""
        return self.info


class Uncached:
    """Stateless; one serves all passes of a model with these slots. The signatures are `Cache`'s."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._latent = tuple(isinstance(slot, LatentSlot) for slot in slots)

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
        """The new keys and values are all there are; of a latent slot, the rotary keys and latents."""
        if self._latent[slot]:
            return cast("KVView", LatentView(latent=v, rope=k))
        return cast("KVView", DenseView(k, v))

    def state(self, slot: int) -> dict[str, Tensor]:
        """Nothing is kept: a layer with a state starts from zeros and writes it nowhere."""
        return {}

    def commit(self, step: Step) -> None:
        """Nothing to count."""
