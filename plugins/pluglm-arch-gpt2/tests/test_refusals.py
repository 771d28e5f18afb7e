"""What a config may not say, and the words it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_gpt2 import pluglm_describe_model as describe

from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())

ROWS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("gpt2", {"rope_theta": 10_000.0}, "rope_theta", ['"rope_theta"', "read by nobody"]),
    ("gpt2", {"activation_function": "gelu_python"}, "activation_function", ["'gelu_python'", "'gelu_new'"]),
    ("gpt2", {"n_embd": 770}, "n_head", ["n_embd of 770", "12 heads", "Not whole"]),
    ("gpt2", {"n_layer": 0}, "n_layer", ['"n_layer": 0', "above zero"]),
    ("gpt2", {"n_inner": -1}, "n_inner", ['"n_inner": -1', "above zero"]),
    ("gpt2", {"n_positions": 1024.5}, "n_positions", ["wrong type", "Expected int, found 1024.5"]),
    ("gpt2", {"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon", ["-1e-05", "not negative"]),
    ("gpt2", {"scale_attn_weights": 1}, "scale_attn_weights", ["Expected bool, found 1"]),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": "no"}, "scale_attn_by_inverse_layer_idx", ["found 'no'"]),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention", ["no encoder to attend to"]),
    ("gpt2", {"multi_query": True}, "multi_query", ["read by nobody"]),
    ("starcoder", {"num_key_value_heads": 8}, "num_key_value_heads", ["num_key_value_heads = 8", "multi_query says"]),
    ("starcoder", {"multi_query": None, "num_key_value_heads": 48}, "num_key_value_heads", ["Supported is 1"]),
    ("starcoder", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx", ["read by nobody"]),
    ("starcoder", {"add_cross_attention": True}, "add_cross_attention", ["no encoder to attend to"]),
]


@pytest.mark.parametrize(
    ("name", "changes", "key", "words"), ROWS, ids=[f"{row[0]}-{row[2]}-{i}" for i, row in enumerate(ROWS)]
)
def test_a_config_that_cannot_be_honoured_is_refused(
    name: str, changes: dict[str, Any], key: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        describe({**PUBLISHED[name], **changes})
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)


def test_a_model_type_of_another_plugin_is_refused() -> None:
    with pytest.raises(ConfigError, match="pluglm-arch-gpt2 reads gpt2, gpt_bigcode") as caught:
        describe({**PUBLISHED["gpt2"], "model_type": "llama"})
    assert caught.value.key == "model_type"


@pytest.mark.parametrize("key", ["vocab_size", "n_embd", "n_layer", "n_head", "n_positions", "layer_norm_epsilon",
                                 "activation_function"])  # fmt: skip
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_size_that_is_missing_is_never_guessed(name: str, key: str) -> None:
    config = {k: value for k, value in PUBLISHED[name].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)
