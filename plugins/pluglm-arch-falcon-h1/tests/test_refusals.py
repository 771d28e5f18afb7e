"""What a config may not say, and the words it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_falcon_h1 import pluglm_describe_model as describe

from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())

ROWS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping", ["read by nobody"]),
    ({"mamba_use_mlp": False}, "mamba_use_mlp", ["mamba_use_mlp = False", "a feed-forward"]),
    ({"mamba_d_head": 63}, "mamba_d_head", ["24 state space heads of size 63", "1536", "mamba_d_ssm"]),
    ({"mamba_d_head": "large"}, "mamba_d_head", ["size large"]),
    ({"mamba_d_head": "auto", "mamba_n_heads": 7}, "mamba_d_head", ["7 state space heads of size 219"]),
    ({"mamba_n_groups": 5}, "mamba_n_groups", ["5 groups for 24 state space heads"]),
    ({"mamba_d_state": 0}, "mamba_d_state", ['"mamba_d_state": 0', "above zero"]),
    ({"mamba_d_ssm": -4}, "mamba_d_ssm", ['"mamba_d_ssm": -4']),
    ({"ssm_multipliers": [1.0, 2.0]}, "ssm_multipliers", ["[1.0, 2.0]", "5 numbers"]),
    ({"mlp_multipliers": [1.0, "2"]}, "mlp_multipliers", ["2 numbers"]),
    ({"mlp_multipliers": 1.5}, "mlp_multipliers", ["Expected list, found 1.5"]),
    ({"key_multiplier": True}, "key_multiplier", ["Expected float, found True"]),
    ({"time_step_limit": [0.2, 0.1]}, "time_step_limit", ["[0.2, 0.1]"]),
    ({"hidden_act": "xielu"}, "hidden_act", ["hidden_act = 'xielu'", "'silu'"]),
    ({"num_key_value_heads": 3}, "num_key_value_heads", ["3 key-value heads", "8 heads"]),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", ["0.5", "whole heads"]),
]


@pytest.mark.parametrize(("changes", "key", "words"), ROWS, ids=[f"{row[1]}-{i}" for i, row in enumerate(ROWS)])
def test_a_config_that_cannot_be_honoured_is_refused(changes: dict[str, Any], key: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        describe({**PUBLISHED["falcon-h1-0.5b"], **changes})
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"],
)
def test_a_size_that_is_missing_is_never_guessed(key: str) -> None:
    config = {k: value for k, value in PUBLISHED["falcon-h1-0.5b"].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)


def test_a_model_type_of_another_plugin_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'falcon'.*\n.*pluglm-arch-falcon-h1 reads falcon_h1") as caught:
        describe({**PUBLISHED["falcon-h1-0.5b"], "model_type": "falcon"})
    assert caught.value.key == "model_type"
