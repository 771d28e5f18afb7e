"""`DecoderProgram`: a decoder as data, one description that every executor runs.

An architecture plugin reads a config into a program. `pluglm-blocks` builds the readable torch module from it (the
meaning); an executor may run the whole step from the same program instead, so the two cannot drift apart. The program
names every parameter's place: `layers.3.attn.q.weight` follows from the fields below, and the weight map leads there.

A layer is a list of residual branches; a branch adds the sum of its parts. That covers pre-norm, post-norm, both,
and parallel residuals without a flag for each:

    x = x + residual_scale * sum(norm_out(op(norm_in(x))) for each part)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from pluglm.contracts.attention import AttentionSpec, MaskSpec
from pluglm.contracts.slots import CrossSlot, KVSlot, LatentSlot, SharedSlot, Slot, StateSlot

PROGRAM_VERSION = 1

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"]


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last dimension, in float32.

    Attributes:
        kind: "rms" (Zhang & Sennrich 2019) or "layer" (Ba et al. 2016).
        size: of the last dimension. eps: added to the variance (layer) or mean square (rms).
        weight: has a learned scale. bias: has a learned shift. offset: added to the scale (Gemma: 1.0).
        cast_late: multiply by the scale before returning to the input's dtype (Gemma, OLMo 2), not after (Llama).
    """

    kind: Literal["rms", "layer"]
    size: int
    eps: float
    weight: bool = True
    bias: bool = False
    offset: float = 0.0
    cast_late: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary positions (Su et al. 2021, "RoFormer", section 3.4.2) and the way they are stretched.

    Attributes:
        kind: default, linear, dynamic, yarn, longrope, llama3 or proportional; each named after the method's own
            paper in `pluglm_blocks.rope_kinds`.
        theta: base of the geometric series of wavelengths.
        dim: rotated dimensions of a head, the first ones; at most head_dim (partial rotation).
        interleaved: pairs are (0, 1), (2, 3) … (GPT-J) and not (0, dim/2), (1, dim/2 + 1) … (GPT-NeoX, Llama).
        parameters: the method's numbers, sorted by name: factor, original_max_position_embeddings, beta_fast …;
            a list of numbers (longrope's factors) is a tuple.
        max_seq_len: positions the model is made for, which some methods read.
    """

    kind: str
    theta: float
    dim: int
    interleaved: bool = False
    parameters: tuple[tuple[str, float | int | bool | tuple[float, ...]], ...] = ()
    max_seq_len: int | None = None


@dataclass(frozen=True)
class Attention:
    """Softmax attention over the cache (Vaswani et al. 2017). Parameters q, k, v, o, q_norm, k_norm, sinks, bias_table.

    Attributes:
        spec: the arithmetic. slot: the cache slot it writes (a `SharedSlot` is only read).
        rope: None: no rotation here.
        q_bias, k_bias, v_bias, o_bias: which projections have one.
        qk_norm: normalises q and k before the rotation. qk_norm_over: "head" each head by itself (Qwen 3), or
            "all" the whole projection (OLMo 2). The size is that of q's norm, head_dim or num_heads * head_dim; k's is
            head_dim or num_kv_heads * head_dim.
        qkv_clip: clamps the projections to [-c, c] (OLMo, MPT, DBRX). None: off.
        relative_buckets: (buckets, max distance) of a learned relative bias table [buckets, H] (T5). None: none.
        cross: keys and values come from the encoder's output through a `CrossSlot`.
        query_temperature: (scale, floor) of Llama 4's position-dependent query scaling. None: off.
    """

    spec: AttentionSpec
    slot: int
    rope: Rope | None = None
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    qk_norm: Norm | None = None
    qk_norm_over: Literal["head", "all"] = "head"
    qkv_clip: float | None = None
    relative_buckets: tuple[int, int] | None = None
    cross: bool = False
    query_temperature: tuple[float, float] | None = None
    op: Literal["attention"] = "attention"


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1). Caches one latent and one rotary key.

    Its slot is a `LatentSlot` of kv_rank and rope.dim. The same product can be taken in two ways, and a backend must be
    able to take both: `spec` over keys and values expanded from the latents, `absorbed` over the latents themselves.

    Parameters: q, or q_down, q_norm and q_up; kv_down (latent and rotary key in one), kv_norm, k_up, v_up, o. A head of
    q is (without rotation, with rotation), in this order.

    Attributes:
        spec: of the expanded way; head_dim counts both parts of a query (nope_dim + rope.dim) and
            num_kv_heads == num_heads.
        nope_dim: part of a head without rotation. rope: of the other part.
        q_rank: low rank of the query projection. None: a full one. kv_rank: size of the latent.
        norm_eps: of the (rms) norms on the latents.
        bias: q_down, kv_down and o have one; q, q_up, k_up and v_up never do.
    """

    spec: AttentionSpec
    slot: int
    nope_dim: int
    rope: Rope
    q_rank: int | None
    kv_rank: int
    norm_eps: float
    bias: bool = False
    op: Literal["latent_attention"] = "latent_attention"

    @property
    def absorbed(self) -> AttentionSpec:
        """`spec` once the up-projections are absorbed (section 2.1.2): all heads read one key, (latent, rotary key)."""
        size = self.kv_rank + self.rope.dim
        return dataclasses.replace(self.spec, num_kv_heads=1, head_dim=size, v_head_dim=self.kv_rank)


@dataclass(frozen=True)
class StateSpace:
    """Mamba 2's mixer (Dao & Gu 2024, "Transformers are SSMs", sections 6 and 7): a state and a convolution's tail.

    With I = inner_size, G = num_groups, N = state_size, the convolved channels are (x [I], B [G·N], C [G·N]).

    Parameters: in_proj [I + (I + 2·G·N) + num_heads, C], whose rows are z, the channels and dt; conv [channels, 1,
    conv_kernel]; dt_bias, A_log and D [num_heads]; norm [I]; out_proj [C, I]; with biases as the op says.

    Attributes:
        slot: a state slot that holds `state_slot`.
        inner_size: of the mixer. num_heads * head_dim == inner_size. num_groups: of B and C. state_size: N.
        conv_kernel: width of the causal convolution. chunk_size: of the blocked prefill.
        norm: gated norm before the output, of size inner_size. None: the output is only gated.
        norm_groups: parts of inner_size that are normalised each by itself. norm_before_gate: order of the two.
        activation: after the convolution; the gate is always silu.
        conv_bias, in_bias, out_bias: of the convolution and of the two projections.
        dt_min, dt_max: clamp of the time step, after softplus. None: no upper limit.
        multipliers: scales on z, x, B, C, dt as they are projected (Falcon-H1). None: ones.
    """

    slot: int
    inner_size: int
    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int
    conv_kernel: int
    chunk_size: int
    norm: Norm | None
    norm_groups: int = 1
    norm_before_gate: bool = False
    activation: Activation = "silu"
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    dt_min: float = 0.0
    dt_max: float | None = None
    multipliers: tuple[float, float, float, float, float] | None = None
    op: Literal["state_space"] = "state_space"

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner_size + 2 * self.num_groups * self.state_size

    @property
    def state_slot(self) -> StateSlot:
        """What its slot holds: the convolution's last inputs in the cache's dtype, and the state in float32."""
        return StateSlot(
            (
                ("conv", (self.conv_size, self.conv_kernel - 1), None),
                ("ssm", (self.num_heads, self.head_dim, self.state_size), "float32"),
            )
        )


@dataclass(frozen=True)
class FeedForward:
    """Plain `down(act(up(x)))` or gated `down(act(gate(x)) * up(x))` (Shazeer 2020, "GLU Variants").

    Parameters: gate, up, down, each `.weight` and, if `bias`, `.bias`.

    Attributes:
        gated: which of the two. activation: on up, or on gate. bias: all projections have one.
        gate_scale, down_scale: factors on the gate's input of the activation and on the output (Falcon-H1).
    """

    hidden_size: int
    intermediate_size: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    gate_scale: float = 1.0
    down_scale: float = 1.0
    op: Literal["feed_forward"] = "feed_forward"


@dataclass(frozen=True)
class Experts:
    """A mixture of feed-forward experts (Shazeer et al. 2017; Jiang et al. 2024, "Mixtral", section 2.1).

    Parameters: `router.weight` [E, C], `router.bias` [E] and `router.correction_bias` [E] (float32); the experts
    stacked as `gate.weight`, `up.weight` [E, F, C] and `down.weight` [E, C, F], with `gate.bias`, `up.bias` [E, F] and
    `down.bias` [E, C] if the expert has biases, without `gate` if it is not gated; `shared.…` as of a `FeedForward`,
    and `shared_gate.weight` [1, C]. Quantizers replace linear layers only: of these, the shared expert's.

    Attributes:
        expert: the shape of one. num_experts: E. top_k: chosen for a token.
        scoring: "softmax" over all experts, "softmax_topk" over the chosen ones only, "sigmoid" (DeepSeek-V3).
        normalise: chosen weights are divided by their sum. scale: factor on them afterwards.
        router_bias: the router has a bias (gpt-oss). correction_bias: a bias for choosing only (DeepSeek-V3).
        num_groups, top_k_groups: group-limited choice: only experts of the best groups are chosen. A group's score is
            the sum of its two best corrected scores (DeepSeek-V3), or without a correction_bias its best score
            (DeepSeek-V2). 1, 1: off.
        shared: a dense expert beside the routed ones; shared_gate: a sigmoid gate on it (Qwen 2 MoE).
        clamp: gpt-oss's activation, min(gate, clamp) * sigmoid(alpha * min(gate, clamp)) * (1 + up within ±clamp), for
            gated experts with silu. None: off, the expert's own activation.
        alpha: of that activation (1.702).
    """

    expert: FeedForward
    num_experts: int
    top_k: int
    scoring: Literal["softmax", "softmax_topk", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    router_bias: bool = False
    correction_bias: bool = False
    num_groups: int = 1
    top_k_groups: int = 1
    shared: FeedForward | None = None
    shared_gate: bool = False
    clamp: float | None = None
    alpha: float = 1.0
    op: Literal["experts"] = "experts"


Op = Attention | LatentAttention | StateSpace | FeedForward | Experts


@dataclass(frozen=True)
class Part:
    """`scale_out * norm_out(op(scale_in * norm_in(x)))`.

    Parameters live at `<name>.…`, `<name>_norm_in.…`, `<name>_norm_out.…`.

    Attributes:
        name: place in the layer: "attn", "mlp", "ssm", "cross" …
        share_norm_in: use the norm of the branch's first part (Falcon's single norm for both); norm_in is then None.
    """

    name: str
    op: Op
    norm_in: Norm | None = None
    norm_out: Norm | None = None
    scale_in: float = 1.0
    scale_out: float = 1.0
    share_norm_in: bool = False


@dataclass(frozen=True)
class Branch:
    """One residual addition: x + scale * (the sum of the parts, all of which read the same x)."""

    parts: tuple[Part, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Layer:
    """The residual branches, in order. Parameters live at `layers.<i>.<part name>…`."""

    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Embedding:
    """Token ids to vectors. Parameters: `embed.weight` [V, C], `embed_positions.weight` [P, C], `embed_norm.…`

    Attributes:
        scale: factor on token vectors (Gemma's sqrt(C), Granite's multiplier).
        learned_positions: rows of a learned position table; None: none. position_offset: added to positions (OPT: 2).
        norm: after the sum (BLOOM).
    """

    vocab_size: int
    hidden_size: int
    scale: float = 1.0
    learned_positions: int | None = None
    position_offset: int = 0
    norm: Norm | None = None


@dataclass(frozen=True)
class Head:
    """Vectors to logits: `softcap(scale * (x @ W.T + b))`. Parameters: `head.weight` [V, C] unless tied, `.bias`."""

    tied: bool
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class DecoderProgram:
    """A decoder-only model, complete but for its weights.

    Attributes:
        final_norm: before the head. Parameters: `norm.…`.
        slots: what the cache must hold; the ops refer to them by index.
        max_seq_len: positions the model is made for; None: unbounded (state space).
        float32_residual: x is kept in float32 from the embedding to the final norm, whatever the model's dtype; each
            part reads it rounded to that dtype (Mamba).
    """

    embedding: Embedding
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Head
    slots: tuple[Slot, ...]
    max_seq_len: int | None
    float32_residual: bool = False
    version: int = PROGRAM_VERSION

    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """The distinct specs that attention backends are given, in order of first use; latent attention has two."""
        specs: dict[AttentionSpec, None] = {}
        for op in self.ops():
            if isinstance(op, Attention | LatentAttention):
                specs.setdefault(op.spec)
            if isinstance(op, LatentAttention):
                specs.setdefault(op.absorbed)
        return tuple(specs)

    def ops(self) -> tuple[Op, ...]:
        """Every op of every layer, in order."""
        return tuple(p.op for layer in self.layers for branch in layer.branches for p in branch.parts)

    def rotations(self) -> tuple[Rope | None, ...]:
        """For each slot, the rotary positions of the keys that are appended to it; None: they carry none."""
        found: dict[int, Rope | None] = {}
        for op in self.ops():
            if isinstance(op, Attention | LatentAttention):
                found.setdefault(op.slot, op.rope)
        return tuple(found.get(slot) for slot in range(len(self.slots)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; every dataclass carries its class name under "type" so that it reads back."""
        encoded = _encode(self)
        assert isinstance(encoded, dict)
        return encoded

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DecoderProgram:
        """The inverse of `to_json`. Raises ConfigError on a program of another version or an unknown field."""
        from pluglm.errors import ConfigError

        if data.get("version") != PROGRAM_VERSION:
            raise ConfigError(
                f"this program has version {data.get('version')!r}; this pluglm reads version {PROGRAM_VERSION}.",
                fix="Make the program again from the model's config with this release.",
                key="version",
            )
        try:
            program = _decode(data)
        except (KeyError, TypeError) as e:
            raise ConfigError("this JSON is not a DecoderProgram.", why=str(e), key="program") from e
        if not isinstance(program, cls):
            raise ConfigError(f"this JSON describes a {type(program).__name__}, not a DecoderProgram.", key="type")
        return program

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON: equal programs, equal hash, in every process."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


_TYPES: dict[str, type] = {
    t.__name__: t
    for t in (
        Norm, Rope, Attention, LatentAttention, StateSpace, FeedForward, Experts, Part, Branch, Layer, Embedding, Head,
        DecoderProgram, AttentionSpec, MaskSpec, KVSlot, LatentSlot, StateSlot, CrossSlot, SharedSlot,
    )
}  # fmt: skip


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        fields = {name: _decode(item) for name, item in value.items() if name != "type"}
        return _TYPES[value["type"]](**fields)
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    return value
