"""Checkpoint names <-> parameter names: tables for Phi, and for Phi-3 two tensors that hold several parameters."""

from __future__ import annotations

from pluglm.contracts import Attention, DecoderProgram, FeedForward, Split, WeightMap, WeightRule, rules

EMBEDDING = {"model.embed_tokens.weight": "embed.weight"}
HEAD = "lm_head.weight"

PHI = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "model.layers.{}.input_layernorm.bias": "layers.{}.attn_norm_in.bias",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q.weight",
    "model.layers.{}.self_attn.q_proj.bias": "layers.{}.attn.q.bias",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.k.weight",
    "model.layers.{}.self_attn.k_proj.bias": "layers.{}.attn.k.bias",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attn.v.weight",
    "model.layers.{}.self_attn.v_proj.bias": "layers.{}.attn.v.bias",
    "model.layers.{}.self_attn.dense.weight": "layers.{}.attn.o.weight",
    "model.layers.{}.self_attn.dense.bias": "layers.{}.attn.o.bias",
    "model.layers.{}.mlp.fc1.weight": "layers.{}.mlp.up.weight",
    "model.layers.{}.mlp.fc1.bias": "layers.{}.mlp.up.bias",
    "model.layers.{}.mlp.fc2.weight": "layers.{}.mlp.down.weight",
    "model.layers.{}.mlp.fc2.bias": "layers.{}.mlp.down.bias",
    "model.final_layernorm.weight": "norm.weight",
    "model.final_layernorm.bias": "norm.bias",
    "lm_head.bias": "head.bias",
}
PHI_QK_NORMS = {
    "model.layers.{}.self_attn.q_layernorm.weight": "layers.{}.attn.q_norm.weight",
    "model.layers.{}.self_attn.q_layernorm.bias": "layers.{}.attn.q_norm.bias",
    "model.layers.{}.self_attn.k_layernorm.weight": "layers.{}.attn.k_norm.weight",
    "model.layers.{}.self_attn.k_layernorm.bias": "layers.{}.attn.k_norm.bias",
}
PHI3 = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attn.o.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm_in.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.mlp.down.weight",
    "model.norm.weight": "norm.weight",
}
IGNORED = {"*.rotary_emb.inv_freq": "computed from the config; older files repeat it"}
#: Files of a decoder saved without its head leave the first one out.
PREFIXES = ("model.", "")


def phi_weight_map(program: DecoderProgram) -> WeightMap:
    """One to one. All layers have the same parameters, so the first one tells."""
    op = program.ops()[0]
    assert isinstance(op, Attention), "families.py puts attention first"
    table = {**EMBEDDING, **PHI, **(PHI_QK_NORMS if op.qk_norm is not None else {})}
    found = rules(table, layers=range(len(program.layers)))
    return WeightMap((*found, _head(program)), IGNORED, PREFIXES)


def phi3_weight_map(program: DecoderProgram) -> WeightMap:
    """One to one, but for q over k over v in one tensor, and gate over up in another."""
    fused = [rule for i in range(len(program.layers)) for rule in _fused(program, i)]
    table = rules({**EMBEDDING, **PHI3}, layers=range(len(program.layers)))
    return WeightMap((*table, *fused, _head(program)), IGNORED, PREFIXES)


def _fused(program: DecoderProgram, i: int) -> tuple[WeightRule, WeightRule]:
    attn, mlp = (branch.parts[0].op for branch in program.layers[i].branches)
    assert isinstance(attn, Attention), "families.py puts attention first"
    assert isinstance(mlp, FeedForward), "and the feed-forward second"
    q, kv = attn.spec.num_heads * attn.spec.head_dim, attn.spec.num_kv_heads * attn.spec.head_dim
    return (
        WeightRule(
            (f"model.layers.{i}.self_attn.qkv_proj.weight",),
            tuple(f"layers.{i}.attn.{name}.weight" for name in "qkv"),
            Split((q, kv, kv)),
        ),
        WeightRule(
            (f"model.layers.{i}.mlp.gate_up_proj.weight",),
            tuple(f"layers.{i}.mlp.{name}.weight" for name in ("gate", "up")),
            Split((mlp.intermediate_size,) * 2),
        ),
    )


def _head(program: DecoderProgram) -> WeightRule:
    """The head's own table; where it is tied, some files repeat the embedding under its name."""
    if program.head.tied:
        return WeightRule((HEAD,), ("head.weight",), optional=True, tied_to="embed.weight")
    return WeightRule((HEAD,), ("head.weight",))
