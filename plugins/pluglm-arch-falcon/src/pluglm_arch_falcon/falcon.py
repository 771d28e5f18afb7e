"""Falcon's config -> `DecoderProgram`.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests. Of its two paths, sdpa
is the one that counts: the eager one adds linear biases twice.
"""

from __future__ import annotations

from pluglm_blocks.reading import ACTIVATIONS, UNREAD, Config, Family, positive, read_rope, refuse, stretched

from pluglm.contracts import DecoderProgram
from pluglm_arch_falcon.alibi import scaled_slopes
from pluglm_arch_falcon.program import Norms, Sizes, decoder
from pluglm_arch_falcon.weights import weight_map

_NO_ROTATION = "alibi is true: positions come from linear biases, nothing is rotated"
#: The reference's, for published files that say nothing.
MAX_POSITIONS = 2048


def falcon(reader: Config) -> DecoderProgram:
    """Falcon 1 (Almazrouei et al. 2023, section 4) and Falcon 2: layers of three forms, positions of two kinds."""
    for key, reason in UNREAD.items():
        reader.ignore(key, reason)
    why = "the residual is what came before the norm."
    reader.expect("apply_residual_connection_post_layernorm", False, why)
    is_new = reader.take("new_decoder_architecture", bool, False)
    sizes = _sizes(reader, is_new=is_new)
    norms = _norms(reader, is_new=is_new)
    max_positions = positive(reader, "max_position_embeddings", MAX_POSITIONS)
    if reader.take("alibi", bool, False):
        for key in ("rope_theta", "rope_scaling", "rope_parameters"):
            reader.ignore(key, _NO_ROTATION)
        slopes = scaled_slopes(sizes.num_heads, sizes.head_dim)
        return decoder(sizes, norms, slopes=slopes, max_seq_len=max_positions)
    if sizes.head_dim % 2:
        what = f"The config has heads of {sizes.head_dim} dimensions."
        refuse("num_attention_heads", what, "Rotary positions turn pairs of them.")
    rope = read_rope(reader, head_dim=sizes.head_dim, max_positions=max_positions)
    return decoder(sizes, norms, rope=rope, max_seq_len=stretched(rope))


FAMILIES: dict[str, Family] = {"falcon": Family(falcon, weight_map, bos=11, eos=11)}


def _sizes(reader: Config, *, is_new: bool) -> Sizes:
    hidden_size, num_heads = positive(reader, "hidden_size"), positive(reader, "num_attention_heads")
    if hidden_size % num_heads:
        what = f"The config divides a hidden_size of {hidden_size} between {num_heads} heads."
        refuse("num_attention_heads", what, "Not whole.")
    norm_eps = float(reader.take("layer_norm_epsilon", float))
    if norm_eps < 0:
        what = f'The config has "layer_norm_epsilon": {norm_eps}.'
        refuse("layer_norm_epsilon", what, "Expected a number that is not negative.")
    return Sizes(
        vocab_size=positive(reader, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(reader, hidden_size),
        num_layers=positive(reader, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(reader, num_heads, is_new=is_new),
        norm_eps=norm_eps,
        activation=ACTIVATIONS[reader.choice("activation", ACTIVATIONS, "gelu")],
        bias=reader.take("bias", bool, False),
        tied=reader.take("tie_word_embeddings", bool, True),
    )


def _intermediate_size(reader: Config, hidden_size: int) -> int:
    """`ffn_hidden_size`, else four times the width. `ff_factor`, which Falcon 2 writes beside it, says the same."""
    size = positive(reader, "ffn_hidden_size", 4 * hidden_size)
    factor = reader.take("ff_factor", int, None)
    if factor is not None and factor * hidden_size != size:
        what = f"The config has ff_factor {factor} and a feed-forward of {size}, its width is {hidden_size}."
        refuse("ff_factor", what, "The feed-forward must be ff_factor times as wide as the model.")
    return size


def _num_kv_heads(reader: Config, num_heads: int, *, is_new: bool) -> int:
    """The new form groups queries; the old one has one key-value head for all of them, or one each."""
    shared = reader.take("multi_query", bool, True)
    if is_new:
        num_kv_heads = positive(reader, "num_kv_heads", num_heads)
        if num_heads % num_kv_heads:
            what = f"The config shares {num_kv_heads} key-value heads between {num_heads} heads."
            refuse("num_kv_heads", what, "Each must serve the same number of query heads.")
        return num_kv_heads
    if shared:
        reader.ignore("num_kv_heads", "multi_query is true and the layers have the old form: all queries share one")
        return 1
    reader.expect("num_kv_heads", num_heads, "in layers of the old form, without multi_query, each head has its own.")
    return num_heads


def _norms(reader: Config, *, is_new: bool) -> Norms:
    """Where the two parts of a layer read from."""
    if is_new:
        reader.expect("parallel_attn", True, "in layers of the new form both parts read the same vectors.")
        return "two" if reader.choice("num_ln_in_parallel_attn", (1, 2), 2) == 2 else "shared"
    if reader.take("parallel_attn", bool, True):
        reader.expect("num_ln_in_parallel_attn", 1, "in layers of the old form both parts share one norm.")
        return "shared"
    reader.ignore("num_ln_in_parallel_attn", "parallel_attn is false: each part has a norm of its own")
    return "sequential"
