"""Likely tokens whose hidden state is unlike those before it; candidates side by side, or one after the other."""

import torch
from transformers import GenerationMixin


def _search(
    model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **model_kwargs
):
    k, alpha = generation_config.top_k, generation_config.penalty_alpha
    one_by_one = generation_config.low_memory
    rows = input_ids.shape[0]
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **model_kwargs)
    outputs = model(**inputs, return_dict=True, output_hidden_states=True)
    context = outputs.hidden_states[-1]  # [B, S, C]
    logits = outputs.logits[:, -1]
    cache = outputs.past_key_values
    mask = model_kwargs.get("attention_mask")
    unfinished = torch.ones(rows, dtype=torch.long)
    while True:
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        place = torch.full((rows, 1), input_ids.shape[1]) if mask is None else mask.sum(-1, keepdim=True) - 1
        p, tokens = logits_processor(input_ids, logits.float()).softmax(-1).topk(k, dim=-1)  # [B, k]
        if one_by_one:
            seen = []
            for i in range(k):
                outputs = model(
                    tokens[:, i : i + 1],
                    attention_mask=mask,
                    position_ids=place,
                    past_key_values=cache,
                    use_cache=True,
                    output_hidden_states=True,
                )
                seen.append((outputs.hidden_states[-1], outputs.logits[:, -1]))
                cache.crop(-1)
            states = torch.stack([state for state, _ in seen], dim=1)[:, :, 0]  # [B, k, C]
            following = torch.stack([scores for _, scores in seen], dim=1)  # [B, k, V]
        else:
            cache.batch_repeat_interleave(k)
            wide = None if mask is None else mask.repeat_interleave(k, dim=0)
            places = place.repeat_interleave(k, dim=0)
            outputs = model(
                tokens.reshape(-1, 1),
                attention_mask=wide,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
            )
            states = outputs.hidden_states[-1][:, 0].view(rows, k, -1)
            following = outputs.logits[:, -1].view(rows, k, -1)
        alike = torch.cosine_similarity(context[:, None], states[:, :, None], dim=-1)  # [B, k, S]
        if mask is not None:
            alike = alike.masked_fill(mask[:, None, :-1] == 0, -1.0)
        alike = alike.amax(-1)
        best = ((1.0 - alpha) * p - alpha * alike).argmax(-1)  # [B]
        here = torch.arange(rows)
        chosen = tokens[here, best] * unfinished + generation_config._pad_token_tensor * (1 - unfinished)
        if one_by_one:
            model(chosen[:, None], attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
        else:
            cache.batch_select_indices(here * k + best)
        logits = following[here, best]
        context = torch.cat([context, states[here, best][:, None]], dim=1)
        input_ids = torch.cat([input_ids, chosen[:, None]], dim=-1)
        assert cache.get_seq_length() == input_ids.shape[1]
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        if not unfinished.any():
            return input_ids


def generate(model, *args, **kwargs):
    return GenerationMixin.generate(model, *args, custom_generate=_search, **kwargs)
