"""Checkpoint names <-> parameter names, as tables. Which tables a model needs follows from its program."""

from __future__ import annotations

from dataclasses import replace

from pluglm.contracts import Attention, DecoderProgram, FeedForward, StateSpace, WeightMap, WeightRule, rules

ENDS = {"model.embed_tokens.weight": "embed.weight", "model.final_layernorm.weight": "norm.weight"}
LAYER = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.k.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attn.v.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attn.o.weight",
    "model.layers.{}.mamba.in_proj.weight": "layers.{}.ssm.in_proj.weight",
    "model.layers.{}.mamba.conv1d.weight": "layers.{}.ssm.conv.weight",
    "model.layers.{}.mamba.dt_bias": "layers.{}.ssm.dt_bias",
    "model.layers.{}.mamba.A_log": "layers.{}.ssm.A_log",
    "model.layers.{}.mamba.D": "layers.{}.ssm.D",
    "model.layers.{}.mamba.out_proj.weight": "layers.{}.ssm.out_proj.weight",
    "model.layers.{}.pre_ff_layernorm.weight": "layers.{}.mlp_norm_in.weight",
    "model.layers.{}.feed_forward.gate_proj.weight": "layers.{}.mlp.gate.weight",
    "model.layers.{}.feed_forward.up_proj.weight": "layers.{}.mlp.up.weight",
    "model.layers.{}.feed_forward.down_proj.weight": "layers.{}.mlp.down.weight",
}
ATTENTION_BIASES = {
    "model.layers.{}.self_attn.q_proj.bias": "layers.{}.attn.q.bias",
    "model.layers.{}.self_attn.k_proj.bias": "layers.{}.attn.k.bias",
    "model.layers.{}.self_attn.v_proj.bias": "layers.{}.attn.v.bias",
    "model.layers.{}.self_attn.o_proj.bias": "layers.{}.attn.o.bias",
}
MIXER_NORM = {"model.layers.{}.mamba.norm.weight": "layers.{}.ssm.norm.weight"}
CONV_BIAS = {"model.layers.{}.mamba.conv1d.bias": "layers.{}.ssm.conv.bias"}
IN_BIAS = {"model.layers.{}.mamba.in_proj.bias": "layers.{}.ssm.in_proj.bias"}
OUT_BIAS = {"model.layers.{}.mamba.out_proj.bias": "layers.{}.ssm.out_proj.bias"}
MLP_BIASES = {
    "model.layers.{}.feed_forward.gate_proj.bias": "layers.{}.mlp.gate.bias",
    "model.layers.{}.feed_forward.up_proj.bias": "layers.{}.mlp.up.bias",
    "model.layers.{}.feed_forward.down_proj.bias": "layers.{}.mlp.down.bias",
}
IGNORED = {
    "*.rotary_emb.inv_freq": "computed from the config; older files repeat it",
    "*.mamba.mup_vector": "made of the config's ssm_multipliers; older files repeat it",
}
#: Files of a decoder saved without its head leave the first one out.
PREFIXES = ("model.", "")


def weight_map(program: DecoderProgram) -> WeightMap:
    """The map of one model. All layers have the same parameters, so the first one tells."""
    mixers, (mlp,) = (branch.parts for branch in program.layers[0].branches)
    attention, mixer = (part.op for part in mixers)
    assert isinstance(attention, Attention), "falcon_h1.py puts attention first"
    assert isinstance(mixer, StateSpace), "the mixer beside it"
    assert isinstance(mlp.op, FeedForward), "and the feed-forward last"
    table = {**ENDS, **LAYER}
    for wanted, more in (
        (attention.q_bias, ATTENTION_BIASES),
        (mixer.norm is not None, MIXER_NORM),
        (mixer.conv_bias, CONV_BIAS),
        (mixer.in_bias, IN_BIAS),
        (mixer.out_bias, OUT_BIAS),
        (mlp.op.bias, MLP_BIASES),
    ):
        table |= more if wanted else {}
    head = WeightRule(("lm_head.weight",), ("head.weight",))
    if program.head.tied:  # some files repeat the embedding under the head's name
        head = replace(head, optional=True, tied_to="embed.weight")
    return WeightMap((*rules(table, layers=range(len(program.layers))), head), IGNORED, PREFIXES)
