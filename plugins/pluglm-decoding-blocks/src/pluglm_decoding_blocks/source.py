"""The text that a completion is made of, where it is not the prompt: an encoder's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """ids: [B, Te]. mask: [B, Te], 0 for padding; None: no padding."""

    ids: Tensor
    mask: Tensor | None


def encoder_source(model: Any) -> Source | None:
    """What the encoder behind a `pluglm.seq2seq.ConditionedLM` was given; None for a decoder-only model."""
    ids = getattr(model, "encoder_input_ids", None)
    return Source(ids, model.encoder_attention_mask) if ids is not None else None
