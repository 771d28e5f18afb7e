"""What a config may not say, and the words it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_phi import pluglm_describe_model as describe

from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
FACTORS = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}

ROWS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("phi-2", {"sliding_window": 512}, "sliding_window", ["read by nobody"]),
    ("phi-2", {"rms_norm_eps": 1e-5}, "rms_norm_eps", ["read by nobody"]),
    ("phi-2", {"layer_norm_eps": -1.0}, "layer_norm_eps", ['"layer_norm_eps": -1.0', "not negative"]),
    ("phi-2", {"qk_layernorm": 1}, "qk_layernorm", ["Expected bool, found 1"]),
    ("phi-2", {"partial_rotary_factor": 0.0}, "partial_rotary_factor", ["0.0 of each head", "0 of 80"]),
    ("phi-2", {"partial_rotary_factor": 1.5}, "partial_rotary_factor", ["1.5 of each head", "120 of 80"]),
    ("phi-2", {"partial_rotary_factor": 0.34}, "partial_rotary_factor", ["27 of 80", "pairs"]),
    (
        "phi-2",
        {"rope_scaling": {"type": "proportional"}},
        "rope_scaling.type",
        ["'proportional'", "'linear'", "'longrope'"],
    ),
    ("phi-2", {"rope_scaling": {"type": "su", **FACTORS}}, "rope_scaling.type", ["'su'"]),
    ("phi-3-mini-4k", {"attention_bias": True}, "attention_bias", ["True", "no projection"]),
    ("phi-3-mini-4k", {"partial_rotary_factor": 0.1}, "partial_rotary_factor", ["9 of 96"]),
    ("phi-3-mini-4k", {"sliding_window": 0}, "sliding_window", ["above zero"]),
    ("phi-3-mini-4k", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type", ["'longrope'", "'su'"]),
    ("phi-3-mini-128k", {"rope_scaling": {"type": "yarn", **FACTORS}}, "rope_scaling.type", ["'yarn'", "'longrope'"]),
    (
        "phi-3-mini-128k",
        {"rope_scaling": {"type": "su", **FACTORS, "short_factor": [1.0] * 47}},
        "short_factor",
        ["47 entries", "48 numbers"],
    ),
    (
        "phi-3-mini-128k",
        {"rope_scaling": {"type": "su", "short_factor": [1.0]}},
        "rope_scaling.long_factor",
        ["no such key"],
    ),
    (
        "phi-3-mini-128k",
        {"rope_scaling": {"type": "su", **FACTORS, "original_max_position_embeddings": 2048}},
        "rope_scaling.original_max_position_embeddings",
        ["2048", "4096", "one thing"],
    ),
    ("phi-4-mini", {"mlp_bias": True}, "mlp_bias", ["no projection"]),
    ("phi-4-mini", {"lm_head_bias": True}, "lm_head_bias", ["no projection"]),
    ("phi-4-mini", {"full_attn_mod": 2}, "full_attn_mod", ["Supported is 1"]),
    ("phi-4-mini", {"interpolate_factor": 2}, "interpolate_factor", ["Supported is 1"]),
    ("phi-4-mini", {"partial_rotary_factor": 0.5}, "short_factor", ["48 entries", "32 numbers"]),
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


@pytest.mark.parametrize("model_type", ["phimoe", "phi3small", "phi4_multimodal"])
def test_relatives_of_another_architecture_are_refused(model_type: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe({**PUBLISHED["phi-4"], "model_type": model_type})
    assert caught.value.key == "model_type"
    assert repr(model_type) in str(caught.value)
    assert "phi, phi3" in str(caught.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                 "num_attention_heads", "max_position_embeddings", "hidden_act"])  # fmt: skip
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_size_that_is_missing_is_never_guessed(name: str, key: str) -> None:
    config = {k: value for k, value in PUBLISHED[name].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)


@pytest.mark.parametrize(("name", "key"), [("phi-2", "layer_norm_eps"), ("phi-4", "rms_norm_eps")])
def test_a_norm_without_its_number_is_refused(name: str, key: str) -> None:
    config = {k: value for k, value in PUBLISHED[name].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)
