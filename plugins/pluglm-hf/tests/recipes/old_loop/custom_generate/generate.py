"""A greedy loop as it was written before transformers 5.3: the model finds out which tokens are new."""

import torch
from transformers.generation.utils import GenerationMixin


def _greedy(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **model_kwargs
):
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long)
    if hasattr(model, "_get_initial_cache_position"):
        model_kwargs = model._get_initial_cache_position(input_ids.shape[1], input_ids.device, model_kwargs)
    while unfinished.any():
        inputs = model.prepare_inputs_for_generation(input_ids, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        tokens = logits_processor(input_ids, outputs.logits[:, -1].float()).argmax(-1)
        tokens = tokens * unfinished + generation_config._pad_token_tensor * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
    return input_ids


def generate(model, *args, **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=_greedy, **kwargs)
