"""What a config may not say, and the words it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_gemma import pluglm_describe_model as describe

from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
SLIDING, FULL = "sliding_attention", "full_attention"

ROWS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("gemma-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention", ["True", "token by token"]),
    ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention", ["True", "token by token"]),
    ("gemma-3-1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention", ["True", "token by token"]),
    ("gemma-2b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", ["read by nobody"]),
    ("gemma-2b", {"final_logit_softcapping": 30.0}, "final_logit_softcapping", ["read by nobody"]),
    ("gemma-2b", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar", ["read by nobody"]),
    ("gemma-2b", {"sliding_window": 4096}, "sliding_window", ["read by nobody"]),
    ("gemma-2b", {"hidden_act": "xielu"}, "hidden_act", ["'xielu'", "'gelu_pytorch_tanh'"]),
    ("gemma-2b", {"hidden_activation": "silu"}, "hidden_activation", ["'silu'", "'gelu_tanh'", "Releases"]),
    ("gemma-2b", {"hidden_activation": "tanh"}, "hidden_activation", ["'tanh'"]),
    ("gemma-2-2b", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar", ['lacks "query_pre_attn_scalar"']),
    ("gemma-2-2b", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar", ["of 0", "above zero"]),
    ("gemma-2-2b", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping", ["of 0.0", "null for none"]),
    ("gemma-2-2b", {"final_logit_softcapping": -1}, "final_logit_softcapping", ["of -1", "null for none"]),
    ("gemma-2-2b", {"final_logit_softcapping": "30"}, "final_logit_softcapping", ["Expected float, found '30'"]),
    ("gemma-2-2b", {"sliding_window": None}, "sliding_window", ["is null", "sliding_attention"]),
    ("gemma-2-2b", {"sliding_window": 0}, "sliding_window", ['"sliding_window": 0', "above zero"]),
    ("gemma-2-9b", {"sliding_window_size": 2048}, "sliding_window_size", ["2048", "Supported is 4096"]),
    ("gemma-2-2b", {"layer_types": [FULL]}, "layer_types", ["1 entries for 26 layers"]),
    ("gemma-2-2b", {"layer_types": ["chunked_attention"] * 26}, "layer_types", ["'chunked_attention'", SLIDING]),
    ("gemma-2-2b", {"rope_local_base_freq": 1e4}, "rope_local_base_freq", ["read by nobody"]),
    (
        "gemma-2-2b",
        {"rope_parameters": {FULL: {"rope_theta": 1e4}}},
        "rope_parameters.full_attention",
        ["read by nobody"],
    ),
    ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", ["50.0", "norms of q and k"]),
    ("gemma-3-1b", {"sliding_window_pattern": 0}, "sliding_window_pattern", ["above zero"]),
    ("gemma-3-1b", {"rope_local_base_freq": -1.0}, "rope_local_base_freq", ["of -1.0", "above zero"]),
    ("gemma-3-1b", {"rope_scaling": {"rope_type": "su"}}, "rope_scaling.rope_type", ["'su'"]),
    ("gemma-3-1b", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters.rope_theta", ["read by nobody"]),
    (
        "gemma-3-1b",
        {"rope_parameters": {SLIDING: {"rope_theta": 5.0}}},
        "rope_parameters.sliding_attention.rope_theta",
        ["5.0", "rope_local_base_freq", "10000", "one thing"],
    ),
    (
        "gemma-3-1b",
        {"rope_parameters": {"chunked_attention": {"rope_theta": 5.0}}},
        "rope_parameters.chunked_attention",
        ["read by nobody"],
    ),
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


def test_the_model_with_pictures_belongs_to_another_plugin() -> None:
    with pytest.raises(ConfigError) as caught:
        describe({**PUBLISHED["gemma-3-1b"], "model_type": "gemma3"})
    assert caught.value.key == "model_type"
    for word in ("'gemma3'", "gemma, gemma2, gemma3_text"):
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads", "max_position_embeddings", "rms_norm_eps"])  # fmt: skip
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_size_that_is_missing_is_never_guessed(name: str, key: str) -> None:
    config = {k: value for k, value in PUBLISHED[name].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)


@pytest.mark.parametrize(("name", "key"), [("gemma-2b", "hidden_act"), ("gemma-3-1b", "hidden_activation")])
def test_an_activation_that_is_missing_is_never_guessed(name: str, key: str) -> None:
    config = {k: value for k, value in PUBLISHED[name].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)
