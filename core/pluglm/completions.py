"""What a strategy returned, as answers: text, token ids, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pluglm.contracts.decoding import FinishReason, GenerationOutput
from pluglm.healing import without
from pluglm.text_stream import cut_at_stop

if TYPE_CHECKING:
    from pluglm.calls import Call
    from pluglm.contracts.text import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One answer with what is known of it.

    Attributes:
        text: of the new tokens, cut before a stop string; "" for a model without a tokenizer.
        token_ids: the new tokens. num_prompt_tokens: before them, padding not counted.
        finish_reason: "eos", "length" or "stop" (a stop string or a criterion); None: the strategy does not say.
        logprobs: of the new tokens, if asked for with `return_logprobs=True`.
        score: what ranked this sequence among its prompt's, of strategies that search; else None.
        scores, logits: [new tokens, V], of the step that made each token, with `output_scores` or `output_logits`.
        hidden_states: a step: L + 1 tensors [T, C], with `output_hidden_states`; T is the padded prompt's at first.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    finish_reason: FinishReason | None
    logprobs: tuple[float, ...] | None = None
    score: float | None = None
    scores: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None


def completions(output: GenerationOutput | torch.Tensor, call: Call, tokenizer: Tokenizer | None) -> list[Completion]:
    """One answer a sequence, those of one prompt behind each other."""
    width = call.input_ids.shape[1]
    if isinstance(output, torch.Tensor):  # a strategy in the Hub's style: bare sequences
        output = GenerationOutput(output, width, (output.shape[1] - width,) * output.shape[0], ())
    copies = output.sequences.shape[0] // len(call.prompts.rows)
    done = []
    for row in range(output.sequences.shape[0]):
        ids = tuple(output.completion(row))
        text = tokenizer.decode(ids) if tokenizer is not None else ""
        done.append(Completion(
            without(call.tails, row // copies, cut_at_stop(text, call.config.stop_strings or ())), ids,
            len(call.prompts.rows[row // copies]),
            output.finish_reasons[row] if output.finish_reasons else None,
            output.logprobs[row] if output.logprobs is not None else None,
            output.sequence_scores[row] if output.sequence_scores is not None else None,
            **_steps(output, row),
        ))  # fmt: skip
    return done


def _steps(output: GenerationOutput, row: int) -> dict[str, Any]:
    """What the steps kept of one sequence: of the row of the search, where there was one, that each token came from."""
    count = output.num_new_tokens[row]
    rows = output.beam_indices[row] if output.beam_indices is not None else (row,) * count
    found: dict[str, Any] = {}
    for name in ("scores", "logits"):
        steps = getattr(output, name)
        if steps is not None:
            found[name] = torch.stack([step[r] for step, r in zip(steps, rows, strict=False)])
    if output.hidden_states is not None:
        pairs = zip(output.hidden_states, rows, strict=False)
        found["hidden_states"] = tuple(tuple(layer[r] for layer in step) for step, r in pairs)
    return found
