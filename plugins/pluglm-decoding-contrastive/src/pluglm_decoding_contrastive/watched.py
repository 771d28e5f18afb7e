"""A model whose passes also tell their hidden states, in the place of the model that a feed runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import Cache
from pluglm.outputs import CausalOutput


class Watched:
    """Runs every pass with hidden states and shows them to `_logits`, which says what the feed gets as logits.

    Args:
        model: a `pluglm.forward.CausalLM`, or what follows its forward contract.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def _logits(self, output: Any, keep: int | Tensor) -> Tensor:
        """[B, kept, …] of one pass's output. keep: `logits_to_keep` of the pass."""
        raise NotImplementedError

    def new_cache(self, *, batch_size: int, capacity: int | None = None) -> Cache:
        """The model's."""
        cache: Cache = self._model.new_cache(batch_size=batch_size, capacity=capacity)
        return cache

    def __call__(self, input_ids: Tensor, *, logits_to_keep: int | Tensor = 0, **arguments: Any) -> CausalOutput:
        """The forward contract, as feeds use it."""
        arguments.update(output_hidden_states=True, return_dict=True)
        output = self._model(input_ids=input_ids, logits_to_keep=logits_to_keep, **arguments)
        return CausalOutput(self._logits(output, logits_to_keep), output.past_key_values, output.hidden_states)

    def step(self, token_ids: Tensor, cache: Cache, *, positions: Tensor | None = None) -> Tensor:
        """[B, 1, …] of one token a row. positions: [B, 1], negative in rows whose token is padding."""
        mask = None if positions is None else _mask(cache, positions >= 0)
        return self(token_ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1).logits


class LastStates(Watched):
    """Keeps the last hidden states of every pass until they are taken.

    Args:
        every: keep those of the other layers, too.
    """

    def __init__(self, model: Any, *, every: bool) -> None:
        super().__init__(model)
        self._first = 0 if every else -1
        self._passes: list[tuple[Tensor, ...]] = []

    def _logits(self, output: Any, keep: int | Tensor) -> Tensor:
        self._passes.append(output.hidden_states[self._first :])
        logits: Tensor = output.logits
        return logits

    def take(self) -> tuple[Tensor, ...]:
        """[B, T, C] of all passes since the last call, one a layer; the last one is the last layer's."""
        passes, self._passes = self._passes, []
        return tuple(torch.cat(states, dim=1) for states in zip(*passes, strict=True))


class LayerLogits(Watched):
    """Gives the logits of inner layers, too, behind those of the last: [B, kept, (1 + layers) * V].

    Args:
        layers: 0 is the embedding, i the output of layer i. logits_of: as `CausalLM.logits_of`.
    """

    def __init__(self, model: Any, layers: Sequence[int], logits_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__(model)
        self._layers, self._logits_of = tuple(layers), logits_of

    def _logits(self, output: Any, keep: int | Tensor) -> Tensor:
        inner = [self._logits_of(_kept(output.hidden_states[layer], keep)) for layer in self._layers]
        return torch.cat((output.logits, *inner), dim=-1)


def _kept(states: Tensor, keep: int | Tensor) -> Tensor:
    """[B, T, C] at the cells whose logits are wanted, as `logits_to_keep` says."""
    if isinstance(keep, Tensor):
        return states[:, keep]
    return states if keep == 0 else states[:, -keep:]


def _mask(cache: Cache, real: Tensor) -> Tensor:
    """An attention mask [B, length + 1] for one more cell. real: [B, 1] bool.

    A cache knows which of its cells are padding; of a later mask it is asked only how many tokens each row has.
    """
    cells = torch.arange(cache.length, device=real.device)
    past = cells < cache.next_positions(1).to(real.device)  # [B, length]
    return torch.cat((past.expand(real.shape[0], -1), real), dim=1).long()
