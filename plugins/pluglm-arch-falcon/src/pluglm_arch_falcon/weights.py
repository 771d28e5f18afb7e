"""Checkpoint names <-> parameter names, as tables. Which tables a model needs follows from its program."""

from __future__ import annotations

from pluglm.contracts import Attention, DecoderProgram, SplitGroups, WeightMap, WeightRule, rules

EMBEDDING = {"transformer.word_embeddings.weight": "embed.weight"}
FINAL_NORM = {"transformer.ln_f.weight": "norm.weight", "transformer.ln_f.bias": "norm.bias"}
PROJECTIONS = {
    "transformer.h.{}.self_attention.dense.": "layers.{}.attn.o.",
    "transformer.h.{}.mlp.dense_h_to_4h.": "layers.{}.mlp.up.",
    "transformer.h.{}.mlp.dense_4h_to_h.": "layers.{}.mlp.down.",
}
TWO_NORMS = {
    "transformer.h.{}.ln_attn.": "layers.{}.attn_norm_in.",
    "transformer.h.{}.ln_mlp.": "layers.{}.mlp_norm_in.",
}
SHARED_NORM = {"transformer.h.{}.input_layernorm.": "layers.{}.attn_norm_in."}
SEQUENTIAL_NORMS = {**SHARED_NORM, "transformer.h.{}.post_attention_layernorm.": "layers.{}.mlp_norm_in."}
QKV = "transformer.h.{}.self_attention.query_key_value."
HEAD = {"lm_head.weight": "head.weight"}
IGNORED = {"*.rotary_emb.inv_freq": "computed from the config; older files repeat it"}
#: Files of a decoder saved without its head leave the first one out.
PREFIXES = ("transformer.", "")


def weight_map(program: DecoderProgram) -> WeightMap:
    """The map of one model. All its layers have the same parameters, so the first one tells."""
    layers = range(len(program.layers))
    parts = [part for branch in program.layers[0].branches for part in branch.parts]
    attention = parts[0].op
    assert isinstance(attention, Attention), "program.py puts attention first"
    kinds = ("weight", "bias") if attention.o_bias else ("weight",)
    if len(program.layers[0].branches) == 2:
        norms = SEQUENTIAL_NORMS
    else:
        norms = SHARED_NORM if parts[1].share_norm_in else TWO_NORMS
    table = EMBEDDING | FINAL_NORM | _each(PROJECTIONS, kinds) | _each(norms, ("weight", "bias"))
    # The queries of a group, then their key and their value; with one group that is all of q, k and v.
    H, K, D = attention.spec.num_heads, attention.spec.num_kv_heads, attention.spec.head_dim
    deal = SplitGroups(K, (H // K * D, D, D))
    fused = [
        WeightRule((f"{QKV.format(i)}{kind}",), tuple(f"layers.{i}.attn.{name}.{kind}" for name in "qkv"), deal)
        for i in layers
        for kind in kinds
    ]
    (head,) = rules(HEAD)
    if program.head.tied:  # most files repeat the embedding under the head's name
        head = WeightRule(head.sources, head.targets, optional=True, tied_to="embed.weight")
    return WeightMap((*rules(table, layers=layers), *fused, head), IGNORED, PREFIXES)


def _each(table: dict[str, str], kinds: tuple[str, ...]) -> dict[str, str]:
    """A table of modules -> a table of their parameters."""
    return {f"{source}{kind}": f"{target}{kind}" for source, target in table.items() for kind in kinds}
