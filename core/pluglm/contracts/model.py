"""What an architecture plugin gives: a description of the model, then the module; and what goes through the module.

Two surfaces, one model. `ModelModule.forward(ForwardInput) -> ForwardOutput` is what an architecture writes: positions
and cache are explicit, there is nothing to guess. `lm.model(input_ids, attention_mask=…)`, the forward contract of the
field, is laid over it once, in `pluglm.forward`, for every architecture and executor alike.

An encoder-decoder has two passes. `encode` reads the input once. `forward` is a pass of the decoder: the first one on
a cache is given the encoder's states and writes their keys and values into the cross slots (`Cache.set_cross`); later
ones read them there. So whatever is done to the cache's rows (beams, copies, forks) is done to their inputs as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pluglm.contracts.attention import AttentionBackend, AttentionSpec
from pluglm.contracts.cache import Cache
from pluglm.contracts.program import DecoderProgram
from pluglm.contracts.slots import Slot
from pluglm.contracts.weights import WeightMap

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class ModelDescription:
    """Everything the core needs to know of a model before a weight is read. Made without importing torch.

    Attributes:
        model_type: as in config.json.
        program: the decoder as data; None if the architecture brings a module of its own that no program can say.
        weights: checkpoint names <-> parameter names.
        vocab_size: rows of the logits. hidden_size: C. num_layers: L; of an encoder-decoder, its decoder's.
        max_seq_len: positions the model (the decoder) is made for; None: unbounded.
        attention: distinct specs of its attention layers. slots: what its cache must hold.
        used, ignored: keys of the config, the latter with the reason; a key in neither is refused.
        eos_token_ids, bos_token_id, pad_token_id: from the config; generation_config.json goes first.
        is_encoder_decoder: the module is an `EncoderDecoderModule`.
        decoder_start_token_id: what an encoder-decoder's decoder begins with; generation_config.json goes first.
        max_encoder_len: positions the encoder is made for; None: unbounded.
    """

    model_type: str
    program: DecoderProgram | None
    weights: WeightMap
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_seq_len: int | None
    attention: tuple[AttentionSpec, ...]
    slots: tuple[Slot, ...]
    used: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    is_encoder_decoder: bool = False
    decoder_start_token_id: int | None = None
    max_encoder_len: int | None = None


@dataclass(frozen=True)
class ModelParts:
    """What the core hands to `pluglm_build_model`, all of it chosen and built.

    Attributes:
        description: what the same provider's `pluglm_describe_model` returned for this config.
        attention: the backend of every attention layer; None if the model has none.
        kernels: op name -> callable, for the ops that a kernel plugin was chosen for; the rest run their reference.
        device, dtype: of the parameters. The core builds under `torch.device("meta")` and fills in the weights.
    """

    description: ModelDescription
    attention: AttentionBackend | None
    kernels: Mapping[str, Callable[..., Any]]
    device: str
    dtype: str


@dataclass(frozen=True, slots=True)
class ForwardInput:
    """One forward pass. Exactly one of `token_ids` and `embeds` is given.

    Attributes:
        token_ids: [B, T] int64. embeds: [B, T, C], what the embedding table would have given for them; its scale,
            learned positions and norm still apply.
        positions: [B, T] or [1, T] int64 absolute positions; negative: padding.
        dense: known on the host: positions are length … length + T - 1 in every row.
        cache: what was kept before; None: attend within this pass only and keep nothing.
        logits_to_keep: 0: logits of all T; n > 0: of the last n; a tensor: of these indices.
        output_hidden_states: return the input of every layer and the final normed output (L + 1 tensors).
        segments: [B, T] int64: packed sequences; a query sees keys of its own segment only.
        prefix_lengths: [B] int64, for prefix language models.
        encoder_states: [B, Te, C] and encoder_positions [B, Te] (negative: padding), for encoder-decoder models; None
            once the cache's cross slots hold their keys.
    """

    token_ids: Tensor | None
    positions: Tensor
    cache: Cache | None
    embeds: Tensor | None = None
    dense: bool = False
    logits_to_keep: int | Tensor = 0
    output_hidden_states: bool = False
    segments: Tensor | None = None
    prefix_lengths: Tensor | None = None
    encoder_states: Tensor | None = None
    encoder_positions: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """logits: [B, T or fewer, V] in the model's dtype. hidden_states: L + 1 tensors [B, T, C], or None."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """One pass of an encoder. Exactly one of `token_ids` and `embeds` is given.

    Attributes:
        token_ids: [B, Te] int64. embeds: [B, Te, C], what the embedding table would have given for them.
        positions: [B, Te] or [1, Te] int64 absolute positions; negative: padding.
        dense: known on the host: positions are 0 … Te - 1 in every row.
        output_hidden_states: return the input of every layer and the final normed output.
    """

    token_ids: Tensor | None
    positions: Tensor
    embeds: Tensor | None = None
    dense: bool = False
    output_hidden_states: bool = False


@dataclass(frozen=True, slots=True)
class EncoderOutput:
    """states: [B, Te, C] in the model's dtype, finite at padding too. hidden_states: of every layer, or None."""

    states: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class ModelModule(Protocol):
    """What `pluglm_build_model` returns: an `nn.Module` with this forward."""

    def forward(self, inputs: ForwardInput) -> ForwardOutput:
        """One pass; the cache, if any, has grown by T when this returns and is unchanged if it raises."""
        ...

    @property
    def embed(self) -> nn.Module:
        """The input embedding, weight [V, C]."""
        ...

    @property
    def head(self) -> nn.Module:
        """The module that turns hidden states into logits, before any scale or cap on them.

        A module may also have `logits_of(hidden [..., C]) -> [..., V]`: head, scale and cap on any layer's output,
        without the final norm. Strategies that read inner layers refuse a model whose module has none.
        And it may have `first_layers(count) -> ModelModule`: the same parameters, cut after so many layers.
        """
        ...


class EncoderDecoderModule(ModelModule, Protocol):
    """What `pluglm_build_model` returns where the description says `is_encoder_decoder`.

    `forward` is a pass of the decoder. With a cache whose cross slots are empty, or without a cache, it is given
    `encoder_states` and `encoder_positions`; it projects them to keys and values and, if there is a cache, writes these
    with `Cache.set_cross` inside the pass, so that they count when it commits. With filled slots it reads
    `Cache.cross` and projects nothing: that happens once a sequence. It raises InputError if it has neither.
    """

    def encode(self, inputs: EncoderInput) -> EncoderOutput:
        """Read the encoder's input. Keeps nothing; called by the core itself, not through the executor."""
        ...
