"""Checkpoint names <-> parameter names, as tables. Queries, keys and values come as one matrix: BLOOM deals them out
head by head, MPT one after another.
"""

from __future__ import annotations

from collections.abc import Mapping

from pluglm.contracts import DecoderProgram, Split, SplitGroups, WeightMap, WeightRule, rules

BLOOM = {
    "transformer.word_embeddings.weight": "embed.weight",
    "transformer.word_embeddings_layernorm.weight": "embed_norm.weight",
    "transformer.word_embeddings_layernorm.bias": "embed_norm.bias",
    "transformer.h.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "transformer.h.{}.input_layernorm.bias": "layers.{}.attn_norm_in.bias",
    "transformer.h.{}.self_attention.dense.weight": "layers.{}.attn.o.weight",
    "transformer.h.{}.self_attention.dense.bias": "layers.{}.attn.o.bias",
    "transformer.h.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm_in.weight",
    "transformer.h.{}.post_attention_layernorm.bias": "layers.{}.mlp_norm_in.bias",
    "transformer.h.{}.mlp.dense_h_to_4h.weight": "layers.{}.mlp.up.weight",
    "transformer.h.{}.mlp.dense_h_to_4h.bias": "layers.{}.mlp.up.bias",
    "transformer.h.{}.mlp.dense_4h_to_h.weight": "layers.{}.mlp.down.weight",
    "transformer.h.{}.mlp.dense_4h_to_h.bias": "layers.{}.mlp.down.bias",
    "transformer.ln_f.weight": "norm.weight",
    "transformer.ln_f.bias": "norm.bias",
}
BLOOM_QKV = "transformer.h.{}.self_attention.query_key_value."
MPT = {
    "transformer.wte.weight": "embed.weight",
    "transformer.blocks.{}.norm_1.weight": "layers.{}.attn_norm_in.weight",
    "transformer.blocks.{}.attn.out_proj.weight": "layers.{}.attn.o.weight",
    "transformer.blocks.{}.norm_2.weight": "layers.{}.mlp_norm_in.weight",
    "transformer.blocks.{}.ffn.up_proj.weight": "layers.{}.mlp.up.weight",
    "transformer.blocks.{}.ffn.down_proj.weight": "layers.{}.mlp.down.weight",
    "transformer.norm_f.weight": "norm.weight",
}
MPT_QKV = "transformer.blocks.{}.attn.Wqkv."
HEAD = {"lm_head.weight": "head.weight"}
#: Files of a decoder saved without its head (all of BLOOM's) leave the first one out.
PREFIXES = ("transformer.", "")


def bloom_weights(program: DecoderProgram) -> WeightMap:
    """q, k and v of the first head, then of the second one, and so on."""
    (spec,) = program.attention_specs()
    D = spec.head_dim
    return _weight_map(program, BLOOM, BLOOM_QKV, SplitGroups(spec.num_heads, (D, D, D)), ("weight", "bias"))


def mpt_weights(program: DecoderProgram) -> WeightMap:
    """All of q, then all of k, then all of v."""
    C = program.embedding.hidden_size
    return _weight_map(program, MPT, MPT_QKV, Split((C, C, C)), ("weight",))


def _weight_map(
    program: DecoderProgram, table: Mapping[str, str], qkv: str, split: Split | SplitGroups, kinds: tuple[str, ...]
) -> WeightMap:
    layers = range(len(program.layers))
    fused = [
        WeightRule((f"{qkv.format(i)}{kind}",), tuple(f"layers.{i}.attn.{name}.{kind}" for name in "qkv"), split)
        for i in layers
        for kind in kinds
    ]
    (head,) = rules(HEAD)
    if program.head.tied:  # some files repeat the embedding under the head's name
        head = WeightRule(head.sources, head.targets, optional=True, tied_to="embed.weight")
    return WeightMap((*rules(table, layers=layers), *fused, head), prefixes=PREFIXES)
