"""Checkpoint names <-> parameter names. Which rules a layer needs follows from its program.

Experts are published one by one ("each"), which is also what Transformers 5 writes unless it is told to save its own
form: all experts of a layer in one tensor, gate above up ("fused").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pluglm.contracts import (
    Chain,
    DecoderProgram,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    Split,
    SplitGroups,
    Stack,
    WeightMap,
    WeightRule,
    rules,
)

if TYPE_CHECKING:
    from torch import Tensor

OUTSIDE = {"model.embed_tokens.weight": "embed.weight", "model.norm.weight": "norm.weight"}
HEAD = {"lm_head.weight": "head.weight"}

LAYER = {
    "model.layers.{}.input_layernorm.weight": "layers.{}.attn_norm_in.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.mlp_norm_in.weight",
    "model.layers.{}.self_attn.kv_a_proj_with_mqa.weight": "layers.{}.attn.kv_down.weight",
    "model.layers.{}.self_attn.kv_a_layernorm.weight": "layers.{}.attn.kv_norm.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attn.o.weight",
}
FULL_QUERIES = {"model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q.weight"}
LOW_RANK_QUERIES = {
    "model.layers.{}.self_attn.q_a_proj.weight": "layers.{}.attn.q_down.weight",
    "model.layers.{}.self_attn.q_a_layernorm.weight": "layers.{}.attn.q_norm.weight",
    "model.layers.{}.self_attn.q_b_proj.weight": "layers.{}.attn.q_up.weight",
}
BIASES = {
    "model.layers.{}.self_attn.kv_a_proj_with_mqa.bias": "layers.{}.attn.kv_down.bias",
    "model.layers.{}.self_attn.o_proj.bias": "layers.{}.attn.o.bias",
}
QUERY_BIAS = {"model.layers.{}.self_attn.q_a_proj.bias": "layers.{}.attn.q_down.bias"}
ROUTER = {"model.layers.{}.mlp.gate.weight": "layers.{}.mlp.router.weight"}
CORRECTION = {"model.layers.{}.mlp.gate.e_score_correction_bias": "layers.{}.mlp.router.correction_bias"}

PREFIXES = ("model.", "")
IGNORED = {"*.rotary_emb.inv_freq": "computed from the config; older files repeat it"}
FURTHER_LAYER = "predicts the token after the next one (num_nextn_predict_layers); the decoder does without"


@dataclass(frozen=True)
class Heads:
    """Rows dealt into heads: [H·n, C] <-> [H, n, C]."""

    num_heads: int

    def apply(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """Views of the sources; nothing is copied."""
        return [tensor.reshape(self.num_heads, -1, tensor.shape[-1]) for tensor in sources]

    def invert(self, targets: Sequence[Tensor]) -> Sequence[Tensor]:
        """[H, n, C] -> [H·n, C]."""
        return [tensor.flatten(0, 1) for tensor in targets]

    def shapes(self, sources: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
        """Raises ValueError for what is not a matrix with rows for every head."""
        for shape in sources:
            if len(shape) != 2 or shape[0] % self.num_heads:
                raise ValueError(f"{self.num_heads} heads cannot share the rows of a tensor of shape {list(shape)}")
        return [(self.num_heads, rows // self.num_heads, columns) for rows, columns in sources]


def weight_map(program: DecoderProgram) -> WeightMap:
    """The map of one model."""
    found = rules(OUTSIDE)
    for i, layer in enumerate(program.layers):
        found += _layer(i, layer)
    (head,) = rules(HEAD)
    if program.head.tied:  # some files repeat the embedding under the head's name
        head = WeightRule(head.sources, head.targets, optional=True, tied_to="embed.weight")
    ignored = {**IGNORED, f"model.layers.{len(program.layers)}.*": FURTHER_LAYER}
    return WeightMap((*found, head), ignored, PREFIXES)


def _layer(i: int, layer: Layer) -> list[WeightRule]:
    attn, mlp = (branch.parts[0].op for branch in layer.branches)
    assert isinstance(attn, LatentAttention), "program.py puts attention first"
    assert isinstance(mlp, FeedForward | Experts), "and the feed-forward second"
    table = LAYER | (FULL_QUERIES if attn.q_rank is None else LOW_RANK_QUERIES)
    if attn.bias:
        table |= BIASES | ({} if attn.q_rank is None else QUERY_BIAS)
    found = [*rules(table, layers=[i]), _up_projections(i, attn)]
    if isinstance(mlp, FeedForward):
        return found + _feed_forward(f"model.layers.{i}.mlp", f"layers.{i}.mlp", mlp)
    found += rules(ROUTER, layers=[i])
    if mlp.correction_bias:  # float32 whatever the model's dtype: it decides between close scores
        found += [replace(rule, dtype="float32") for rule in rules(CORRECTION, layers=[i])]
    if mlp.shared is not None:
        found += _feed_forward(f"model.layers.{i}.mlp.shared_experts", f"layers.{i}.mlp.shared", mlp.shared)
    return found + _each(i, mlp) + _fused(i, mlp)


def _each(i: int, op: Experts) -> list[WeightRule]:
    """Every expert's matrices by themselves, [F, C] or [C, F]."""
    found = []
    for name in ("gate", "up", "down"):
        sources = tuple(f"model.layers.{i}.mlp.experts.{e}.{name}_proj.weight" for e in range(op.num_experts))
        found.append(WeightRule(sources, (f"layers.{i}.mlp.{name}.weight",), Stack(), layout="each"))
    return found


def _fused(i: int, op: Experts) -> list[WeightRule]:
    """gate_up_proj [E, 2F, C] and down_proj [E, C, F]."""
    place, target, F = f"model.layers.{i}.mlp.experts", f"layers.{i}.mlp", op.expert.intermediate_size
    gate_up = (f"{target}.gate.weight", f"{target}.up.weight")
    return [
        WeightRule((f"{place}.gate_up_proj",), gate_up, Split((F, F), dim=1), layout="fused"),
        WeightRule((f"{place}.down_proj",), (f"{target}.down.weight",), layout="fused"),
    ]


def _up_projections(i: int, op: LatentAttention) -> WeightRule:
    """The file keeps k's and v's rows of a head together: [H·(nope_dim + Dv), kv_rank]."""
    H = op.spec.num_heads
    source = f"model.layers.{i}.self_attn.kv_b_proj.weight"
    targets = (f"layers.{i}.attn.k_up", f"layers.{i}.attn.v_up")
    return WeightRule((source,), targets, Chain((SplitGroups(H, (op.nope_dim, op.spec.v_head_dim)), Heads(H))))


def _feed_forward(source: str, target: str, op: FeedForward) -> list[WeightRule]:
    kinds = ("weight", "bias") if op.bias else ("weight",)
    names = [(f"{name}_proj.{kind}", f"{name}.{kind}") for name in ("gate", "up", "down") for kind in kinds]
    return rules({f"{source}.{theirs}": f"{target}.{ours}" for theirs, ours in names})
