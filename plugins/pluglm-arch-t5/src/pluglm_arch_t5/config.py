"""config.json of model type t5 -> `T5Config`. Defaults are those of T5Config in Transformers 5.23.0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pluglm_blocks.reading import ACTIVATIONS, Config, positive, refuse, token_ids

from pluglm.contracts import AttentionSpec, MaskSpec
from pluglm.contracts.program import Activation

#: Keys of published files that change nothing here, with the reason.
UNREAD = {
    "n_positions": "the length of training texts; positions are relative, so there is no last one",
    "dropout_rate": "acts in training only",
    "gradient_checkpointing": "acts in training only",
    "output_past": "an older spelling of use_cache; generation always has a cache",
    "quantization_config": "`load` gives it to the quantizer, and refuses it without one",
}


@dataclass(frozen=True)
class T5Config:
    """One T5.

    Attributes:
        head_dim: need not be hidden_size / num_heads (T5 11B: 128 heads of 128 beside a hidden size of 1024).
        num_buckets: of relative positions. max_distance: from here on all are in the last bucket.
        gated: the feed-forward has a gate (version 1.1). activation: of it.
        tied: the head is the embedding. scaled: what goes into the head is multiplied by hidden_size ** -0.5.
        start, eos, pad: token ids.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    num_buckets: int
    max_distance: int
    norm_eps: float
    gated: bool
    activation: Activation
    tied: bool
    scaled: bool
    start: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    pad: tuple[int, ...] = ()

    def attention(self, *, causal: bool, bias: bool) -> AttentionSpec:
        """All three attentions: every head has keys of its own, and scores are not scaled."""
        H, D = self.num_heads, self.head_dim
        return AttentionSpec(H, H, D, D, scale=1.0, mask=MaskSpec(causal=causal), bias=bias)

    @property
    def encoder_attention(self) -> AttentionSpec:
        """Every token sees every other one, with a bias for their distance."""
        return self.attention(causal=False, bias=True)

    @property
    def decoder_attention(self) -> AttentionSpec:
        """A token sees those before it and itself, with a bias for their distance."""
        return self.attention(causal=True, bias=True)

    @property
    def cross_attention(self) -> AttentionSpec:
        """A token sees the encoder's whole output; between two texts there is no distance."""
        return self.attention(causal=False, bias=False)


def read_config(config: Mapping[str, Any]) -> tuple[T5Config, Config]:
    """Read one config; the reader's `finish` then refuses what was not read.

    Raises: ConfigError for a key that is missing, wrong, or at odds with another.
    """
    reader = Config(config)
    for key, reason in UNREAD.items():
        reader.ignore(key, reason)
    reader.expect("is_encoder_decoder", True, "this is the whole model, encoder and decoder.")
    reader.expect("is_decoder", False, "this is the whole model, encoder and decoder.")
    num_layers, vocab_size = positive(reader, "num_layers"), positive(reader, "vocab_size")
    num_buckets, max_distance = _distances(reader)
    gated, activation = _feed_forward(reader)
    tied, scaled = _head(reader)
    norm_eps = float(reader.take("layer_norm_epsilon", float, 1e-6))
    if norm_eps < 0:
        refuse("layer_norm_epsilon", f'The config has "layer_norm_epsilon": {norm_eps}.', "Expected it not negative.")
    sizes = T5Config(
        vocab_size, positive(reader, "d_model"), positive(reader, "d_ff"), num_layers,
        positive(reader, "num_decoder_layers", num_layers), positive(reader, "num_heads"), positive(reader, "d_kv"),
        num_buckets, max_distance, norm_eps, gated, activation, tied, scaled,
        token_ids(reader, "decoder_start_token_id", None, vocab_size),
        token_ids(reader, "eos_token_id", 1, vocab_size),
        token_ids(reader, "pad_token_id", 0, vocab_size),
    )  # fmt: skip
    return sizes, reader


def _distances(reader: Config) -> tuple[int, int]:
    """Buckets and the distance at which they end. The encoder has half of them for each direction."""
    buckets = positive(reader, "relative_attention_num_buckets", 32)
    furthest = positive(reader, "relative_attention_max_distance", 128)
    if buckets % 4:
        what = f'The config has "relative_attention_num_buckets": {buckets}.'
        refuse(
            "relative_attention_num_buckets", what, "Two directions, near and far in each: it must be a multiple of 4."
        )
    if furthest <= buckets // 2:
        what = f"The config has {buckets} buckets for distances up to {furthest}."
        why = "Half of them hold one distance each, so the furthest must be beyond these."
        refuse("relative_attention_max_distance", what, why)
    return buckets, furthest


def _feed_forward(reader: Config) -> tuple[bool, Activation]:
    """`feed_forward_proj`: an activation, or "gated-" and one. What newer files derive from it must agree."""
    said = reader.take("feed_forward_proj", str, "relu")
    gated, name = said.startswith("gated-"), said.removeprefix("gated-")
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        refuse("feed_forward_proj", f"The config asks for feed_forward_proj = {said!r}.",
               f'Expected one of {known}, or "gated-" before it.')  # fmt: skip
    if said == "gated-gelu":  # was trained with the approximation, whatever it is called (Shazeer 2020; T5 1.1)
        name = "gelu_new"
    reader.expect("is_gated_act", gated, "feed_forward_proj says so.")
    reader.expect("dense_act_fn", name, "feed_forward_proj says so.")
    return gated, ACTIVATIONS[name]


def _head(reader: Config) -> tuple[bool, bool]:
    """Is the head the embedding, and is its input scaled?

    Version 1.0 has both, 1.1 neither. Transformers 4 wrote `tie_word_embeddings` alone; 5 writes it as true into every
    file and means by `scale_decoder_outputs` what the other one used to say.
    """
    tied = reader.take("tie_word_embeddings", bool, True)
    scaled = reader.take("scale_decoder_outputs", bool, tied)
    return tied and scaled, scaled
