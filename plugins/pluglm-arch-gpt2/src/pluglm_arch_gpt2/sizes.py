"""What both model types have in their config, from the names of GPT-2's files into pluglm's."""

from __future__ import annotations

from dataclasses import dataclass

from pluglm_blocks.reading import ACTIVATIONS, UNREAD, Config, positive, refuse

from pluglm.contracts.program import Activation

_CLASSIFIER = "belongs to classification heads"
#: Keys of published files that change nothing, with the reason.
UNREAD_GPT2 = {
    "n_ctx": "the length of a stored causal mask; n_positions says how long a text may be",
    "n_special": "counts the special tokens that a training program added",
    "predict_special_tokens": "a setting of that training program",
    "gradient_checkpointing": "acts in training only",
    "output_past": "says what Transformers returned by default; the forward call says it here",
    **dict.fromkeys(("summary_type", "summary_use_proj", "summary_activation"), _CLASSIFIER),
    **dict.fromkeys(("summary_proj_to_labels", "summary_first_dropout"), _CLASSIFIER),
}


@dataclass(frozen=True)
class Sizes:
    """In the program's names. max_positions: rows of the table of learned positions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    norm_eps: float
    activation: Activation
    tied: bool

    @property
    def head_dim(self) -> int:
        """Exact: `read_sizes` has refused the rest."""
        return self.hidden_size // self.num_heads


def read_sizes(reader: Config) -> Sizes:
    """Read what both have, and set aside what the reference does not read.

    Raises: ConfigError for a size that is missing or without meaning.
    """
    for key, reason in (UNREAD | UNREAD_GPT2).items():
        reader.ignore(key, reason)
    hidden_size, num_heads = positive(reader, "n_embd"), positive(reader, "n_head")
    if hidden_size % num_heads:
        refuse("n_head", f"The config divides an n_embd of {hidden_size} between {num_heads} heads.", "Not whole.")
    norm_eps = float(reader.take("layer_norm_epsilon", float))
    if norm_eps < 0:
        what = f'The config has "layer_norm_epsilon": {norm_eps}.'
        refuse("layer_norm_epsilon", what, "Expected a number that is not negative.")
    return Sizes(
        vocab_size=positive(reader, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive(reader, "n_inner", 4 * hidden_size),
        num_layers=positive(reader, "n_layer"),
        num_heads=num_heads,
        max_positions=positive(reader, "n_positions"),
        norm_eps=norm_eps,
        activation=ACTIVATIONS[reader.choice("activation_function", ACTIVATIONS)],
        tied=bool(reader.take("tie_word_embeddings", bool, True)),
    )
