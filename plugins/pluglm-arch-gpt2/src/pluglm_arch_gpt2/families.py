"""One function a model type: config -> `DecoderProgram`. What differs between the two is what stands here.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from pluglm_blocks.reading import Config, Family

from pluglm.contracts import DecoderProgram
from pluglm_arch_gpt2.program import decoder
from pluglm_arch_gpt2.sizes import read_sizes
from pluglm_arch_gpt2.weights import gpt2_weights, gpt_bigcode_weights

_PRECISION = "says in which precision scores are computed; the attention backend says it here"
_RUNNER = "a setting of an inference server"
#: Keys of published files that change nothing, with the reason.
UNREAD_BIGCODE = {
    "attention_softmax_in_fp32": _PRECISION,
    "scale_attention_softmax_in_fp32": _PRECISION,
    **dict.fromkeys(("inference_runner", "validate_runner_input", "max_batch_size"), _RUNNER),
    **dict.fromkeys(("pad_key_length", "pre_allocate_kv_cache"), _RUNNER),
}


def gpt2(reader: Config) -> DecoderProgram:
    """GPT-2 (Radford et al. 2019): learned positions, one norm before each part, as many key-value heads as heads."""
    sizes = read_sizes(reader)
    reader.ignore("reorder_and_upcast_attn", _PRECISION)
    scale = sizes.head_dim**-0.5 if reader.take("scale_attn_weights", bool, True) else 1.0
    by_layer = reader.take("scale_attn_by_inverse_layer_idx", bool, False)
    scales = [scale / (i + 1) if by_layer else scale for i in range(sizes.num_layers)]
    return decoder(sizes, scales, num_kv_heads=sizes.num_heads)


def gpt_bigcode(reader: Config) -> DecoderProgram:
    """SantaCoder and StarCoder (Li et al. 2023): one key-value head for all queries (Shazeer 2019), or one each."""
    sizes = read_sizes(reader)
    for key, reason in UNREAD_BIGCODE.items():
        reader.ignore(key, reason)
    num_kv_heads = 1 if reader.take("multi_query", bool, True) else sizes.num_heads
    reader.expect("num_key_value_heads", num_kv_heads, "multi_query says how many there are.")
    scale = sizes.head_dim**-0.5 if reader.take("scale_attn_weights", bool, True) else 1.0
    return decoder(sizes, [scale] * sizes.num_layers, num_kv_heads=num_kv_heads)


FAMILIES: dict[str, Family] = {
    "gpt2": Family(gpt2, gpt2_weights, bos=50_256, eos=50_256),
    "gpt_bigcode": Family(gpt_bigcode, gpt_bigcode_weights, bos=50_256, eos=50_256),
}
