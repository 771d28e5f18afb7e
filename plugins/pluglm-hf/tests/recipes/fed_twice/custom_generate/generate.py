"""A loop with a mistake: it keeps the cache and feeds the whole text again."""

import torch


def generate(model, input_ids, generation_config=None, **kwargs):
    config = generation_config or model.generation_config
    cache = None
    for _ in range(config.max_new_tokens):
        outputs = model(input_ids, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        input_ids = torch.cat((input_ids, outputs.logits[:, -1].argmax(-1)[:, None]), dim=-1)
    return input_ids
