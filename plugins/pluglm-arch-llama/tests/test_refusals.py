"""What a config may not say, and the words it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_llama import pluglm_describe_model as describe

from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())

ROWS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    (
        "llama-3.2",
        {"attn_logit_softcapping": 50.0},
        "attn_logit_softcapping",
        ['"attn_logit_softcapping"', "read by nobody"],
    ),
    ("llama-3.2", {"quant": 1, "clip_qkv": 8}, "quant", ['"quant", "clip_qkv"']),
    ("llama-3.2", {"hidden_act": "xielu"}, "hidden_act", ["hidden_act = 'xielu'", "'silu'", "'gelu_pytorch_tanh'"]),
    ("llama-3.2", {"rope_interleaved": True}, "rope_interleaved", ["rope_interleaved = True", "i + head_dim / 2"]),
    ("llama-3.2", {"hidden_size": "2048"}, "hidden_size", ["wrong type", "Expected int, found '2048'"]),
    ("llama-3.2", {"hidden_size": None}, "hidden_size", ['lacks "hidden_size"', "null"]),
    ("llama-3.2", {"num_hidden_layers": 0}, "num_hidden_layers", ['"num_hidden_layers": 0', "above zero"]),
    ("llama-3.2", {"num_key_value_heads": 7}, "num_key_value_heads", ["7 key-value heads", "32 heads"]),
    ("llama-3.2", {"num_key_value_heads": -8}, "num_key_value_heads", ["-8"]),
    ("llama-3.2", {"num_key_value_heads": 0}, "num_key_value_heads", ['"num_key_value_heads": 0']),
    ("llama-3.2", {"head_dim": 63}, "head_dim", ["63 dimensions", "pairs"]),
    ("llama-3.2", {"head_dim": None, "hidden_size": 2050}, "head_dim", ["hidden_size 2050", "not whole"]),
    ("llama-3.2", {"rms_norm_eps": -1.0}, "rms_norm_eps", ["-1.0"]),
    ("llama-3.2", {"tie_word_embeddings": 1}, "tie_word_embeddings", ["Expected bool, found 1"]),
    ("llama-3.2", {"attention_bias": "no"}, "attention_bias", ["Expected bool, found 'no'"]),
    ("llama-3.2", {"eos_token_id": ["</s>"]}, "eos_token_id", ["['</s>']", "Expected a token id"]),
    ("llama-3.2", {"eos_token_id": [True]}, "eos_token_id", ["Expected a token id"]),
    ("llama-3.2", {"is_encoder_decoder": True}, "is_encoder_decoder", ["a decoder alone"]),
    ("mistral", {"sliding_window": 0}, "sliding_window", ['"sliding_window": 0']),
    ("mistral", {"sliding_window": 4.5}, "sliding_window", ["Expected int, found 4.5"]),
    ("mistral", {"layer_types": ["full_attention"] * 32}, "layer_types", ["read by nobody"]),
    ("qwen2.5", {"use_mrope": True}, "use_mrope", ["one position a token"]),
    ("qwen2.5", {"layer_types": ["full_attention"] * 3}, "layer_types", ["3 entries for 24 layers"]),
    (
        "qwen2.5",
        {"layer_types": ["chunked_attention"] * 24},
        "layer_types",
        ["'chunked_attention'", "sliding_attention"],
    ),
    ("qwen2.5", {"layer_types": ["sliding_attention"] * 24}, "layer_types", ["no window", "use_sliding_window"]),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers", ["2 entries for 36 layers"]),
    ("smollm3", {"no_rope_layers": [2] * 36}, "no_rope_layers", ["not only 0 and 1"]),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval", ["above zero"]),
    ("granite", {"logits_scaling": 0.0}, "logits_scaling", ["by zero"]),
    ("granite", {"embedding_multiplier": True}, "embedding_multiplier", ["Expected float, found True"]),
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


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        (None, ["no model_type", "add the missing key"]),
        ("gemma2", ["'gemma2'", "llama, mistral, qwen2"]),
        (3, ["the model_type 3"]),
    ],
)
def test_a_model_type_of_another_plugin_is_refused(model_type: Any, words: list[str]) -> None:
    config = {**PUBLISHED["llama-3.2"], "model_type": model_type}
    with pytest.raises(ConfigError) as caught:
        describe(config)
    assert caught.value.key == "model_type"
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                 "max_position_embeddings", "rms_norm_eps", "hidden_act"])  # fmt: skip
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_size_that_is_missing_is_never_guessed(name: str, key: str) -> None:
    config = {k: value for k, value in PUBLISHED[name].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)
