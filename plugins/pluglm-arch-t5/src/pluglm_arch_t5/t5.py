"""T5: Raffel et al. 2020, "Exploring the limits of transfer learning with a unified text-to-text transformer".

The model of section 2.1: the encoder-decoder of Vaswani et al. 2017, with norms that only rescale, placed before each
part and outside the residual path; no biases; and a learned scalar for each head and bucket of distances, added to the
scores, instead of positions in the embedding. Its tables are shared by all layers of a stack. Scores are not divided by
sqrt(D): the initialisation takes care of it. Version 1.1 has a gated feed-forward (Shazeer 2020) and a head of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pluglm_blocks.embedding import TiedHead
from pluglm_blocks.norm import build_norm
from pluglm_blocks.uncached import Uncached
from torch import Tensor, nn

from pluglm.contracts import EncoderInput, EncoderOutput, ForwardInput, ForwardOutput, KeyInfo, ModelParts, Norm
from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm_arch_t5.config import T5Config
from pluglm_arch_t5.layers import DecoderLayer, DecoderPass, EncoderLayer, RelativeBias, backend_of


class Stack(nn.Module):
    """One side. Parameters: layers.<i>.…, bias.table, norm.weight."""

    def __init__(
        self, layers: Iterable[nn.Module], t5: T5Config, parts: ModelParts, dtype: torch.dtype, *, bidirectional: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.bias = RelativeBias(t5, bidirectional=bidirectional, dtype=dtype)
        self.norm = build_norm(Norm("rms", t5.hidden_size, t5.norm_eps), parts.kernels, dtype)

    def forward(self, x: Tensor, *shared: Any) -> tuple[Tensor, list[Tensor]]:
        """[B, T, C] -> the last layer's output, not normed yet, and the input of every layer."""
        inputs = []
        for layer in self.layers:
            inputs.append(x)
            x = layer(x, *shared)
        return x, inputs


class T5(nn.Module):
    """An `EncoderDecoderModule`. Parameters: embed.weight [V, C]; encoder.…; decoder.…; head.weight, unless tied."""

    def __init__(self, t5: T5Config, parts: ModelParts) -> None:
        super().__init__()
        dtype = torch_dtype(parts.dtype)
        self.t5, self.backend = t5, backend_of(parts)
        self.embed = nn.Embedding(t5.vocab_size, t5.hidden_size, dtype=dtype)
        encoder = (EncoderLayer(t5, parts, dtype) for _ in range(t5.num_encoder_layers))
        decoder = (DecoderLayer(t5, parts, dtype, i) for i in range(t5.num_decoder_layers))
        self.encoder = Stack(encoder, t5, parts, dtype, bidirectional=True)
        self.decoder = Stack(decoder, t5, parts, dtype, bidirectional=False)
        self.head: nn.Module = (
            TiedHead(self.embed, False, dtype) if t5.tied
            else nn.Linear(t5.hidden_size, t5.vocab_size, bias=False, dtype=dtype)
        )  # fmt: skip
        self.head_scale = t5.hidden_size**-0.5 if t5.scaled else None
        self._uncached = Uncached(parts.description.slots)

    def encode(self, inputs: EncoderInput) -> EncoderOutput:
        """Every token attends to every token; nothing is kept."""
        x = self.embed(inputs.token_ids) if inputs.embeds is None else inputs.embeds  # [B, Te, C]
        positions = inputs.positions
        keys = KeyInfo(positions, positions.shape[1], inputs.dense)
        mask = self.backend.prepare(self.t5.encoder_attention, positions, keys)
        x, hidden = self.encoder(x, mask, self.encoder.bias(positions, positions))
        x = self.encoder.norm(x)
        return EncoderOutput(x, (*hidden, x) if inputs.output_hidden_states else None)

    def forward(self, inputs: ForwardInput) -> ForwardOutput:
        """One pass of the decoder.

        Raises: InputError without the encoder's states where the cache does not hold their keys, and for packed or
            prefixed texts; ContextLengthError before anything is written, if the cache has no room.
        """
        now = self._begin(inputs)
        x = self.embed(inputs.token_ids) if inputs.embeds is None else inputs.embeds  # [B, T, C]
        x, hidden = self.decoder(x, now)
        if inputs.output_hidden_states:
            x = self.decoder.norm(x)
            logits = self._logits(_kept(x, inputs.logits_to_keep))
        else:
            logits = self._logits(self.decoder.norm(_kept(x, inputs.logits_to_keep)))
        now.cache.commit(now.step)
        return ForwardOutput(logits, (*hidden, x) if inputs.output_hidden_states else None)

    def _begin(self, inputs: ForwardInput) -> DecoderPass:
        """Reserve cells, and make what the layers share."""
        if inputs.segments is not None or inputs.prefix_lengths is not None:
            raise InputError(
                "T5's decoder takes neither segments nor prefix lengths.",
                why="packed texts would all attend to one input of the encoder, and its prefix is that input.",
                fix="Run each text as a row of its own.", argument="segments",
            )  # fmt: skip
        cache, positions = self._uncached if inputs.cache is None else inputs.cache, inputs.positions
        step = cache.begin(positions, dense=inputs.dense)
        # Asked only now: `begin` has discarded what a pass before this one wrote and did not commit.
        held = inputs.cache.cross(self.t5.num_decoder_layers) if inputs.cache is not None else None
        states, source = (None, None) if held is not None else (inputs.encoder_states, inputs.encoder_positions)
        if held is not None:
            info = held[1]
        elif states is not None and source is not None:
            info = KeyInfo(source, source.shape[1], dense=False)
        else:
            raise InputError(
                "the decoder has nothing to attend to: no encoder's output was given, and the cache holds none.",
                fix="Pass the encoder's input in the first call on a cache, and in every call without one.",
                argument="encoder_outputs",
            )
        keys = step.keys(0)
        return DecoderPass(
            cache, step, self.backend.prepare(self.t5.decoder_attention, positions, keys),
            self.decoder.bias(positions, keys.positions),
            self.backend.prepare(self.t5.cross_attention, positions, info), states, source,
        )  # fmt: skip

    def _logits(self, x: Tensor) -> Tensor:
        """[B, kept, C] -> [B, kept, V]; version 1.0 scales x by C ** -0.5 before it multiplies by the embedding."""
        logits: Tensor = self.head(x if self.head_scale is None else x * self.head_scale)
        return logits


def build(t5: T5Config, parts: ModelParts) -> T5:
    """The module, on torch's current default device. Raises UnsupportedRequestError for float16."""
    if parts.dtype == "float16":
        reason = "float16: T5 was trained in bfloat16, and its residual stream exceeds what float16 can hold"
        raise UnsupportedRequestError(
            "T5 cannot be built as asked.", why=reason, fix='Load it with dtype="bfloat16" or "float32".',
            reasons=(reason,),
        )  # fmt: skip
    return T5(t5, parts)


def _kept(x: Tensor, keep: int | Tensor) -> Tensor:
    """x [B, T, C] at the positions whose logits are wanted: 0: all; n: the last n; a tensor [n]: these."""
    if isinstance(keep, Tensor):
        return x[:, keep]
    return x if keep == 0 else x[:, -keep:]
