"""What a config may not say, and the words it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_mamba import pluglm_describe_model as describe

from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())

ROWS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"attn_layer_idx": [3]}, "attn_layer_idx", ["attn_layer_idx", "read by nobody"]),
    ({"rms_norm": False}, "rms_norm", ["rms_norm = False", "is normalised"]),
    ({"intermediate_size": 5}, "intermediate_size", ["intermediate_size = 5", "expand * hidden_size"]),
    ({"num_heads": 127}, "num_heads", ["127 heads of 64 dimensions", "8192", "num_heads * head_dim"]),
    ({"n_groups": 7}, "n_groups", ["7 groups for 128 heads", "same number"]),
    ({"n_groups": 0}, "n_groups", ['"n_groups": 0', "above zero"]),
    ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon", ["-1.0", "not negative"]),
    ({"hidden_act": "xielu"}, "hidden_act", ["hidden_act = 'xielu'", "'silu'"]),
    ({"use_bias": "no"}, "use_bias", ["Expected bool, found 'no'"]),
    ({"expand": 1.5}, "expand", ["Expected int, found 1.5"]),
    ({"time_step_limit": [0.0]}, "time_step_limit", ["[0.0]", "the lowest and the highest"]),
    ({"time_step_limit": [0.2, 0.1]}, "time_step_limit", ["[0.2, 0.1]", "lowest"]),
    ({"time_step_limit": [-0.2, 0.1]}, "time_step_limit", ["below zero"]),
    ({"time_step_limit": [{"__float__": "Infinity"}] * 2}, "time_step_limit", ["Infinity", "may be infinite"]),
    ({"time_step_limit": [0.0, "inf"]}, "time_step_limit", ["'inf'"]),
    ({"time_step_limit": [False, True]}, "time_step_limit", ["[False, True]"]),
    ({"time_step_limit": 0.1}, "time_step_limit", ["Expected list, found 0.1"]),
    ({"is_encoder_decoder": True}, "is_encoder_decoder", ["a decoder alone"]),
]


@pytest.mark.parametrize(("changes", "key", "words"), ROWS, ids=[f"{row[1]}-{i}" for i, row in enumerate(ROWS)])
def test_a_config_that_cannot_be_honoured_is_refused(changes: dict[str, Any], key: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        describe({**PUBLISHED["codestral-mamba"], **changes})
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "state_size"]
)
def test_a_size_that_is_missing_is_never_guessed(key: str) -> None:
    config = {k: value for k, value in PUBLISHED["codestral-mamba"].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)


def test_a_model_type_of_another_plugin_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'mamba'.*\n.*pluglm-arch-mamba reads mamba2") as caught:
        describe({**PUBLISHED["codestral-mamba"], "model_type": "mamba"})
    assert caught.value.key == "model_type"
