"""Greedy decoding that never says some words: by their ids, or by their texts with a tokenizer."""

import torch
from transformers.generation.utils import GenerationMixin


def _greedy(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    synced_gpus=False,
    tokenizer=None,
    never=(),
    penalty: float = 1e4,
    streamer=None,
    **model_kwargs,
):
    ids = [word if isinstance(word, int) else tokenizer.convert_tokens_to_ids(word) for word in never]
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long)
    step = None
    while unfinished.any():
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=step, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        step = 1
        scores = logits_processor(input_ids, outputs.logits[:, -1].float())
        scores[:, ids] -= penalty
        tokens = scores.argmax(-1)
        tokens = tokens * unfinished + generation_config._pad_token_tensor * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
    if streamer is not None:
        streamer.end()
    return input_ids


def generate(model, *args, never=(), **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=_greedy, never=never, **kwargs)
