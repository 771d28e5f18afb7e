"""Checkpoint names <-> parameter names. The experts' gate and up alternate in one tensor, and products are x @ W."""

from __future__ import annotations

from pluglm.contracts import (
    Attention,
    Chain,
    DecoderProgram,
    Experts,
    SplitGroups,
    Transpose,
    WeightMap,
    WeightRule,
    rules,
)

TABLE = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attn.v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attn.o.weight",
    "model.layers.{}.self_attn.sinks": "layers.{}.attn.sinks",
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm_in.weight",
    "model.layers.{}.mlp.router.weight": "layers.{}.mlp.router.weight",
    "model.layers.{}.mlp.router.bias": "layers.{}.mlp.router.bias",
    "model.layers.{}.mlp.experts.down_proj_bias": "layers.{}.mlp.down.bias",
    "model.norm.weight": "norm.weight",
}
BIASES = {
    "model.layers.{}.self_attn.q_proj.bias": "layers.{}.attn.q.bias",
    "model.layers.{}.self_attn.k_proj.bias": "layers.{}.attn.k.bias",
    "model.layers.{}.self_attn.v_proj.bias": "layers.{}.attn.v.bias",
    "model.layers.{}.self_attn.o_proj.bias": "layers.{}.attn.o.bias",
}
HEAD = {"lm_head.weight": "head.weight"}
IGNORED = {"*.rotary_emb.inv_freq": "computed from the config; older files repeat it"}
#: Files of a decoder saved without its head leave the first one out.
PREFIXES = ("model.", "")


def weight_map(program: DecoderProgram) -> WeightMap:
    """The map of one model. All its layers have the same parameters, so the first one tells."""
    attn, mlp = (branch.parts[0].op for branch in program.layers[0].branches)
    assert isinstance(attn, Attention), "program.py puts attention first"
    assert isinstance(mlp, Experts), "and experts second"
    layers = range(len(program.layers))
    found = rules(TABLE | BIASES if attn.q_bias else TABLE, layers=layers)
    found += [rule for i in layers for rule in _experts(i, mlp.expert.intermediate_size)]
    (head,) = rules(HEAD)
    if program.head.tied:  # some files repeat the embedding under the head's name
        head = WeightRule(head.sources, head.targets, optional=True, tied_to="embed.weight")
    return WeightMap((*found, head), IGNORED, PREFIXES)


def _experts(layer: int, size: int) -> list[WeightRule]:
    """gate_up_proj [E, C, 2F] and its bias [E, 2F], even columns gate, odd ones up; down_proj [E, F, C]."""
    place, target = f"model.layers.{layer}.mlp.experts", f"layers.{layer}.mlp"
    weights, biases = ((f"{target}.gate.{name}", f"{target}.up.{name}") for name in ("weight", "bias"))
    dealt = Chain((SplitGroups(size, (1, 1), dim=2), Transpose()))  # in this order one copy is made, not two
    return [
        WeightRule((f"{place}.gate_up_proj",), weights, dealt),
        WeightRule((f"{place}.gate_up_proj_bias",), biases, SplitGroups(size, (1, 1), dim=1)),
        WeightRule((f"{place}.down_proj",), (f"{target}.down.weight",), Transpose()),
    ]
