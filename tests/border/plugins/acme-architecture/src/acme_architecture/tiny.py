"""The module: it honours `pluglm.contracts.ModelModule`, and asks for attention and cache by their contracts."""

import torch
from torch import nn

from acme_architecture import CALLS
from pluglm.contracts import DenseView, ForwardOutput, KeyInfo


class Layer(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.up, self.down = nn.Linear(C, 2 * C, bias=False), nn.Linear(2 * C, C, bias=False)


class Tiny(nn.Module):
    def __init__(self, config, parts):
        super().__init__()
        C = config["width"]
        self.embed, self.places = nn.Embedding(config["vocab"], C), nn.Embedding(config["places"], C)
        self.layers = nn.ModuleList(Layer(C) for _ in range(config["depth"]))
        self.head = nn.Linear(C, config["vocab"], bias=False)
        self.backend, (self.spec,) = parts.attention, parts.description.attention

    def forward(self, inputs):
        CALLS["forward"] += 1
        cache, positions = inputs.cache, inputs.positions
        x = self.embed(inputs.token_ids) if inputs.embeds is None else inputs.embeds
        x = x + self.places(positions.clamp(min=0))  # [B, T, C]
        B, T, C = x.shape
        step = cache.begin(positions, dense=inputs.dense) if cache is not None else None
        keys = step.keys(0) if step is not None else KeyInfo(positions, T, inputs.dense)
        mask = self.backend.prepare(self.spec, positions, keys)
        states = []
        for i, layer in enumerate(self.layers):
            states.append(x)
            heads = layer.qkv(x).view(B, T, 3, self.spec.num_heads, self.spec.head_dim)
            q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
            view = cache.append(i, k, v, step) if step is not None else DenseView(k, v)
            o = self.backend.attend(q, view, self.spec, mask)
            x = x + layer.out(o.transpose(1, 2).reshape(B, T, C))
            x = x + layer.down(torch.relu(layer.up(x)))
        states.append(x)
        keep = inputs.logits_to_keep
        logits = self.head(x[:, keep] if isinstance(keep, torch.Tensor) else x if keep == 0 else x[:, -keep:])
        if step is not None:
            cache.commit(step)
        return ForwardOutput(logits, tuple(states) if inputs.output_hidden_states else None)
