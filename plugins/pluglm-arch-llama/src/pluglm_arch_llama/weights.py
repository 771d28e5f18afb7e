"""Checkpoint names <-> parameter names, as tables. Which tables a model needs follows from its program."""

from __future__ import annotations

from pluglm.contracts import Attention, DecoderProgram, FeedForward, WeightMap, WeightRule, rules

EMBEDDING = {"model.embed_tokens.weight": "embed.weight"}
FINAL_NORM = {"model.norm.weight": "norm.weight"}
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
QKV_BIASES = {
    "model.layers.{}.self_attn.q_proj.bias": "layers.{}.attn.q.bias",
    "model.layers.{}.self_attn.k_proj.bias": "layers.{}.attn.k.bias",
    "model.layers.{}.self_attn.v_proj.bias": "layers.{}.attn.v.bias",
}
O_BIAS = {"model.layers.{}.self_attn.o_proj.bias": "layers.{}.attn.o.bias"}
MLP_BIASES = {
    "model.layers.{}.mlp.gate_proj.bias": "layers.{}.mlp.gate.bias",
    "model.layers.{}.mlp.up_proj.bias": "layers.{}.mlp.up.bias",
    "model.layers.{}.mlp.down_proj.bias": "layers.{}.mlp.down.bias",
}
QK_NORMS = {
    "model.layers.{}.self_attn.q_norm.weight": "layers.{}.attn.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "layers.{}.attn.k_norm.weight",
}
NORMS_BEFORE = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm_in.weight",
}
NORMS_AFTER = {
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.attn_norm_out.weight",
    "model.layers.{}.post_feedforward_layernorm.weight": "layers.{}.mlp_norm_out.weight",
}
IGNORED = {"*.rotary_emb.inv_freq": "computed from the config; older files repeat it"}
#: Files of a decoder saved without its head leave the first one out.
PREFIXES = ("model.", "")


def weight_map(program: DecoderProgram) -> WeightMap:
    """The map of one model. All layers of these families have the same parameters, so the first one tells."""
    attn, mlp = (branch.parts[0] for branch in program.layers[0].branches)
    assert isinstance(attn.op, Attention), "families.py puts attention first"
    assert isinstance(mlp.op, FeedForward), "and the feed-forward second"
    table = {**EMBEDDING, **PROJECTIONS, **(NORMS_BEFORE if attn.norm_in else NORMS_AFTER)}
    for wanted, more in (
        (attn.op.q_bias, QKV_BIASES),
        (attn.op.o_bias, O_BIAS),
        (mlp.op.bias, MLP_BIASES),
        (attn.op.qk_norm is not None, QK_NORMS),
    ):
        table |= more if wanted else {}
    table |= FINAL_NORM
    found = rules(table, layers=range(len(program.layers)))
    (head,) = rules(HEAD)
    if program.head.tied:  # some files repeat the embedding under the head's name
        head = WeightRule(head.sources, head.targets, optional=True, tied_to="embed.weight")
    return WeightMap((*found, head), IGNORED, PREFIXES)
