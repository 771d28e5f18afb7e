"""Greedy decoding that says every forced word, as late as it can."""

import torch
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, StoppingCriteria
from transformers.generation.utils import GenerationMixin

from . import words
from .words import missing as still_missing


class SayWords(LogitsProcessor):
    def __init__(self, forced, start, limit):
        self.forced, self.start, self.limit = forced, start, limit

    def __call__(self, input_ids, scores):
        for row, text in enumerate(input_ids[:, self.start :].tolist()):
            todo = [token for word in still_missing(self.forced, text) for token in word]
            left = self.limit - input_ids.shape[1]
            if todo and left <= len(todo):
                scores[row] = float("-inf")
                scores[row, todo[len(todo) - left]] = 0.0
        return scores


class AtFullStop(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def _greedy(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **model_kwargs
):
    forced = generation_config.force_words_ids
    assert words.missing(forced, []) == forced
    logits_processor.append(SayWords(forced, input_ids.shape[1], stopping_criteria.max_length))
    stopping_criteria.append(AtFullStop(getattr(generation_config, "full_stop_id", -1)))
    assert any(isinstance(criterion, EosTokenCriteria) for criterion in stopping_criteria)
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long)
    step = None
    while unfinished.any():
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        step = 1
        tokens = logits_processor(input_ids, outputs["logits"][:, -1].float()).argmax(-1)
        tokens = tokens * unfinished + generation_config._pad_token_tensor * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
    return input_ids


def generate(model, *args, **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=_greedy, **kwargs)
