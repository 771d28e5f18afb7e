"""MPT's config -> `DecoderProgram`. What concerns attention is an object of its own, `attn_config`.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests. There is one
difference on purpose: that code takes 8 for `alibi_bias_max`, whatever the file says. Here the file is honoured, as
by the code the models were trained with (MPT-7B-StoryWriter has 16).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pluglm_blocks.reading import UNREAD, Config, alibi_slopes, positive, refuse

from pluglm.checkpoint.config_reader import ConfigReader
from pluglm.checkpoint.neutral import NEUTRAL
from pluglm.contracts import DecoderProgram
from pluglm_arch_bloom.program import Sizes, decoder

#: Keys of published files that change nothing, with the reason.
UNREAD_MPT = {
    "learned_pos_emb": "with ALiBi there is no table of positions, and every published model has ALiBi",
    "embedding_fraction": "scales gradients of the embeddings; acts in training only",
    "emb_pdrop": "acts in training only",
    "verbose": "says how much the training program prints",
    **dict.fromkeys(("init_device", "init_config"), "used to make new weights only"),
    "tokenizer_name": "names the tokenizer that the model was trained with; its files stand beside the model",
}
#: Norms that differ in the precision they compute in; here it is always float32.
NORMS = ("low_precision_layernorm", "layernorm")


def mpt(reader: Config) -> DecoderProgram:
    """MPT (MosaicML 2023): ALiBi, neither biases nor shifts of norms, and clipped queries, keys and values."""
    for key, reason in (UNREAD | UNREAD_MPT).items():
        reader.ignore(key, reason)
    reader.choice("norm_type", NORMS, NORMS[0])
    reader.expect("no_bias", True, "projections and norms of this model type have no biases.")
    reader.expect("expansion_ratio", 4, "the feed-forward is four times as wide as the model.")
    sizes = _sizes(reader)
    if reader.take("logit_scale", (float, str), None) is not None:
        refuse("logit_scale", "The config scales the logits (logit_scale).", "The reference drops it in silence.")
    attention = reader.sub("attn_config")
    if attention is None:  # the reference's defaults
        return decoder(sizes, alibi_slopes(sizes.num_heads), activation="gelu", bias=False)
    _check(attention, reader.take("attn_config", dict))
    return decoder(
        sizes,
        _slopes(attention, sizes.num_heads),
        activation="gelu",
        bias=False,
        scale=attention.take("softmax_scale", float, None),
        qkv_clip=_clip(attention),
    )


def _sizes(reader: Config) -> Sizes:
    hidden_size, num_heads = positive(reader, "d_model"), positive(reader, "n_heads")
    if hidden_size % num_heads:
        refuse("n_heads", f"The config divides a d_model of {hidden_size} between {num_heads} heads.", "Not whole.")
    norm_eps = float(reader.take("layer_norm_epsilon", float, 1e-5))
    if norm_eps < 0:
        what = f'The config has "layer_norm_epsilon": {norm_eps}.'
        refuse("layer_norm_epsilon", what, "Expected a number that is not negative.")
    return Sizes(
        vocab_size=positive(reader, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=positive(reader, "n_layers"),
        num_heads=num_heads,
        max_seq_len=positive(reader, "max_seq_len"),
        norm_eps=norm_eps,
        tied=bool(reader.take("tie_word_embeddings", bool, True)),
    )


def _check(attention: ConfigReader, written: Mapping[str, Any]) -> None:
    """Refuse what the reference has no code for, and set aside what Transformers writes into every object.

    written: the same object as it stands in the file.
    """
    attention.expect("attn_type", "multihead_attention", "every head has keys and values of its own.")
    attention.expect("alibi", True, "positions come from linear biases only.")
    attention.expect("qk_ln", False, "queries and keys are not normalised.")
    attention.expect("prefix_lm", False, "no prefix is seen from both sides.")
    attention.expect("attn_uses_sequence_id", False, "a row holds one text.")
    attention.ignore("attn_impl", "names a kernel of the training program; the attention backend is chosen here")
    attention.ignore("model_type", "Transformers writes it into every object")
    for key, neutral in NEUTRAL.items():
        if neutral.allows(written.get(key)):
            attention.ignore(key, neutral.reason)


def _slopes(attention: ConfigReader, num_heads: int) -> tuple[float, ...]:
    exponent = float(attention.take("alibi_bias_max", float, 8.0))
    if exponent <= 0:
        refuse("alibi_bias_max", f'The config has "alibi_bias_max": {exponent}.', "Expected a number above zero.")
    return alibi_slopes(num_heads, max_exponent=exponent)


def _clip(attention: ConfigReader) -> float | None:
    """`clip_qkv`; 0, like null, means no clipping."""
    clip = float(attention.take("clip_qkv", float, 0.0))
    if clip < 0:
        refuse("clip_qkv", f'The config has "clip_qkv": {clip}.', "Expected a number that is not negative.")
    return clip or None
