"""The strategy: in the style of the Hub's callables, it returns the bare sequences."""

import torch

from acme_decoding import CALLS


class Banned:
    name = "banned"
    fields = frozenset({"max_new_tokens"})
    needs = frozenset()

    def __init__(self, token):
        self.token = token

    def __call__(
        self,
        model,
        input_ids,
        logits_processor=None,
        stopping_criteria=None,
        generation_config=None,
        streamer=None,
        **model_kwargs,
    ):
        cache, sequences, count = None, input_ids, generation_config.max_new_tokens
        for _ in range(count):
            past = cache.length if cache is not None else 0
            output = model(sequences[:, past:], past_key_values=cache, use_cache=True, logits_to_keep=1, **model_kwargs)
            cache, scores = output.past_key_values, output.logits[:, -1].clone()
            if self.token is not None:
                scores[:, self.token] = -torch.inf
            sequences = torch.cat((sequences, scores.argmax(-1, keepdim=True)), dim=1)
            CALLS["chosen"] += 1
        return sequences
