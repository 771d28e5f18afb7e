"""One pass of an encoder-decoder, under the names of transformers 5.23."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pluglm_hf.outputs import Results


@dataclass(eq=False)
class Seq2SeqLMOutput(Results):
    """logits: [B, T, V] of the decoder. loss: where labels were given. past_key_values: the cache, or None."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
