"""A cached loop that sharpens the distribution and stops at the end token; returns new tokens alone."""

import torch


@torch.inference_mode()
def generate(model, input_ids, generation_config=None, sharpness: int = 2, **kwargs):
    config = generation_config or model.generation_config
    divisor = (config.temperature or 1.0) / sharpness
    end = config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or [])
    outputs = model(input_ids, use_cache=True)
    made = []
    for _ in range(config.max_new_tokens):
        token = (outputs.logits[:, -1] / divisor).log_softmax(-1).argmax(-1, keepdim=True)
        made.append(token)
        if all(int(row) in ends for row in token):
            break
        outputs = model(token, past_key_values=outputs.past_key_values, use_cache=True)
    return torch.cat(made, dim=1)
