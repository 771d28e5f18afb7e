"""A strategy's output as the reference's classes have it, and the scores of the tokens that were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pluglm.contracts.decoding import GenerationOutput
from pluglm_hf.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)

if TYPE_CHECKING:
    from pluglm_hf.settings import Said
    from pluglm_hf.source import Decoder


def answer(output: GenerationOutput, said: Said, decoder: Decoder) -> Any:
    """Sequences [R, S], or all that was asked for."""
    if not said["return_dict_in_generate"]:
        return output.sequences
    found: dict[str, Any] = {
        "sequences": output.sequences, "scores": output.scores, "logits": output.logits,
        "past_key_values": decoder.face,
    }  # fmt: skip
    if said.beams:
        device = output.sequences.device
        found["sequences_scores"] = _numbers(output.sequence_scores, device) if said["output_scores"] else None
        found["beam_indices"] = _padded(output.beam_indices, device) if said["output_scores"] else None
    if decoder.encoded is None:
        found["hidden_states"] = output.hidden_states
        return (GenerateBeamDecoderOnlyOutput if said.beams else GenerateDecoderOnlyOutput)(**found)
    found["decoder_hidden_states"] = output.hidden_states
    found["encoder_hidden_states"] = getattr(decoder.encoded, "hidden_states", None)
    return (GenerateBeamEncoderDecoderOutput if said.beams else GenerateEncoderDecoderOutput)(**found)


def _numbers(values: Sequence[float] | None, device: torch.device) -> Tensor | None:
    return None if values is None else torch.tensor(values, device=device)


def _padded(rows: Sequence[Sequence[int]] | None, device: torch.device) -> Tensor | None:
    """[R, longest] int64, -1 behind the end of a row."""
    if rows is None:
        return None
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], device=device)


def transition_scores(
    sequences: Tensor, scores: Sequence[Tensor], beam_indices: Tensor | None, *, normalize_logits: bool
) -> Tensor:
    """[R, new tokens]: the score that each chosen token had, 0 behind a row's end in a search.

    Args:
        sequences: [R, S]. scores: a step, [rows of the search, V]. beam_indices: [R, new tokens] the row that each
            token came from, negative behind the end; None: its own. normalize_logits: log-softmax over the vocabulary.
    Source: transformers 5.23, `compute_transition_scores`.
    """
    steps = torch.stack(tuple(scores))  # [T, rows, V]
    if normalize_logits:
        steps = steps.log_softmax(-1)
    if beam_indices is None:
        own = torch.arange(sequences.shape[0], device=sequences.device)
        beam_indices = own[:, None].expand(-1, len(scores))
    ended = beam_indices < 0
    width = int((~ended).sum(1).max())
    rows, ended = beam_indices[:, :width].clamp(min=0), ended[:, :width]
    tokens = sequences[:, sequences.shape[1] - width :]
    chosen = steps[torch.arange(width, device=rows.device), rows, tokens]  # [R, T]
    return chosen.masked_fill(ended, 0.0)
