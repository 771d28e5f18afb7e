"""One tiny model for each type of layer, as programs with random weights, and a plugin that loads a program as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pluglm import hookimpl
from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    Embedding,
    Experts,
    FeedForward,
    Head,
    KVSlot,
    LatentAttention,
    LatentSlot,
    Layer,
    MaskSpec,
    ModelDescription,
    ModelModule,
    ModelParts,
    Norm,
    Part,
    Rope,
    SharedSlot,
    Slot,
    StateSpace,
    WeightMap,
    WeightRule,
)
from pluglm.contracts.program import Op

HIDDEN, VOCAB, LENGTH = 24, 61, 96
NORM = Norm("rms", HIDDEN, 1e-5)
ROPE = Rope("default", 100.0, 8, max_seq_len=LENGTH)
#: Both are far shorter than the texts that the tests generate.
WINDOW, CHUNK = 7, 8


class ProgramArchitecture:
    """`config.json` holds the program; tensors have the names of the parameters."""

    @hookimpl
    def pluglm_describe_model(self, config: Mapping[str, Any]) -> ModelDescription:
        program = DecoderProgram.from_json(config["program"])
        rules = tuple(WeightRule((name,), (name,)) for name in config["names"])
        return ModelDescription(
            "program", program, WeightMap(rules), VOCAB, HIDDEN, len(program.layers), program.max_seq_len,
            program.attention_specs(), program.slots, used=("model_type", "program", "names", "dtype"),
        )  # fmt: skip

    @hookimpl
    def pluglm_build_model(self, parts: ModelParts) -> ModelModule:
        from pluglm_blocks import build_decoder

        assert parts.description.program is not None
        return build_decoder(parts.description.program, parts)


def _attention(slot: int, spec: AttentionSpec, **more: Any) -> Attention:
    return Attention(spec, slot, **{"rope": ROPE, **more})


def _spec(kv_heads: int = 2, **more: Any) -> AttentionSpec:
    return AttentionSpec(4, kv_heads, 8, 8, 8**-0.5, **more)


def _program(*layers: tuple[Op, ...], slots: tuple[Slot, ...], max_seq_len: int | None = LENGTH) -> DecoderProgram:
    """Each layer's mixers side by side in one branch, then a feed-forward."""
    mlp = Branch((Part("mlp", FeedForward(HIDDEN, 40, "silu"), NORM),))

    def layer(mixers: tuple[Op, ...]) -> Layer:
        parts = tuple(Part(f"mixer{i}", op, NORM) for i, op in enumerate(mixers))
        return Layer((Branch(parts), mlp))

    head = Head(tied=False)
    return DecoderProgram(Embedding(VOCAB, HIDDEN), tuple(map(layer, layers)), NORM, head, slots, max_seq_len)


def _uniform(spec: AttentionSpec, **more: Any) -> DecoderProgram:
    """Two layers of one kind of attention."""
    slot = KVSlot(spec.num_kv_heads, 8, 8, window=spec.mask.window, chunk=spec.mask.chunk)
    return _program(*((_attention(i, spec, **more),) for i in range(2)), slots=(slot, slot))


def _mixed(first: AttentionSpec, second: AttentionSpec) -> DecoderProgram:
    specs = (first, second, first)
    slots = tuple(KVSlot(s.num_kv_heads, 8, 8, window=s.mask.window, chunk=s.mask.chunk) for s in specs)
    return _program(*((_attention(i, spec),) for i, spec in enumerate(specs)), slots=slots)


def _shared() -> DecoderProgram:
    layers = [(_attention(i, _spec()),) for i in range(2)]
    return _program(*layers, slots=(KVSlot(2, 8, 8), SharedSlot(0)))


def _latent() -> DecoderProgram:
    spec = AttentionSpec(4, 4, 14, 10, 14**-0.5)
    op = LatentAttention(spec, 0, nope_dim=6, rope=ROPE, q_rank=None, kv_rank=12, norm_eps=1e-5)
    return _program((op,), (replace(op, slot=1),), slots=(LatentSlot(12, 8), LatentSlot(12, 8)))


def _state(*, attention: bool) -> DecoderProgram:
    op = StateSpace(0, 32, 4, 8, 2, 6, 4, 8, Norm("rms", 32, 1e-5))
    if attention:
        return _program((_attention(1, _spec()), op), slots=(op.state_slot, KVSlot(2, 8, 8)))
    return _program((op,), (replace(op, slot=1),), slots=(op.state_slot, op.state_slot), max_seq_len=None)


def _experts() -> DecoderProgram:
    plain = _uniform(_spec())
    mlp = Branch((Part("mlp", Experts(FeedForward(HIDDEN, 16, "silu"), 5, 2), NORM),))
    return replace(plain, layers=tuple(Layer((layer.branches[0], mlp)) for layer in plain.layers))


_WINDOWED = _spec(mask=MaskSpec(window=WINDOW))
_CHUNKED = _spec(mask=MaskSpec(chunk=CHUNK))
#: What a reader calls the layers -> a program with them.
PROGRAMS: dict[str, DecoderProgram] = {
    "full": _uniform(_spec(kv_heads=4)),
    "grouped heads": _uniform(_spec()),
    "sliding window": _uniform(_WINDOWED),
    "window and full": _mixed(_WINDOWED, _spec()),
    "chunks": _uniform(_CHUNKED),
    "chunks and full": _mixed(_CHUNKED, _spec()),
    "soft cap": _uniform(_spec(softcap=3.0)),
    "sinks": _uniform(_spec(sinks=True)),
    "ALiBi": _uniform(_spec(alibi_slopes=(0.5, 0.25, 0.125, 0.0625)), rope=None),
    "relative buckets": _uniform(_spec(bias=True), rope=None, relative_buckets=(8, 20)),
    "shared keys": _shared(),
    "experts": _experts(),
    "latent": _latent(),
    "state space": _state(attention=False),
    "state and attention": _state(attention=True),
}


def write_model(name: str, folder: Path) -> Path:
    """A checkpoint of one program in float32, the same weights each time."""
    from pluglm_attention_eager import pluglm_build_attention
    from pluglm_blocks import build_decoder

    from pluglm.contracts import AttentionRequest

    program = PROGRAMS[name]
    specs = program.attention_specs()
    backend = pluglm_build_attention(request=AttentionRequest(specs, "cpu", "float32")) if specs else None
    description = ModelDescription(
        "program", program, WeightMap(()), VOCAB, HIDDEN, len(program.layers), LENGTH, specs, program.slots
    )
    module = build_decoder(program, ModelParts(description, backend, {}, "cpu", "float32"))
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    tensors = {}
    for key, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        near_one = parameter.ndim == 1 and "norm" in key
        tensors[key] = 1 + 0.3 * noise if near_one else 1.5 * noise / max(1, parameter.shape[-1]) ** 0.5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "program", "program": program.to_json(), "names": list(tensors), "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
