"""Beams in groups that keep away from each other's tokens."""

import torch
import transformers
from packaging import version
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateBeamOutput,
    GenerationMixin,
)

from .scoring import Hypotheses

SAYS_HOW_MANY = version.parse(transformers.__version__) >= version.parse("5.3.0")


class AwayFromOthers(LogitsProcessor):
    def __init__(self, penalty: float, beams: int, groups: int):
        self.penalty, self.width = penalty, beams // groups

    def __call__(self, input_ids, scores, current_tokens, beam_group_idx):
        if beam_group_idx == 0:
            return scores
        rows = scores.shape[0] // self.width
        beams = current_tokens.shape[0] // rows
        scores = scores.clone()
        for row in range(rows):
            taken = current_tokens[row * beams : row * beams + beam_group_idx * self.width]
            counts = torch.bincount(taken, minlength=scores.shape[1]).to(scores)
            scores[row * self.width : (row + 1) * self.width] -= self.penalty * counts
        return scores


def _search(
    model,
    input_ids,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config,
    synced_gpus: bool = False,
    **model_kwargs,
) -> GenerateBeamOutput:
    beams, groups = generation_config.num_beams, generation_config.num_beam_groups
    width = beams // groups
    logits_processor.append(AwayFromOthers(generation_config.diversity_penalty, beams, groups))
    device, start = input_ids.device, input_ids.shape[1]
    rows = input_ids.shape[0] // beams
    pad = int(generation_config._pad_token_tensor) if generation_config._pad_token_tensor is not None else 0
    ends = generation_config._eos_token_tensor
    ends = set() if ends is None else set(ends.tolist())
    done = [Hypotheses(beams, generation_config.length_penalty) for _ in range(rows)]
    totals = torch.full((rows, beams), -1e9, device=device)
    totals[:, ::width] = 0.0
    totals = totals.view(-1)
    forward = model.__call__
    if model._valid_auto_compile_criteria(model_kwargs, generation_config):
        forward = model.get_compiled_call(generation_config.compile_config)
    outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    finished = False
    with model._optimize_model_for_decode():
        while model._has_unfinished_sequences(finished, synced_gpus, device=device):
            model_kwargs = model._update_model_kwargs_for_generation(
                outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
            )
            tokens = torch.zeros(rows * beams, dtype=torch.long, device=device)
            order = torch.zeros(rows * beams, dtype=torch.long, device=device)
            logits = outputs.logits[:, -1, :].to(copy=True, dtype=torch.float32)
            for group in range(groups):
                mine = [row * beams + group * width + i for row in range(rows) for i in range(width)]
                scores = torch.log_softmax(logits[mine], dim=-1)
                scores = logits_processor(input_ids[mine], scores, current_tokens=tokens, beam_group_idx=group)
                vocabulary = scores.shape[-1]
                sums = (scores + totals[mine, None]).view(rows, width * vocabulary)
                best, index = torch.topk(sums, 2 * width, dim=1)
                for row in range(rows):
                    taken = 0
                    for value, place in zip(best[row].tolist(), index[row].tolist(), strict=True):
                        source, token = mine[row * width + place // vocabulary], place % vocabulary
                        if token in ends:
                            made = input_ids.shape[1] - start + 1
                            done[row].add(value, torch.cat((input_ids[source], torch.tensor([token]))), made)
                        elif taken < width:
                            slot = mine[row * width + taken]
                            tokens[slot], order[slot], totals[slot] = token, source, value
                            taken += 1
            input_ids = torch.cat([input_ids[order], tokens[:, None]], dim=-1)
            if model_kwargs.get("past_key_values") is not None:
                if hasattr(model, "_reorder_cache"):
                    model_kwargs["past_key_values"] = model._reorder_cache(model_kwargs["past_key_values"], order)
                else:
                    model_kwargs["past_key_values"].reorder_cache(order)
            finished = all(kept.is_full() for kept in done) or bool(stopping_criteria(input_ids, None).all())
            if not finished:
                how_many = {"next_sequence_length": 1} if SAYS_HOW_MANY and model_kwargs["use_cache"] else {}
                inputs = model.prepare_inputs_for_generation(input_ids, **how_many, **model_kwargs)
                outputs = forward(**inputs, return_dict=True)
    for row in range(rows):
        for slot in range(row * beams, (row + 1) * beams):
            done[row].add(float(totals[slot]), input_ids[slot], input_ids.shape[1] - start)
    copies = generation_config.num_return_sequences
    chosen = [pair for kept in done for pair in kept.kept[:copies]]
    longest = max(len(ids) for _, ids in chosen)
    sequences = torch.full((len(chosen), longest), pad, dtype=torch.long, device=device)
    for i, (_, ids) in enumerate(chosen):
        sequences[i, : len(ids)] = ids
    if not generation_config.return_dict_in_generate:
        return sequences
    kind = GenerateBeamEncoderDecoderOutput if model.config.is_encoder_decoder else GenerateBeamDecoderOnlyOutput
    return kind(sequences=sequences, sequences_scores=torch.tensor([score for score, _ in chosen]))


def generate(model, *args, **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=_search, **kwargs)
