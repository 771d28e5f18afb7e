"""gpt-oss (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", section 2): config -> `DecoderProgram`.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from pluglm_blocks.reading import (
    Config,
    Family,
    Sizes,
    positive,
    read_rope,
    read_sizes,
    read_windows,
    refuse,
    stretched,
    window_or_none,
)

from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    Embedding,
    Experts,
    FeedForward,
    Head,
    KVSlot,
    Layer,
    MaskSpec,
    Norm,
    Part,
    Rope,
)
from pluglm_arch_gpt_oss.weights import weight_map

THETA = 150_000.0
#: The reference's rotary positions where a file has none.
YARN = (
    ("beta_fast", 32.0),
    ("beta_slow", 1.0),
    ("factor", 32.0),
    ("original_max_position_embeddings", 4096),
    ("truncate", False),
)


def gpt_oss(reader: Config) -> DecoderProgram:
    """The whole config but for the token ids."""
    reader.ignore("initial_context_length", "repeats original_max_position_embeddings, which is read")
    sizes = read_sizes(reader, num_kv_heads=8, head_dim=64)
    rope, windows = _rope(reader, sizes), _windows(reader, sizes.num_layers)
    bias = reader.take("attention_bias", bool, True)
    norm, experts = Norm("rms", sizes.hidden_size, sizes.norm_eps), _experts(reader, sizes)
    return DecoderProgram(
        embedding=Embedding(sizes.vocab_size, sizes.hidden_size),
        layers=tuple(
            Layer(
                (
                    Branch((Part("attn", _attention(sizes, i, rope, window, bias=bias), norm_in=norm),)),
                    Branch((Part("mlp", experts, norm_in=norm),)),
                )
            )
            for i, window in enumerate(windows)
        ),
        final_norm=norm,
        head=Head(tied=sizes.tied),
        slots=tuple(KVSlot(sizes.num_kv_heads, sizes.head_dim, sizes.head_dim, window=window) for window in windows),
        max_seq_len=stretched(rope),
    )


FAMILIES = {"gpt_oss": Family(gpt_oss, weight_map)}


def _attention(sizes: Sizes, layer: int, rope: Rope, window: int | None, *, bias: bool) -> Attention:
    """Grouped-query attention with a sink for each head, in the slot of its layer. bias: of all four projections."""
    spec = AttentionSpec(
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        v_head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        mask=MaskSpec(window=window),
        sinks=True,
    )
    return Attention(spec, layer, rope, q_bias=bias, k_bias=bias, v_bias=bias, o_bias=bias)


def _rope(reader: Config, sizes: Sizes) -> Rope:
    """As the file says; yarn where it says nothing."""
    silent = not any(key in reader for key in ("rope_parameters", "rope_scaling"))
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions, theta=THETA)
    return Rope("yarn", rope.theta, rope.dim, parameters=YARN, max_seq_len=rope.max_seq_len) if silent else rope


def _windows(reader: Config, num_layers: int) -> list[int | None]:
    """By `layer_types`; without it every other layer has the window, the first one too."""
    window = window_or_none(reader, default=128)
    return read_windows(reader, [window if i % 2 == 0 else None for i in range(num_layers)], window)


def _experts(reader: Config, sizes: Sizes) -> Experts:
    """Softmax over the best experts only; the gate's activation is clamped (section 2.3)."""
    if sizes.activation != "silu":
        what = f'The config has the activation "{sizes.activation}".'
        refuse("hidden_act", what, "gpt-oss has one of its own, a clamped silu (swiglu_limit, swiglu_alpha).")
    limit = float(reader.take("swiglu_limit", float, 7.0))
    if limit <= 0:
        refuse("swiglu_limit", f"The config clamps experts to {limit}.", "Expected a number above zero.")
    num_experts, top_k = positive(reader, "num_local_experts"), _top_k(reader)
    if top_k > num_experts:
        what = f"The config gives each token {top_k} of {num_experts} experts."
        refuse("num_experts_per_tok", what, "Expected at most as many as there are.")
    return Experts(
        FeedForward(sizes.hidden_size, sizes.intermediate_size, "silu", bias=True),
        num_experts,
        top_k,
        scoring="softmax_topk",
        router_bias=True,
        clamp=limit,
        alpha=float(reader.take("swiglu_alpha", float, 1.702)),
    )


def _top_k(reader: Config) -> int:
    """`num_experts_per_tok`, which published files repeat as `experts_per_token`."""
    top_k = positive(reader, "num_experts_per_tok")
    again = reader.take("experts_per_token", int, top_k)
    if again != top_k:
        what = f"The config has num_experts_per_tok = {top_k} and experts_per_token = {again}."
        refuse("experts_per_token", what, "They mean one thing.")
    return top_k
