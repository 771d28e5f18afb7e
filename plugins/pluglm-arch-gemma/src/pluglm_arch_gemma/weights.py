"""Checkpoint names <-> parameter names, as tables. Which tables a model needs follows from its program."""

from __future__ import annotations

from pluglm.contracts import Attention, DecoderProgram, WeightMap, WeightRule, rules

ENDS = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
HEAD = {"lm_head.weight": "head.weight"}
PROJECTIONS = {
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attn.v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attn.o.weight",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.mlp.gate.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.up.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.mlp.down.weight",
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
#: One name, two places: "post_attention" is the norm before the feed-forward in the first generation …
NORMS_BEFORE = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm_in.weight",
}
#: … and the norm after attention in the later ones.
NORMS_AROUND = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.attn_norm_out.weight",
    "model.layers.{}.pre_feedforward_layernorm.weight": "layers.{}.mlp_norm_in.weight",
    "model.layers.{}.post_feedforward_layernorm.weight": "layers.{}.mlp_norm_out.weight",
}
IGNORED = {"*.rotary_emb.inv_freq": "computed from the config; older files repeat it"}
#: Files of a decoder saved without its head leave the first one out.
PREFIXES = ("model.", "")


def weight_map(program: DecoderProgram) -> WeightMap:
    """The map of one model. All layers of these families have the same parameters, so the first one tells."""
    attn = program.layers[0].branches[0].parts[0]
    assert isinstance(attn.op, Attention), "program.py puts attention first"
    table = {**ENDS, **PROJECTIONS, **(NORMS_AROUND if attn.norm_out else NORMS_BEFORE)}
    table |= BIASES if attn.op.q_bias else {}
    table |= QK_NORMS if attn.op.qk_norm is not None else {}
    (head,) = rules(HEAD)
    if program.head.tied:  # some files repeat the embedding under the head's name
        head = WeightRule(head.sources, head.targets, optional=True, tied_to="embed.weight")
    return WeightMap((*rules(table, layers=range(len(program.layers))), head), IGNORED, PREFIXES)
