"""What all families read alike: sizes, activation, windows and token ids, from Hugging Face's names into pluglm's.

Defaults are given only where published files leave a key out, and are those of the reference: the config class of that
model type in Transformers 5.23.0. Everything else must be in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pluglm.checkpoint.config_reader import REQUIRED, ConfigReader, Type
from pluglm.contracts.program import Activation
from pluglm.errors import ConfigError

#: Names in the files -> the program's. Several names of one function: `gelu_new` and `gelu_pytorch_tanh` differ only in
#: how the same formula is computed.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}

#: Keys found in published files of these families that change nothing here, with the reason.
UNREAD = {
    "quantization_config": "`load` gives it to the quantizer, and refuses it without one",
    "pretraining_tp": "splits products into partial sums of the same value; the reference no longer does",
    "max_sequence_length": "an older spelling beside max_position_embeddings, which is read",
    "is_llama_config": "says that the training program's checkpoint was converted; this is the result",
    "unsloth_version": "names the program that wrote the file",
    "unsloth_fixed": "names the program that wrote the file",
}


@dataclass(frozen=True)
class Sizes:
    """What every family has, in the program's names. max_positions: before any stretching of rotary positions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: Activation
    tied: bool


class Config(ConfigReader):
    """A reader that tells `null` from a missing key, where the reference's default is something other than null."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._nulls = frozenset(key for key, value in config.items() if value is None)

    def nullable(self, key: str, kind: Type, default: Any) -> Any:
        """The value; None if the file says null; `default` if it says nothing."""
        return self.take(key, kind, None if key in self._nulls else default)


def refuse(key: str, what: str, why: str) -> NoReturn:
    """Raise ConfigError about a value that the reader cannot judge by itself."""
    raise ConfigError(what, why=why, fix="Correct the file, or download the model again.", key=key, path=None)


def positive(reader: ConfigReader, key: str, default: Any = REQUIRED) -> int:
    """A whole number above zero; required unless a default is given."""
    value = reader.take(key, int, default)
    if value <= 0:
        refuse(key, f'The config has "{key}": {value}.', "Expected a whole number above zero.")
    return int(value)


def read_sizes(
    reader: Config,
    *,
    tied: bool = False,
    head_dim: int | None = None,
    num_kv_heads: int | None = None,
    activation: str = "hidden_act",
    norm_eps: str = "rms_norm_eps",
) -> Sizes:
    """Read what every family has, and set aside what the reference does not read.

    Args:
        tied: `tie_word_embeddings` where the file leaves it out.
        head_dim, num_kv_heads: the same; None: hidden_size // num_heads, and num_heads (Llama 1's files have neither).
        activation, norm_eps: the keys under which the family's files have them.
    """
    for key, reason in UNREAD.items():
        reader.ignore(key, reason)
    hidden_size, num_heads = positive(reader, "hidden_size"), positive(reader, "num_attention_heads")
    num_kv_heads = reader.nullable("num_key_value_heads", int, num_kv_heads) or num_heads
    num_kv_heads = positive(reader, "num_key_value_heads", num_kv_heads)
    if num_heads % num_kv_heads:
        what = f"The config shares {num_kv_heads} key-value heads between {num_heads} heads."
        why = "Each must serve the same number of query heads (num_attention_heads % num_key_value_heads == 0)."
        refuse("num_key_value_heads", what, why)
    if head_dim is None and "head_dim" not in reader and hidden_size % num_heads:
        why = "Without head_dim it is hidden_size / num_attention_heads, which is not whole here."
        refuse("head_dim", f"The config has hidden_size {hidden_size}, {num_heads} heads and no head_dim.", why)
    head_dim = positive(reader, "head_dim", head_dim or hidden_size // num_heads)
    if head_dim % 2:
        refuse("head_dim", f"The config has heads of {head_dim} dimensions.", "Rotary positions turn pairs of them.")
    eps = float(reader.take(norm_eps, float))
    if eps < 0:
        refuse(norm_eps, f'The config has "{norm_eps}": {eps}.', "Expected a number that is not negative.")
    return Sizes(
        vocab_size=positive(reader, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=positive(reader, "intermediate_size"),
        num_layers=positive(reader, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_positions=positive(reader, "max_position_embeddings"),
        norm_eps=eps,
        activation=ACTIVATIONS[reader.choice(activation, ACTIVATIONS)],
        tied=bool(reader.take("tie_word_embeddings", bool, tied)),
    )


def read_layer_types(reader: Config, num_layers: int) -> list[str] | None:
    """`layer_types`: full_attention or sliding_attention for each layer; None: the file does not say."""
    kinds = reader.take("layer_types", list, None)
    if kinds is None:
        return None
    if len(kinds) != num_layers:
        what = f"The config's layer_types has {len(kinds)} entries for {num_layers} layers."
        refuse("layer_types", what, "Expected one a layer.")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            why = "Supported are full_attention and sliding_attention."
            refuse("layer_types", f"The config has a layer of type {kind!r}.", why)
    return list(kinds)


def read_windows(reader: Config, default: Sequence[int | None], window: int | None) -> list[int | None]:
    """Each layer's sliding window, from `layer_types` where the file has it.

    Args:
        default: what the family's other keys say, one entry a layer. window: of a layer of type `sliding_attention`.
    """
    kinds = read_layer_types(reader, len(default))
    if kinds is None:
        return list(default)
    if window is None and "sliding_attention" in kinds:
        why = "Expected use_sliding_window to be true and sliding_window a number."
        refuse("layer_types", "The config has layers of type sliding_attention, but no window for them.", why)
    return [window if kind == "sliding_attention" else None for kind in kinds]


def sliding_window(reader: Config, default: int | None = None) -> int | None:
    """`sliding_window` if `use_sliding_window` (absent: false) switches it on. default: where there is no such key."""
    if not reader.take("use_sliding_window", bool, False):
        reader.ignore("sliding_window", "use_sliding_window is false, so no layer has a window")
        return None
    return window_or_none(reader, default)


def window_or_none(reader: Config, default: int | None) -> int | None:
    """`sliding_window`: a number above zero, or null for none."""
    value = reader.nullable("sliding_window", int, default)
    return None if value is None else positive(reader, "sliding_window", value)


def token_ids(reader: Config, key: str, default: int | None, vocab_size: int) -> tuple[int, ...]:
    """The ids of one special token. An id outside the vocabulary (Llama 1's pad_token_id of -1) names no token."""
    value = reader.nullable(key, (int, list), default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if not isinstance(i, int) or isinstance(i, bool):
            refuse(key, f'The config has "{key}": {value!r}.', "Expected a token id, or a list of them.")
    return tuple(i for i in ids if 0 <= i < vocab_size)
