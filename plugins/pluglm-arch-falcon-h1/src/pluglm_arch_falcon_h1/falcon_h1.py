"""Falcon-H1's config -> `DecoderProgram`.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pluglm_blocks.reading import (
    Config,
    Family,
    Sizes,
    positive,
    read_rope,
    read_sizes,
    read_time_step_limit,
    refuse,
    stretched,
)

from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    Embedding,
    FeedForward,
    Head,
    KVSlot,
    Layer,
    MaskSpec,
    Norm,
    Part,
    Rope,
    StateSpace,
)
from pluglm_arch_falcon_h1.weights import weight_map

_INITIAL = "used to draw new weights only"
#: Keys of published files that change nothing here, with the reason.
IGNORED_KEYS = {
    **dict.fromkeys(("time_step_min", "time_step_max", "time_step_floor", "time_step_rank"), _INITIAL),
    "mlp_expansion_factor": "intermediate_size says how large the feed-forward is",
    "num_logits_to_keep": "says how many logits generation computes by default; the forward call says it here",
}


def falcon_h1(reader: Config) -> DecoderProgram:
    """Falcon-H1 (Falcon LLM team 2025): attention and Mamba 2's mixer read one norm and are added, then a feed-forward.

    Its multipliers (section 3.2.3 of the report) stand where a program has scales: the key's, which only ever meets the
    queries, is part of the attention's scale.
    """
    for key, reason in IGNORED_KEYS.items():
        reader.ignore(key, reason)
    sizes = read_sizes(reader, num_kv_heads=8)
    reader.expect("mamba_use_mlp", True, "every layer has a feed-forward.")
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    norm = Norm("rms", sizes.hidden_size, sizes.norm_eps)
    attention, mixer = _attention(reader, sizes, rope), _mixer(reader, sizes)
    scales = {
        name: (_multiplier(reader, f"{key}_in_multiplier"), _multiplier(reader, f"{key}_out_multiplier"))
        for name, key in (("attn", "attention"), ("ssm", "ssm"))
    }
    attn = Part("attn", attention, norm, None, *scales["attn"])
    ssm = Part("ssm", mixer, None, None, *scales["ssm"], share_norm_in=True)
    mlp = Part("mlp", _feed_forward(reader, sizes), norm_in=norm)

    def layer(i: int) -> Layer:
        parts = replace(attn, op=replace(attention, slot=2 * i)), replace(ssm, op=replace(mixer, slot=2 * i + 1))
        return Layer((Branch(parts), Branch((mlp,))))

    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size, scale=_multiplier(reader, "embedding_multiplier")),
        layers=tuple(layer(i) for i in range(sizes.num_layers)),
        final_norm=norm,
        head=Head(tied=sizes.tied, scale=_multiplier(reader, "lm_head_multiplier")),
        slots=(KVSlot(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim), mixer.state_slot) * sizes.num_layers,
        max_seq_len=stretched(rope),
    )


def _attention(reader: Config, sizes: Sizes, rope: Rope) -> Attention:
    """Grouped-query attention, in slot 0."""
    spec = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        v_head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5 * _multiplier(reader, "key_multiplier"),
        mask=MaskSpec(),
    )
    bias = reader.take("attention_bias", bool, False)
    return Attention(spec, slot=0, rope=rope, q_bias=bias, k_bias=bias, v_bias=bias, o_bias=bias)


def _mixer(reader: Config, sizes: Sizes) -> StateSpace:
    """Mamba 2's mixer, in slot 0; without a norm of its own its output is only gated."""
    expanded = positive(reader, "mamba_expand", 2) * sizes.hidden_size
    derived = reader.nullable("mamba_d_ssm", int, 1024) is None
    inner_size = expanded if derived else positive(reader, "mamba_d_ssm", 1024)
    num_heads = positive(reader, "mamba_n_heads", 128)
    head_dim = reader.take("mamba_d_head", (int, str), "auto")
    if head_dim == "auto":
        head_dim = inner_size // num_heads
    if isinstance(head_dim, str) or head_dim <= 0 or num_heads * head_dim != inner_size:
        what = f"The config has {num_heads} state space heads of size {head_dim} for a mixer of size {inner_size}."
        why = "mamba_n_heads * mamba_d_head must be mamba_d_ssm (if that is null, mamba_expand * hidden_size)."
        refuse("mamba_d_head", what, why)
    num_groups = positive(reader, "mamba_n_groups", 1)
    if num_heads % num_groups:
        why = "Each group must serve the same number of heads."
        refuse("mamba_n_groups", f"The config has {num_groups} groups for {num_heads} state space heads.", why)
    dt_min, dt_max = read_time_step_limit(reader)
    normed = reader.take("mamba_rms_norm", bool, False)
    before = reader.take("mamba_norm_before_gate", bool, True)
    multipliers = _multipliers(reader, "ssm_multipliers", 5)
    return StateSpace(
        slot=0,
        inner_size=inner_size,
        num_heads=num_heads,
        head_dim=head_dim,
        num_groups=num_groups,
        state_size=positive(reader, "mamba_d_state", 256),
        conv_kernel=positive(reader, "mamba_d_conv", 4),
        chunk_size=positive(reader, "mamba_chunk_size", 256),
        norm=Norm("rms", inner_size, sizes.norm_eps, cast_late=True) if normed else None,
        norm_groups=num_groups if normed else 1,
        norm_before_gate=normed and before,
        activation=sizes.activation,
        conv_bias=reader.take("mamba_conv_bias", bool, True),
        in_bias=reader.take("mamba_proj_bias", bool, False),
        out_bias=reader.take("projectors_bias", bool, False),
        dt_min=dt_min,
        dt_max=dt_max,
        multipliers=(multipliers[0], multipliers[1], multipliers[2], multipliers[3], multipliers[4]),
    )


def _feed_forward(reader: Config, sizes: Sizes) -> FeedForward:
    gate, down = _multipliers(reader, "mlp_multipliers", 2)
    return FeedForward(
        sizes.hidden_size, sizes.intermediate_size, sizes.activation,
        bias=reader.take("mlp_bias", bool, False), gate_scale=gate, down_scale=down,
    )  # fmt: skip


def _multiplier(reader: Config, key: str) -> float:
    return float(reader.take(key, float, 1.0))


def _multipliers(reader: Config, key: str, count: int) -> list[float]:
    """A list of `count` numbers; all of them one where the file has none."""
    found: list[Any] = reader.take(key, list, [1.0] * count)
    if len(found) != count or any(type(one) not in (int, float) for one in found):
        refuse(key, f'The config has "{key}": {found}.', f"Expected {count} numbers.")
    return [float(one) for one in found]


FAMILIES: dict[str, Family] = {"falcon_h1": Family(falcon_h1, weight_map, bos=1, eos=2, pad=0)}
