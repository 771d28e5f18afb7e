"""One function a model type: config -> `DecoderProgram`. What differs between the families is what stands here.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from pluglm_blocks.reading import (
    Config,
    Family,
    positive,
    read_rope,
    read_sizes,
    read_windows,
    refuse,
    sliding_window,
    window_or_none,
)

from pluglm.contracts import DecoderProgram, Norm
from pluglm_arch_llama.program import attention, decoder
from pluglm_arch_llama.weights import weight_map


def llama(reader: Config) -> DecoderProgram:
    """Llama 1 to 3 (Touvron et al. 2023; Dubey et al. 2024), and everything published in its form."""
    sizes = read_sizes(reader)
    reader.expect("rope_interleaved", False, "this format pairs dimension i with i + head_dim / 2.")
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    bias = reader.take("attention_bias", bool, False)
    layers = [attention(sizes, i, rope=rope, qkv_bias=bias, o_bias=bias) for i in range(sizes.num_layers)]
    return decoder(sizes, layers, rope, mlp_bias=reader.take("mlp_bias", bool, False))


def mistral(reader: Config) -> DecoderProgram:
    """Mistral (Jiang et al. 2023): one window for all layers, or none."""
    sizes = read_sizes(reader, num_kv_heads=8)
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    window = window_or_none(reader, default=4096)
    layers = [attention(sizes, i, rope=rope, window=window) for i in range(sizes.num_layers)]
    return decoder(sizes, layers, rope)


def qwen2(reader: Config) -> DecoderProgram:
    """Qwen 2 and 2.5 (Yang et al. 2024): biases on q, k and v, windows on the upper layers if switched on."""
    sizes = read_sizes(reader, num_kv_heads=32)
    reader.expect("use_mrope", False, "text has one position a token.")
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    windows = _upper_windows(reader, sizes.num_layers)
    layers = [attention(sizes, i, rope=rope, window=window, qkv_bias=True) for i, window in enumerate(windows)]
    return decoder(sizes, layers, rope)


def qwen3(reader: Config) -> DecoderProgram:
    """Qwen 3 (Yang et al. 2025): each head of q and k is normalised; head_dim is 128 where the file is silent."""
    sizes = read_sizes(reader, head_dim=128, num_kv_heads=32)
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    bias = reader.take("attention_bias", bool, False)
    norm = Norm("rms", sizes.head_dim, sizes.norm_eps)
    layers = [
        attention(sizes, i, rope=rope, window=window, qkv_bias=bias, o_bias=bias, qk_norm=norm)
        for i, window in enumerate(_upper_windows(reader, sizes.num_layers))
    ]
    return decoder(sizes, layers, rope)


def smollm3(reader: Config) -> DecoderProgram:
    """SmolLM 3 (Bakouch et al. 2025): some layers have no rotary positions (Yang et al. 2025, "RoPE to NoPE")."""
    sizes = read_sizes(reader, tied=True, num_kv_heads=4)
    reader.ignore("max_window_layers", "the reference reads layer_types and no_rope_layers instead")
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions, theta=2_000_000.0)
    rotated = _rotated_layers(reader, sizes.num_layers)
    window = sliding_window(reader)
    windows = read_windows(reader, [None if has_rope else window for has_rope in rotated], window)
    bias = reader.take("attention_bias", bool, False)
    layers = [
        attention(sizes, i, rope=rope if has_rope else None, window=windows[i], qkv_bias=bias, o_bias=bias)
        for i, has_rope in enumerate(rotated)
    ]
    return decoder(sizes, layers, rope, mlp_bias=reader.take("mlp_bias", bool, False))


def olmo2(reader: Config) -> DecoderProgram:
    """OLMo 2 (OLMo team 2025): norms after each part instead of before, and over the whole of q and of k."""
    sizes = read_sizes(reader)
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    bias = reader.take("attention_bias", bool, False)
    norm = Norm("rms", sizes.num_heads * sizes.head_dim, sizes.norm_eps, cast_late=True)
    layers = [
        attention(sizes, i, rope=rope, qkv_bias=bias, o_bias=bias, qk_norm=norm, qk_norm_over="all")
        for i in range(sizes.num_layers)
    ]
    return decoder(sizes, layers, rope, norms="after", cast_late=True)


def granite(reader: Config) -> DecoderProgram:
    """Granite 3 (Granite team 2024): four multipliers; one is the attention's scale itself, one divides the logits."""
    sizes = read_sizes(reader)
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=sizes.max_positions)
    bias = reader.take("attention_bias", bool, False)
    scale = float(reader.take("attention_multiplier", float, 1.0))
    divisor = float(reader.take("logits_scaling", float, 1.0))
    if divisor == 0:
        refuse("logits_scaling", "The config divides the logits by zero.", "Expected any other number.")
    layers = [attention(sizes, i, rope=rope, scale=scale, qkv_bias=bias, o_bias=bias) for i in range(sizes.num_layers)]
    return decoder(
        sizes, layers, rope,
        mlp_bias=reader.take("mlp_bias", bool, False),
        embedding_scale=float(reader.take("embedding_multiplier", float, 1.0)),
        residual_scale=float(reader.take("residual_multiplier", float, 1.0)),
        logit_scale=1.0 / divisor,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "llama": Family(llama, weight_map, bos=1, eos=2),
    "mistral": Family(mistral, weight_map, bos=1, eos=2),
    "qwen2": Family(qwen2, weight_map),
    "qwen3": Family(qwen3, weight_map),
    "smollm3": Family(smollm3, weight_map, bos=128_000, eos=128_001, pad=128_004),
    "olmo2": Family(olmo2, weight_map, eos=50_279, pad=1),
    "granite": Family(granite, weight_map, bos=1, eos=2),
}


def _upper_windows(reader: Config, num_layers: int) -> list[int | None]:
    """Qwen's rule: layers from `max_window_layers` on have the window."""
    window = sliding_window(reader, default=4096)
    first = reader.take("max_window_layers", int, 28)
    return read_windows(reader, [window if i >= first else None for i in range(num_layers)], window)


def _rotated_layers(reader: Config, num_layers: int) -> list[bool]:
    """SmolLM 3's rule: `no_rope_layers` holds 1 where there IS rotation; without it every n-th layer has none."""
    interval = positive(reader, "no_rope_layer_interval", 4)
    flags = reader.take("no_rope_layers", list, None)
    if flags is None:
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        what = f"The config's no_rope_layers has {len(flags)} entries for {num_layers} layers, or not only 0 and 1."
        refuse("no_rope_layers", what, "Expected 1 (rotary positions) or 0 (none) for each layer.")
    return [bool(flag) for flag in flags[:num_layers]]
