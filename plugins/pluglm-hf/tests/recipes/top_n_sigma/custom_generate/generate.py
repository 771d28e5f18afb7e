"""Keeps tokens within n standard deviations of the best one and draws among them."""

import torch


@torch.inference_mode()
def generate(model, input_ids, generation_config=None, n_sigma: float = 1.0, **kwargs):
    config = generation_config or model.generation_config
    temperature = config.temperature or 1.0
    end = input_ids.shape[1] + config.max_new_tokens
    while input_ids.shape[1] < end:
        logits = model(input_ids).logits[:, -1, :] / temperature
        least = logits.max(dim=-1, keepdim=True).values - n_sigma * logits.std(dim=-1, keepdim=True)
        p = logits.masked_fill(logits < least, float("-inf")).softmax(dim=-1)
        input_ids = torch.cat([input_ids, torch.multinomial(p, num_samples=1)], dim=-1)
    return input_ids
