"""Test-only parts: a backend and a cache that follow the contracts and nothing else, and a small program."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from pluglm_blocks import build_decoder

from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    DenseView,
    Embedding,
    FeedForward,
    ForwardInput,
    Head,
    KeyInfo,
    KVSlot,
    Layer,
    MaskSpec,
    ModelDescription,
    ModelParts,
    Norm,
    Part,
    Rope,
    WeightMap,
)

B, H, K, D, C, F, V = 2, 6, 3, 8, 20, 28, 37
ROPE = Rope("default", 100.0, D)


class PlainAttention:
    """softmax in float32, the mask from positions alone; counts its calls."""

    name, views = "plain", ("dense",)

    def __init__(self) -> None:
        self.prepared: list[tuple[AttentionSpec, KeyInfo]] = []
        self.extras: list[tuple] = []

    def refusals(self, spec):
        return ["no chunks here"] if spec.mask.chunk is not None else []

    def prepare(self, spec, q_positions, keys):
        self.prepared.append((spec, keys))
        q, k = q_positions[:, :, None], keys.positions[:, None, :]
        seen = (k >= 0) & (q >= 0)
        if spec.mask.causal:
            seen = seen & (k <= q)
        if spec.mask.window is not None:
            seen = seen & (q - k < spec.mask.window)
        if keys.segments is not None:
            seen = seen & (keys.segments[:, None, :] == keys.q_segments[:, :, None])
        return seen[:, None]  # [B, 1, T, S]

    def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
        self.extras.append((sinks, bias))
        k, v = (t.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1).float() for t in view.dense())
        s = q.float() @ k.transpose(-1, -2) * spec.scale
        if bias is not None:
            s = s + bias
        s = s.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            s = torch.cat((s, sinks.view(1, -1, 1, 1).expand(*s.shape[:3], 1)), -1)
        p = torch.nan_to_num(s.softmax(-1))
        return (p[..., : k.shape[2]] @ v).to(q.dtype)


@dataclass
class ListStep:
    count: int
    info: KeyInfo
    asked: list[int]

    def keys(self, slot):
        self.asked.append(slot)
        return self.info


class ListCache:
    """Concatenates; the least that `begin`, `append` and `commit` may be."""

    def __init__(self) -> None:
        self.length, self.cells, self.past, self.new, self.steps = 0, None, {}, {}, []

    def begin(self, positions, *, dense=False, prefix_lengths=None, segments=None):
        cells = (positions, segments)
        if self.cells is not None:
            cells = tuple(None if b is None else torch.cat((a, b), 1) for a, b in zip(self.cells, cells, strict=True))
        self.pending = cells
        info = KeyInfo(cells[0], cells[0].shape[1], dense, prefix_lengths, cells[1], segments)
        self.steps.append(ListStep(positions.shape[1], info, []))
        return self.steps[-1]

    def append(self, slot, k, v, step):
        if slot in self.past:
            k, v = torch.cat((self.past[slot][0], k), 2), torch.cat((self.past[slot][1], v), 2)
        self.new[slot] = (k, v)
        return DenseView(k, v)

    def commit(self, step):
        self.length, self.cells, self.past = self.length + step.count, self.pending, dict(self.new)


def attention(slot=0, *, window=None, rope=ROPE, **changes):
    spec = AttentionSpec(H, K, D, D, D**-0.5, MaskSpec(window=window))
    spec = replace(spec, **changes.pop("spec", {}))
    return Attention(spec, slot, rope, **changes)


def norm(**changes):
    return replace(Norm("rms", C, 1e-5), **changes)


def layer(slot=0, **changes):
    return Layer(
        (
            Branch((Part("attn", attention(slot, **changes), norm_in=norm()),)),
            Branch((Part("mlp", FeedForward(C, F, "silu"), norm_in=norm()),)),
        )
    )


def program(*layers, **changes):
    layers = layers or (layer(0), layer(1, window=3))
    slots = changes.pop("slots", tuple(KVSlot(K, D, D) for _ in layers))
    made = DecoderProgram(Embedding(V, C), layers, norm(), Head(tied=False), slots, max_seq_len=64)
    return replace(made, **changes)


def build(made, *, backend=None, kernels=None, dtype="float32", seed=0, attention=True):
    description = ModelDescription("toy", made, WeightMap(()), V, C, len(made.layers), 64, (), made.slots)
    backend = (backend or PlainAttention()) if attention else None
    module = build_decoder(made, ModelParts(description, backend, kernels or {}, "cpu", dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.is_meta:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def run(module, token_ids=None, *, positions=None, cache=None, **inputs):
    """One pass; positions counted from the cache if not given."""
    past, T = (
        (cache.length if cache is not None else 0),
        (token_ids if token_ids is not None else inputs["embeds"]).shape[1],
    )
    inputs.setdefault("dense", positions is None)
    positions = torch.arange(past, past + T)[None] if positions is None else positions
    with torch.no_grad():
        return module(ForwardInput(token_ids, positions, cache, **inputs))


@pytest.fixture(scope="session")
def toy():
    """The parts above, for test modules (which cannot import each other)."""
    return SimpleNamespace(
        PlainAttention=PlainAttention, ListCache=ListCache, attention=attention, norm=norm, layer=layer,
        program=program, build=build, run=run, B=B, H=H, K=K, D=D, C=C, F=F, V=V,
    )  # fmt: skip


@pytest.fixture
def ids():
    return torch.randint(V, (B, 11), generator=torch.Generator().manual_seed(7))
