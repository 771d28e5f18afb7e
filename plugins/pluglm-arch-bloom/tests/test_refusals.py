"""What a config may not say, and the words it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_bloom import pluglm_describe_model as describe

from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
POST = "apply_residual_connection_post_layernorm"

BLOOM: list[tuple[dict[str, Any], str, list[str]]] = [
    ({POST: True}, POST, [f"{POST} = True", "the residual is what came before the norm"]),
    ({"slow_but_exact": True}, "slow_but_exact", ["sums in slices", "loses two biases"]),
    ({"n_inner": 9}, "n_inner", ["n_inner = 9", "four times as wide"]),
    ({"n_embed": 1024}, "hidden_size", ["hidden_size = 14336", "n_embed = 1024", "They mean one thing"]),
    ({"num_attention_heads": 16}, "n_head", ["n_head = 112", "num_attention_heads = 16"]),
    ({"num_hidden_layers": 24}, "n_layer", ["n_layer = 70", "num_hidden_layers = 24"]),
    ({"n_head": 111}, "n_head", ["14336 between 111 heads"]),
    ({"seq_length": 0}, "seq_length", ['"seq_length": 0', "above zero"]),
    ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon", ["-1.0", "not negative"]),
    ({"n_positions": 2048}, "n_positions", ["read by nobody"]),
    ({"n_head": None}, "n_head", ['lacks "n_head"']),
]
MPT: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"no_bias": False}, "no_bias", ["no_bias = False", "have no biases"]),
    ({"expansion_ratio": 3}, "expansion_ratio", ["expansion_ratio = 3", "four times as wide"]),
    ({"norm_type": "rmsnorm"}, "norm_type", ["'rmsnorm'", "'low_precision_layernorm'", "'layernorm'"]),
    ({"logit_scale": 0.5}, "logit_scale", ["scales the logits", "in silence"]),
    ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale", ["scales the logits"]),
    ({"d_model": 4097}, "n_heads", ["4097 between 32 heads"]),
    ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon", ["-1.0", "not negative"]),
    ({"ffn_config": {"ffn_type": "mptmlp"}}, "ffn_config", ["read by nobody"]),
    ({"attn_config": "alibi"}, "attn_config", ["Expected dict, found 'alibi'"]),
]
ATTENTION: list[tuple[dict[str, Any], list[str]]] = [
    ({"attn_type": "multiquery_attention"}, ["'multiquery_attention'", "keys and values of its own"]),
    ({"alibi": False}, ["alibi = False", "from linear biases only"]),
    ({"qk_ln": True}, ["qk_ln = True", "not normalised"]),
    ({"prefix_lm": True}, ["prefix_lm = True", "from both sides"]),
    ({"attn_uses_sequence_id": True}, ["attn_uses_sequence_id = True", "a row holds one text"]),
    ({"rope": True}, ["attn_config.rope", "read by nobody"]),
    ({"is_encoder_decoder": True}, ["attn_config.is_encoder_decoder", "read by nobody"]),
]


def refusal(name: str, changes: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        describe({**PUBLISHED[name], **changes})
    return caught.value


@pytest.mark.parametrize(("changes", "key", "words"), BLOOM)
def test_a_bloom_that_cannot_be_honoured_is_refused(changes: dict[str, Any], key: str, words: list[str]) -> None:
    error = refusal("bloom", changes)
    assert error.key == key
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(("changes", "key", "words"), MPT)
def test_an_mpt_that_cannot_be_honoured_is_refused(changes: dict[str, Any], key: str, words: list[str]) -> None:
    error = refusal("mpt-7b", changes)
    assert error.key == key
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(("changes", "words"), ATTENTION)
def test_an_attention_config_that_cannot_be_honoured_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    error = refusal("mpt-7b", {"attn_config": {**PUBLISHED["mpt-7b"]["attn_config"], **changes}})
    assert error.key is not None
    assert error.key.removeprefix("attn_config.") in changes
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize(("key", "value"), [("alibi_bias_max", 0), ("clip_qkv", -6)])
def test_a_number_without_meaning_is_refused(key: str, value: float) -> None:
    error = refusal("mpt-7b", {"attn_config": {key: value}})
    assert error.key == key
    assert f'"{key}": {float(value)}' in str(error)


def test_a_model_type_of_another_plugin_is_refused() -> None:
    with pytest.raises(ConfigError, match="pluglm-arch-bloom reads bloom, mpt") as caught:
        describe({**PUBLISHED["bloom"], "model_type": "falcon"})
    assert caught.value.key == "model_type"


@pytest.mark.parametrize(
    ("name", "key"),
    [("bloom", key) for key in ("vocab_size", "hidden_size", "n_layer", "n_head", "layer_norm_epsilon")]
    + [("mpt-7b", key) for key in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len")],
)
def test_a_size_that_is_missing_is_never_guessed(name: str, key: str) -> None:
    config = {k: value for k, value in PUBLISHED[name].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)
