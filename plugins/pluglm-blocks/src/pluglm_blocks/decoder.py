"""The decoder: embedding, layers, final norm, head; the module that a `DecoderProgram` means."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pluglm.contracts import ForwardInput, ForwardOutput
from pluglm_blocks.embedding import TiedHead, rounded
from pluglm_blocks.layer import Layer
from pluglm_blocks.norm import build_norm

if TYPE_CHECKING:
    from pluglm_blocks.context import BuildContext


class Decoder(nn.Module):
    """A decoder-only transformer. Made by `build_decoder`, which has checked what is not checked here.

    Parameters: embed.weight [V, C], embed_positions.weight [P, C], embed_norm.…; layers.<i>.…; norm.…;
    head.weight [V, C] unless tied, head.bias [V].

    A quantizer may put a `BlockedEmbedding` in the place of `embed`, if the head is tied.
    `embeds=embed(ids)` gives what `token_ids=ids` gives: scale, positions and norm come after either.
    """

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        embedding, head, dtype = context.program.embedding, context.program.head, context.dtype
        V, C = embedding.vocab_size, embedding.hidden_size
        self.embed = nn.Embedding(V, C, dtype=dtype)
        self.embed_scale = None if embedding.scale == 1.0 else rounded(embedding.scale, dtype)
        self.position_offset = embedding.position_offset
        self.embed_positions: nn.Module | None = None
        if embedding.learned_positions is not None:
            self.embed_positions = nn.Embedding(embedding.learned_positions, C, dtype=dtype)
        self.embed_norm = build_norm(embedding.norm, context.kernels, dtype) if embedding.norm is not None else None
        self.layers = nn.ModuleList(Layer(layer, context) for layer in context.program.layers)
        final_norm = context.program.final_norm
        self.norm = build_norm(final_norm, context.kernels, dtype) if final_norm is not None else None
        self.head: nn.Module = (
            TiedHead(self.embed, head.bias, dtype) if head.tied else nn.Linear(C, V, bias=head.bias, dtype=dtype)
        )
        self._read_as = dtype if context.program.float32_residual else None
        self.head_scale, self.softcap = None if head.scale == 1.0 else head.scale, head.softcap
        self._plan = context.plan

    def forward(self, inputs: ForwardInput) -> ForwardOutput:
        """One pass. Logits are computed for the kept positions only, hidden states for all of them.

        Raises: ContextLengthError before anything is written, if the cache has no room; a pass that fails later has
            not been committed, so the cache's length is what it was.
        """
        real = inputs.positions if inputs.dense else inputs.positions.clamp(min=0)
        state = self._plan.begin(inputs, real)
        x = self._embed(inputs, real)  # [B, T, C]
        hidden_states = []
        for layer in self.layers:
            if inputs.output_hidden_states:
                hidden_states.append(x)
            x = layer(x, state)
        if inputs.output_hidden_states:
            x = self._final(x)
            hidden_states.append(x)
            logits = self._logits(_kept(x, inputs.logits_to_keep))
        else:
            logits = self._logits(self._final(_kept(x, inputs.logits_to_keep)))
        state.cache.commit(state.step)
        return ForwardOutput(logits, tuple(hidden_states) if inputs.output_hidden_states else None)

    def _embed(self, inputs: ForwardInput, real: Tensor) -> Tensor:
        x: Tensor = self.embed(inputs.token_ids) if inputs.embeds is None else inputs.embeds  # [B, T, C]
        if self.embed_scale is not None:
            x = x * self.embed_scale
        if self.embed_positions is not None:
            x = x + self.embed_positions(real + self.position_offset)
        x = x if self.embed_norm is None else self.embed_norm(x)
        return x if self._read_as is None else x.float()

    def _final(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        return x if self._read_as is None else x.to(self._read_as)

    def first_layers(self, count: int) -> Decoder:
        """This decoder without the layers after the first `count`: its own modules, in a container of their own."""
        cut = copy(self)
        cut._modules = {**self._modules, "layers": self.layers[:count]}
        return cut

    def logits_of(self, hidden: Tensor) -> Tensor:
        """What the head makes of any layer's output [..., C], without the final norm: [..., V]."""
        return self._logits(hidden if self._read_as is None else hidden.to(self._read_as))

    def _logits(self, x: Tensor) -> Tensor:
        """softcap(scale * head(x)), [B, kept, V] in the model's dtype. (Soft cap: Gemma 2, section 2.)"""
        logits: Tensor = self.head(x)
        if self.head_scale is not None:
            logits = logits * self.head_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _kept(x: Tensor, keep: int | Tensor) -> Tensor:
    """x [B, T, C] at the positions whose logits are wanted: 0: all; n: the last n; a tensor [n]: these."""
    if isinstance(keep, Tensor):
        return x[:, keep]
    return x if keep == 0 else x[:, -keep:]
