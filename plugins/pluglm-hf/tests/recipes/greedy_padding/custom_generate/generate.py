"""Greedy decoding by forward calls alone, with pad tokens before the prompt if asked for."""

import torch


def generate(model, input_ids, generation_config=None, left_padding=None, **kwargs):
    config = generation_config or model.generation_config
    length = input_ids.shape[1]
    limit = config.max_length or length + config.max_new_tokens
    if left_padding is not None:
        if not isinstance(left_padding, int) or left_padding < 0:
            raise ValueError(f"left_padding must be a count, got {left_padding}")
        pad = kwargs.get("pad_token") or config.pad_token_id or model.config.pad_token_id
        if pad is None:
            raise ValueError("there is no pad token")
        pads = torch.full((input_ids.shape[0], left_padding), pad, dtype=input_ids.dtype, device=input_ids.device)
        input_ids = torch.cat((pads, input_ids), dim=1)
        length = input_ids.shape[1]
    while length < limit:
        logits = model(input_ids).logits
        best = torch.argmax(logits[:, -1, :], dim=-1)
        input_ids = torch.cat((input_ids, best[:, None]), dim=-1)
        length += 1
    return input_ids
