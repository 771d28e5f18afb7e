"""What models and `generate` return, under the names and fields of transformers 5.23."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pluglm.outputs import ModelOutput

#: A step: a tuple of one tensor a layer.
Layers = tuple[tuple[Tensor, ...], ...]


class Results(ModelOutput):
    """Fields in the order of the annotations of a subclass and its bases."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own = [name for name in inspect.get_annotations(cls) if name not in ("FIELDS", *cls.FIELDS)]
        cls.FIELDS = (*cls.FIELDS, *own)


@dataclass(eq=False)
class CausalLMOutputWithPast(Results):
    """One pass of a decoder-only model.

    Attributes:
        logits: [B, T or fewer, V]. past_key_values: the cache, or None.
        hidden_states: L + 1 tensors [B, T, C], or None. attentions, loss: always None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(eq=False)
class GenerateDecoderOnlyOutput(Results):
    """Of greedy decoding and sampling.

    Attributes:
        sequences: [R, S]. scores, logits: a step, [R, V] after and before processing. attentions, hidden_states: a
            step, a tensor a layer. past_key_values: the cache.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: Layers | None = None
    hidden_states: Layers | None = None
    past_key_values: Any = None


@dataclass(eq=False)
class GenerateEncoderDecoderOutput(Results):
    """The same of an encoder-decoder."""

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: Layers | None = None
    cross_attentions: Layers | None = None
    decoder_hidden_states: Layers | None = None
    past_key_values: Any = None


@dataclass(eq=False)
class GenerateBeamDecoderOnlyOutput(Results):
    """Of searches.

    Attributes:
        sequences_scores: [R], the score that ranked each sequence. beam_indices: [R, new tokens], the row of the
            search that each token came from, -1 behind the end. The others: as of `GenerateDecoderOnlyOutput`.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: Layers | None = None
    hidden_states: Layers | None = None
    past_key_values: Any = None


@dataclass(eq=False)
class GenerateBeamEncoderDecoderOutput(Results):
    """The same of an encoder-decoder."""

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: Layers | None = None
    cross_attentions: Layers | None = None
    decoder_hidden_states: Layers | None = None
    past_key_values: Any = None


GenerateNonBeamOutput = GenerateDecoderOnlyOutput | GenerateEncoderDecoderOutput
GenerateBeamOutput = GenerateBeamDecoderOnlyOutput | GenerateBeamEncoderDecoderOutput
GenerateOutput = GenerateNonBeamOutput | GenerateBeamOutput
