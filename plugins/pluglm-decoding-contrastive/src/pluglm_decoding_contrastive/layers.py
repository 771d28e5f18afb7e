"""Which layers DoLa may contrast the last one with, and how it contrasts them."""

from __future__ import annotations

import math
from typing import Any

import torch
from pluglm_decoding_blocks.feed import Feed
from torch import Tensor

from pluglm.contracts import ModelDescription
from pluglm.errors import InputError

#: Tokens less likely than this times the best one are out of question: Chuang et al. 2023, section 2.3 (alpha).
RELATIVE_TOP = 0.1
#: A bucket of a deeper model has this many layers at most.
_DEEP, _BUCKET = 40, 20


def read_layers(said: Any, description: ModelDescription) -> tuple[int, ...]:
    """Candidate layers: 0 is the embedding, i the output of layer i; the last layer is none of them.

    "low" and "high" are every second layer of the lower and the upper half (of a model of more than 40 layers: of the
    20 lowest and the 20 highest), as in transformers 4.50. A head that is tied to the embedding would give back the
    token that went in, so there "low" begins with layer 2.

    Args:
        said: "low", "high", or layers as a list.
    Raises: InputError for anything else, and for layers that the model does not have.
    """
    L = description.num_layers
    if said == "low":
        start = _start(description)
        return tuple(range(start, L // 2 if L <= _DEEP else _BUCKET, 2)) or (start,)
    if said == "high":
        return tuple(range(L // 2 if L <= _DEEP else L - _BUCKET, L, 2))
    layers = tuple(said) if isinstance(said, list | tuple) else ()
    if not layers or not all(type(layer) is int and 0 <= layer < L for layer in layers):
        raise InputError(
            f"dola_layers={said!r} makes no sense for a model of {L} layers.",
            why=f"it must be 'low', 'high' or a list of layers from 0 (the embedding) to {L - 1}; layer {L} is the "
            "last, with which they are contrasted.",
            argument="dola_layers",
        )
    return tuple(sorted(set(layers)))


def _start(description: ModelDescription) -> int:
    """The lowest layer worth contrasting with."""
    program = description.program
    return min(2, description.num_layers - 1) if program is not None and program.head.tied else 0


class LayerFeed:
    """A `Feed` over one whose logits are those of the last layer and, behind them, those of N inner layers.

    Attributes:
        inner: [R, N, V] of the inner layers, of the last pass.
    """

    def __init__(self, feed: Feed, vocab_size: int) -> None:
        self._feed, self._vocab_size = feed, vocab_size
        self.inner: Tensor
        self.hidden_states: tuple[Tensor, ...] | None = None
        self.can_take_back, self.finish, self.rereads = feed.can_take_back, feed.finish, feed.rereads

    def prefill(self) -> Tensor:
        """[R, V] of the last layer, after the prompt."""
        return self._split(self._feed.prefill())

    def step(self, sequences: Tensor, padded: Tensor | None) -> Tensor:
        """[R, V] of the last layer, after one more token."""
        return self._split(self._feed.step(sequences, padded))

    def _split(self, wide: Tensor) -> Tensor:
        self.hidden_states = self._feed.hidden_states
        self.inner = wide[:, self._vocab_size :].reshape(wide.shape[0], -1, self._vocab_size)
        return wide[:, : self._vocab_size]


def contrast(last: Tensor, inner: Tensor, among: Tensor | None = None) -> Tensor:
    """log p - log q of each row's plausible tokens, where q is of the inner layer that is least like the last one.

    Source: Chuang et al. 2023, "DoLa: Decoding by Contrasting Layers Improves Factuality", sections 2.2 (the layer) and
    2.3 (what is plausible). The layer is each row's own.

    Args:
        last: [R, V] logits of the last layer. inner: [R, N, V] of the candidate layers.
        among: [R, V] bool, the tokens that are possible at all; the best of these says what is plausible. None: all.
    Returns: [R, V] float32; -inf for tokens less likely than `RELATIVE_TOP` times the best.
    """
    log_p, log_q = last.float().log_softmax(-1), inner.float().log_softmax(-1)
    if inner.shape[1] > 1:
        layer = divergence(log_p[:, None], log_q).argmax(-1)  # [R]
        log_q = log_q.gather(1, layer[:, None, None].expand(-1, 1, log_q.shape[2]))
    scores = log_p - log_q[:, 0]
    if among is not None:
        log_p = log_p.masked_fill(~among, -torch.inf)
    implausible = log_p < log_p.amax(-1, keepdim=True) + math.log(RELATIVE_TOP)
    return scores.masked_fill(implausible, -torch.inf)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions along the last dimension, given as logarithms."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_relative(log_p, log_m) + _relative(log_q, log_m)) / 2


def _relative(log_p: Tensor, log_m: Tensor) -> Tensor:
    """KL(p || m); a token of probability 0 adds nothing, NaN stays NaN."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_m)).sum(-1)
