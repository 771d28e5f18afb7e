"""What a config may not say, and the words it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_falcon import pluglm_describe_model as describe

from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
POST = "apply_residual_connection_post_layernorm"

ROWS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("falcon-7b", {"n_head_kv": 8}, "n_head_kv", ['"n_head_kv"', "read by nobody"]),
    ("falcon-7b", {POST: True}, POST, [f"{POST} = True", "came before the norm"]),
    ("falcon-7b", {"activation": "mish"}, "activation", ["activation = 'mish'", "'gelu'"]),
    ("falcon-7b", {"hidden_size": 4545}, "num_attention_heads", ["4545 between 71 heads", "Not whole"]),
    ("falcon-7b", {"hidden_size": 71 * 63}, "num_attention_heads", ["heads of 63 dimensions", "pairs"]),
    ("falcon-7b", {"layer_norm_epsilon": -1.0}, "layer_norm_epsilon", ["-1.0", "not negative"]),
    ("falcon-7b", {"ffn_hidden_size": 0}, "ffn_hidden_size", ['"ffn_hidden_size": 0', "above zero"]),
    ("falcon-7b", {"alibi": 1}, "alibi", ["Expected bool, found 1"]),
    ("falcon-7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", ["rotates 0.5 of each head"]),
    ("falcon-7b", {"rope_scaling": {"type": "bent"}}, "rope_scaling.type", ["'bent'", "'linear'"]),
    ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn", ["= 2", "both parts share one norm"]),
    ("falcon-7b", {"multi_query": False, "num_kv_heads": 8}, "num_kv_heads", ["num_kv_heads = 8", "has its own"]),
    ("falcon-40b", {"parallel_attn": False}, "parallel_attn", ["parallel_attn = False", "both parts read the same"]),
    ("falcon-40b", {"num_kv_heads": 7}, "num_kv_heads", ["7 key-value heads", "128 heads"]),
    ("falcon-40b", {"num_kv_heads": -8}, "num_kv_heads", ['"num_kv_heads": -8', "above zero"]),
    ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn", ["= 3", "Expected one of 1, 2"]),
    ("falcon2-11b", {"ff_factor": 3}, "ff_factor", ["ff_factor 3", "feed-forward of 16384", "width is 4096"]),
    ("falcon-rw-1b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor", ["read by nobody"]),
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


@pytest.mark.parametrize("model_type", ["RefinedWeb", "RefinedWebModel", "falcon_h1"])
def test_a_model_type_of_another_plugin_is_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match="pluglm-arch-falcon reads falcon") as caught:
        describe({**PUBLISHED["falcon-7b"], "model_type": model_type})
    assert caught.value.key == "model_type"


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "layer_norm_epsilon"])  # fmt: skip
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_size_that_is_missing_is_never_guessed(name: str, key: str) -> None:
    config = {k: value for k, value in PUBLISHED[name].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)
