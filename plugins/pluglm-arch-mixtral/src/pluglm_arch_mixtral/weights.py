"""Checkpoint names <-> parameter names, as tables. Which tables a model needs follows from its program.

Experts are published one by one ("each"), which is also what Transformers 5 writes unless it is told to save its own
form: all experts of a layer in one tensor, gate above up ("fused").
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pluglm.contracts import (
    Attention,
    DecoderProgram,
    Experts,
    FeedForward,
    Split,
    Stack,
    WeightMap,
    WeightRule,
    rules,
)

ENDS = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
HEAD = {"lm_head.weight": "head.weight"}
ATTENTION = {
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attn.v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attn.o.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm_in.weight",
}
BIASES = {
    "model.layers.{}.self_attn.q_proj.bias": "layers.{}.attn.q.bias",
    "model.layers.{}.self_attn.k_proj.bias": "layers.{}.attn.k.bias",
    "model.layers.{}.self_attn.v_proj.bias": "layers.{}.attn.v.bias",
    "model.layers.{}.self_attn.o_proj.bias": "layers.{}.attn.o.bias",
}
QK_NORMS = {
    "model.layers.{}.self_attn.q_norm.weight": "layers.{}.attn.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "layers.{}.attn.k_norm.weight",
}
DENSE = {
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.mlp.gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.up.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.mlp.down.weight",
}
IGNORED = {"*.rotary_emb.inv_freq": "computed from the config; older files repeat it"}
#: Files of a decoder saved without its head leave the first one out.
PREFIXES = ("model.", "")


@dataclass(frozen=True)
class Published:
    """Where a family's files keep the experts one by one. gate, up, down: what they call an expert's matrices."""

    place: str
    gate: str
    up: str
    down: str


def mixtral_weights(program: DecoderProgram) -> WeightMap:
    """The map of one Mixtral."""
    return _weight_map(program, Published("block_sparse_moe", "w1", "w3", "w2"))


def qwen3_moe_weights(program: DecoderProgram) -> WeightMap:
    """The map of one Qwen 3 MoE."""
    return _weight_map(program, Published("mlp", "gate_proj", "up_proj", "down_proj"))


def _weight_map(program: DecoderProgram, published: Published) -> WeightMap:
    found = rules(ENDS)
    for i, layer in enumerate(program.layers):
        attn, mlp = (branch.parts[0].op for branch in layer.branches)
        assert isinstance(attn, Attention), "program.py puts attention first"
        assert isinstance(mlp, Experts | FeedForward), "and experts or a feed-forward second"
        table = ATTENTION | (BIASES if attn.q_bias else {}) | (QK_NORMS if attn.qk_norm is not None else {})
        found += rules(table if isinstance(mlp, Experts) else table | DENSE, layers=[i])
        if isinstance(mlp, Experts):
            found += [*_each(i, mlp, published), *_fused(i, mlp)]
    (head,) = rules(HEAD)
    if program.head.tied:  # some files repeat the embedding under the head's name
        head = WeightRule(head.sources, head.targets, optional=True, tied_to="embed.weight")
    return WeightMap((*found, head), IGNORED, PREFIXES)


def _each(layer: int, op: Experts, published: Published) -> list[WeightRule]:
    """Every expert's matrices by themselves, each [F, C] or [C, F]."""
    place, target = f"model.layers.{layer}.{published.place}", f"layers.{layer}.mlp"
    found = rules({f"{place}.gate.weight": f"{target}.router.weight"})
    for name, spelled in (("gate", published.gate), ("up", published.up), ("down", published.down)):
        sources = tuple(f"{place}.experts.{e}.{spelled}.weight" for e in range(op.num_experts))
        found.append(WeightRule(sources, (f"{target}.{name}.weight",), Stack()))
    return [replace(rule, layout="each") for rule in found]


def _fused(layer: int, op: Experts) -> list[WeightRule]:
    """gate_up_proj [E, 2F, C], down_proj [E, C, F]."""
    place, target, F = f"model.layers.{layer}.mlp", f"layers.{layer}.mlp", op.expert.intermediate_size
    gate_up = (f"{target}.gate.weight", f"{target}.up.weight")
    found = [
        *rules({f"{place}.gate.weight": f"{target}.router.weight"}),
        WeightRule((f"{place}.experts.gate_up_proj",), gate_up, Split((F, F), dim=1)),
        *rules({f"{place}.experts.down_proj": f"{target}.down.weight"}),
    ]
    return [replace(rule, layout="fused") for rule in found]
