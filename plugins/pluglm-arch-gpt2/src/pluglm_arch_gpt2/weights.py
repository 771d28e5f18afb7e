"""Checkpoint names <-> parameter names. Queries, keys and values come as one matrix, which each model type deals out
its own way; GPT-2 stores every matrix as [in, out], the transpose of what a linear layer holds.
"""

from __future__ import annotations

from pluglm.contracts import (
    Chain,
    DecoderProgram,
    Split,
    SplitGroups,
    Transpose,
    WeightMap,
    WeightRule,
    rules,
)

EMBEDDING = {"transformer.wte.weight": "embed.weight", "transformer.wpe.weight": "embed_positions.weight"}
NORMS = {
    "transformer.h.{}.ln_1.weight": "layers.{}.attn_norm_in.weight",
    "transformer.h.{}.ln_1.bias": "layers.{}.attn_norm_in.bias",
    "transformer.h.{}.ln_2.weight": "layers.{}.mlp_norm_in.weight",
    "transformer.h.{}.ln_2.bias": "layers.{}.mlp_norm_in.bias",
}
FINAL_NORM = {"transformer.ln_f.weight": "norm.weight", "transformer.ln_f.bias": "norm.bias"}
MATRICES = {
    "transformer.h.{}.attn.c_proj.weight": "layers.{}.attn.o.weight",
    "transformer.h.{}.mlp.c_fc.weight": "layers.{}.mlp.up.weight",
    "transformer.h.{}.mlp.c_proj.weight": "layers.{}.mlp.down.weight",
}
BIASES = {
    "transformer.h.{}.attn.c_proj.bias": "layers.{}.attn.o.bias",
    "transformer.h.{}.mlp.c_fc.bias": "layers.{}.mlp.up.bias",
    "transformer.h.{}.mlp.c_proj.bias": "layers.{}.mlp.down.bias",
}
QKV = "transformer.h.{}.attn.c_attn."
HEAD = {"lm_head.weight": "head.weight"}
IGNORED = {
    "*.attn.bias": "a stored causal mask; the positions say who sees whom",
    "*.attn.masked_bias": "the number that a stored mask was filled with",
}
#: Files of a decoder saved without its head leave the first one out.
PREFIXES = ("transformer.", "")


def gpt2_weights(program: DecoderProgram) -> WeightMap:
    """All of q, then all of k, then all of v, transposed."""
    C = program.embedding.hidden_size
    matrices = [WeightRule(r.sources, r.targets, Transpose()) for r in rules(MATRICES, layers=_layers(program))]
    split = Split((C, C, C))
    return _weight_map(program, [*matrices, *_qkv(program, "weight", Chain((Transpose(), split)))], split)


def gpt_bigcode_weights(program: DecoderProgram) -> WeightMap:
    """With one key-value head: all of q, then k, then v. With one for each query: q, k and v of head after head."""
    (spec,) = program.attention_specs()
    H, K, D = spec.num_heads, spec.num_kv_heads, spec.head_dim
    split = Split((H * D, D, D)) if K == 1 else SplitGroups(H, (D, D, D))
    return _weight_map(program, [*rules(MATRICES, layers=_layers(program)), *_qkv(program, "weight", split)], split)


def _weight_map(program: DecoderProgram, matrices: list[WeightRule], split: Split | SplitGroups) -> WeightMap:
    """matrices: the rules of a layer's projections. split: how a fused bias is dealt out."""
    table = rules({**EMBEDDING, **NORMS, **BIASES, **FINAL_NORM}, layers=_layers(program))
    (head,) = rules(HEAD)
    if program.head.tied:  # some files repeat the embedding under the head's name
        head = WeightRule(head.sources, head.targets, optional=True, tied_to="embed.weight")
    return WeightMap((*table, *matrices, *_qkv(program, "bias", split), head), IGNORED, PREFIXES)


def _qkv(program: DecoderProgram, kind: str, transform: Chain | Split | SplitGroups) -> list[WeightRule]:
    return [
        WeightRule((f"{QKV.format(i)}{kind}",), tuple(f"layers.{i}.attn.{name}.{kind}" for name in "qkv"), transform)
        for i in _layers(program)
    ]


def _layers(program: DecoderProgram) -> range:
    return range(len(program.layers))
