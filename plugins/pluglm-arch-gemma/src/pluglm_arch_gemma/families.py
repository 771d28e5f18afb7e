"""One function a model type: config -> `DecoderProgram`. What differs between the generations is what stands here.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pluglm_blocks.reading import (
    ACTIVATIONS,
    Config,
    Family,
    Sizes,
    positive,
    read_layer_types,
    read_rope,
    read_ropes,
    read_sizes,
    refuse,
    stretched,
    window_or_none,
)

from pluglm.contracts import DecoderProgram
from pluglm_arch_gemma.program import attention, decoder, norm
from pluglm_arch_gemma.weights import weight_map

SLIDING, FULL = "sliding_attention", "full_attention"


def gemma(reader: Config) -> DecoderProgram:
    """Gemma (Gemma team 2024): Llama's layer with norms about one, scaled embeddings and a gated gelu."""
    sizes = _sizes(reader, activation="hidden_act", num_kv_heads=16)
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    bias = reader.take("attention_bias", bool, False)
    scale = sizes.head_dim**-0.5
    layers = [attention(sizes, i, rope=rope, scale=scale, bias=bias) for i in range(sizes.num_layers)]
    return decoder(sizes, layers, max_seq_len=stretched(rope), norms="before")


def gemma2(reader: Config) -> DecoderProgram:
    """Gemma 2 (Gemma team 2024, section 2): norms around each part, soft caps, a window on every other layer."""
    sizes = _sizes(reader, activation="hidden_activation", num_kv_heads=4)
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    kinds = read_layer_types(reader, sizes.num_layers) or _alternating(sizes.num_layers, 2)
    bias, scale, cap = reader.take("attention_bias", bool, False), _scale(reader), _cap(reader, "attn", 50.0)
    layers = [
        attention(sizes, i, rope=rope, scale=scale, window=window, softcap=cap, bias=bias)
        for i, window in enumerate(_windows(reader, kinds))
    ]
    return decoder(sizes, layers, max_seq_len=stretched(rope), norms="around", softcap=_cap(reader, "final", 30.0))


def gemma3_text(reader: Config) -> DecoderProgram:
    """Gemma 3 (Gemma team 2025, section 2): normalised heads, and a rotation of their own for layers with a window."""
    sizes = _sizes(reader, activation="hidden_activation", num_kv_heads=4)
    reader.expect("attn_logit_softcapping", None, "norms of q and k replaced the cap; the reference has none.")
    kinds = _kinds(reader, sizes.num_layers)
    ropes = read_ropes(
        reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions, scaled=FULL,
        bases={FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)},
    )  # fmt: skip
    bias, scale = reader.take("attention_bias", bool, False), _scale(reader)
    qk_norm = norm(sizes.head_dim, sizes.norm_eps)
    layers = [
        attention(sizes, i, rope=ropes[kind], scale=scale, window=window, bias=bias, qk_norm=qk_norm)
        for i, (kind, window) in enumerate(zip(kinds, _windows(reader, kinds), strict=True))
    ]
    # Unlike in older families, max_position_embeddings counts the positions after stretching (section 2: 128K).
    return decoder(sizes, layers, max_seq_len=sizes.max_positions, norms="around", softcap=_cap(reader, "final", None))


FAMILIES: dict[str, Family] = {
    name: Family(program, weight_map, bos=2, eos=1, pad=0)
    for name, program in (("gemma", gemma), ("gemma2", gemma2), ("gemma3_text", gemma3_text))
}


def _sizes(reader: Config, *, activation: str, num_kv_heads: int) -> Sizes:
    """What the three generations read alike. activation: the key that the reference reads, of the two there are."""
    reader.expect("use_bidirectional_attention", False, "text is decoded token by token; a token sees earlier ones.")
    reader.ignore("cache_implementation", "the cache is chosen when the model is loaded")
    sizes = read_sizes(reader, tied=True, head_dim=256, num_kv_heads=num_kv_heads, activation=activation)
    if activation == "hidden_activation":
        reader.ignore("hidden_act", "an older key beside hidden_activation, which is read")
        return sizes
    # The first files say "gelu" and mean the approximation by tanh, as both generations of the reference know.
    sizes = replace(sizes, activation="gelu_tanh") if sizes.activation == "gelu" else sizes
    newer = reader.choice("hidden_activation", ACTIVATIONS, None)
    if newer is not None and ACTIVATIONS[newer] != sizes.activation:
        what = f"The config has hidden_activation = {newer!r}, and a hidden_act that means {sizes.activation!r}."
        refuse("hidden_activation", what, "Releases of the reference differ in which of the two they read.")
    return sizes


def _scale(reader: Config) -> float:
    """query_pre_attn_scalar ** -0.5: not always that of head_dim (Gemma 2 27B: hidden_size / num_heads)."""
    scalar = float(reader.take("query_pre_attn_scalar", float))
    if scalar <= 0:
        refuse("query_pre_attn_scalar", f"The config has a query_pre_attn_scalar of {scalar}.", "Expected above zero.")
    return float(scalar**-0.5)


def _cap(reader: Config, which: str, default: float | None) -> float | None:
    """`attn_logit_softcapping` or `final_logit_softcapping`; null: none."""
    key = f"{which}_logit_softcapping"
    cap = reader.nullable(key, float, default)
    if cap is not None and cap <= 0:
        refuse(key, f"The config has a {key} of {cap}.", "Expected a number above zero, or null for none.")
    return None if cap is None else float(cap)


def _kinds(reader: Config, num_layers: int) -> Sequence[str]:
    """Each layer's type; files of before `layer_types` say it by `sliding_window_pattern`."""
    kinds = read_layer_types(reader, num_layers)
    if kinds is not None:
        reader.ignore("sliding_window_pattern", "layer_types says the same for each layer")
        return kinds
    return _alternating(num_layers, positive(reader, "sliding_window_pattern", 6))


def _alternating(num_layers: int, every: int) -> Sequence[str]:
    """Every n-th layer sees all keys, the others a window."""
    return [SLIDING if (i + 1) % every else FULL for i in range(num_layers)]


def _windows(reader: Config, kinds: Sequence[str]) -> list[int | None]:
    """Each layer's window."""
    window = window_or_none(reader, default=4096)
    reader.expect("sliding_window_size", window, "an older key for the window, which sliding_window gives.")
    if window is None and SLIDING in kinds:
        why = f"There are layers of type {SLIDING}; they need a number above zero."
        refuse("sliding_window", "The config's sliding_window is null.", why)
    return [window if kind == SLIDING else None for kind in kinds]
