"""BLOOM's config -> `DecoderProgram`.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from pluglm_blocks.reading import UNREAD, Config, alibi_slopes, positive, refuse

from pluglm.contracts import DecoderProgram
from pluglm_arch_bloom.program import Sizes, decoder

_FUSION = "fuses steps of the training program; the numbers are the same"
#: Keys of published files that change nothing, with the reason.
UNREAD_BLOOM = {
    "offset_alibi": "moves all scores of a query by one number, which the softmax takes out again",
    "attention_softmax_in_fp32": "says in which precision scores are computed; the attention backend says it here",
    **dict.fromkeys(("bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add", "skip_bias_add_qkv"), _FUSION),
}


def bloom(reader: Config) -> DecoderProgram:
    """BLOOM (BigScience 2022, section 3.2): ALiBi, and a norm between the embeddings and the first layer."""
    for key, reason in (UNREAD | UNREAD_BLOOM).items():
        reader.ignore(key, reason)
    why = "the residual is what came before the norm, as in every published model."
    reader.expect("apply_residual_connection_post_layernorm", False, why)
    reader.expect(
        "slow_but_exact", False, "sums in slices to repeat one training run's rounding, and loses two biases."
    )
    sizes = _sizes(reader)
    reader.expect("n_inner", 4 * sizes.hidden_size, "the feed-forward is four times as wide as the model.")
    slopes = alibi_slopes(sizes.num_heads)
    return decoder(sizes, slopes, activation="gelu_tanh", bias=True, embedding_norm=True)


def _sizes(reader: Config) -> Sizes:
    hidden_size = _spelled(reader, "hidden_size", "n_embed")
    num_heads = _spelled(reader, "n_head", "num_attention_heads")
    if hidden_size % num_heads:
        refuse("n_head", f"The config divides a hidden_size of {hidden_size} between {num_heads} heads.", "Not whole.")
    norm_eps = float(reader.take("layer_norm_epsilon", float))
    if norm_eps < 0:
        what = f'The config has "layer_norm_epsilon": {norm_eps}.'
        refuse("layer_norm_epsilon", what, "Expected a number that is not negative.")
    return Sizes(
        vocab_size=positive(reader, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=_spelled(reader, "n_layer", "num_hidden_layers"),
        num_heads=num_heads,
        max_seq_len=positive(reader, "seq_length") if "seq_length" in reader else None,
        norm_eps=norm_eps,
        tied=bool(reader.take("tie_word_embeddings", bool, True)),
    )


def _spelled(reader: Config, key: str, other: str) -> int:
    """A size that published files spell in two ways; a file with both must say the same."""
    found = {name: positive(reader, name) for name in (key, other) if name in reader}
    if len(set(found.values())) > 1:
        refuse(key, f"The config has {key} = {found[key]} and {other} = {found[other]}.", "They mean one thing.")
    return next(iter(found.values())) if found else positive(reader, key)
