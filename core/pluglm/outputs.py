"""What a forward call returns: results by attribute, key or index; what is None is not there by key or index."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts.cache import Cache


class ModelOutput(Mapping[str, Any]):
    """Results in the order of `FIELDS`, the names of the attributes that a subclass has."""

    __slots__ = ()
    FIELDS: ClassVar[tuple[str, ...]] = ()

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there, in order."""
        return tuple(value for value in (getattr(self, name) for name in self.FIELDS) if value is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            value = getattr(self, key) if key in self.FIELDS else None
            if value is None:
                raise KeyError(key)
            return value
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.FIELDS if getattr(self, name) is not None)

    def __len__(self) -> int:
        return len(self.to_tuple())


class CausalOutput(ModelOutput):
    """One pass of a decoder-only model.

    Attributes:
        logits: [B, T or fewer, V]. past_key_values: the cache, grown by T, or None.
        hidden_states: L + 1 tensors [B, T, C], the first one the embeddings, or None.
    """

    __slots__ = ("hidden_states", "logits", "past_key_values")
    FIELDS = ("logits", "past_key_values", "hidden_states")

    def __init__(self, logits: Tensor, past_key_values: Cache | None, hidden_states: tuple[Tensor, ...] | None) -> None:
        self.logits, self.past_key_values, self.hidden_states = logits, past_key_values, hidden_states


class EncodedOutput(ModelOutput):
    """One pass of an encoder: what `encoder_outputs` takes.

    Attributes:
        last_hidden_state: [B, Te, C]. hidden_states: of every layer, the first one the embeddings, or None.
    """

    __slots__ = ("hidden_states", "last_hidden_state")
    FIELDS = ("last_hidden_state", "hidden_states")

    def __init__(self, last_hidden_state: Tensor, hidden_states: tuple[Tensor, ...] | None = None) -> None:
        self.last_hidden_state, self.hidden_states = last_hidden_state, hidden_states


class Seq2SeqOutput(ModelOutput):
    """One pass of an encoder-decoder.

    Attributes:
        logits: [B, T or fewer, V] of the decoder. past_key_values: the cache, grown by T, or None.
        decoder_hidden_states: L + 1 tensors [B, T, C], or None.
        encoder_last_hidden_state: [B, Te, C]; None if the call brought no encoder input because the cache holds it.
        encoder_hidden_states: of every layer of the encoder, or None.
    """

    __slots__ = (
        "decoder_hidden_states", "encoder_hidden_states", "encoder_last_hidden_state", "logits", "past_key_values",
    )  # fmt: skip
    FIELDS = (
        "logits", "past_key_values", "decoder_hidden_states", "encoder_last_hidden_state", "encoder_hidden_states",
    )  # fmt: skip

    def __init__(
        self, logits: Tensor, past_key_values: Cache | None, decoder_hidden_states: tuple[Tensor, ...] | None,
        encoded: EncodedOutput | None,
    ) -> None:  # fmt: skip
        self.logits, self.past_key_values = logits, past_key_values
        self.decoder_hidden_states = decoder_hidden_states
        self.encoder_last_hidden_state = encoded.last_hidden_state if encoded is not None else None
        self.encoder_hidden_states = encoded.hidden_states if encoded is not None else None
