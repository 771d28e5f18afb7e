"""What a config may not say, and the words it is refused with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_deepseek import pluglm_describe_model as describe

from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())

ROWS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("deepseek-v3", {"index_topk": 2048}, "index_topk", ['"index_topk"', "read by nobody"]),
    ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func", ["'softmax'", "the sigmoid of their scores"]),
    ("deepseek-v3", {"topk_method": "greedy"}, "topk_method", ["'greedy'", "corrected scores, from the best groups"]),
    ("deepseek-v3", {"num_nextn_predict_layers": 2}, "num_nextn_predict_layers", ["2", "Expected one of 0, 1"]),
    ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq", ["2", "all layers after the dense ones"]),
    ("deepseek-v3", {"num_key_value_heads": 64}, "num_key_value_heads", ["64 key-value heads", "of its own"]),
    ("deepseek-v3", {"head_dim": 128}, "head_dim", ["head_dim of 128", "qk_rope_head_dim of 64"]),
    ("deepseek-v3", {"qk_head_dim": 128}, "qk_head_dim", ["128", "192", "the sum of"]),
    ("deepseek-v3", {"qk_rope_head_dim": 63}, "head_dim", ["63 dimensions", "pairs"]),
    ("deepseek-v3", {"q_lora_rank": 0}, "q_lora_rank", ['"q_lora_rank": 0', "above zero"]),
    ("deepseek-v3", {"n_group": 0}, "n_group", ['"n_group": 0']),
    ("deepseek-v3", {"n_shared_experts": 0}, "n_shared_experts", ['"n_shared_experts": 0']),
    ("deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace", ["-1 layers without experts"]),
    ("deepseek-v3", {"rope_interleave": "yes"}, "rope_interleave", ["Expected bool, found 'yes'"]),
    ("deepseek-v3", {"mlp_bias": True}, "mlp_bias", ["read by nobody"]),
    ("deepseek-v2", {"scoring_func": "sigmoid"}, "scoring_func", ["'sigmoid'", "the softmax of their scores"]),
    ("deepseek-v2", {"norm_topk_prob": True}, "norm_topk_prob", ["True", "as they are"]),
    ("deepseek-v2", {"topk_method": "noaux_tc"}, "topk_method", ["'noaux_tc'", "'group_limited_greedy'"]),
    ("deepseek-v2", {"n_group": None}, "n_group", ['lacks "n_group"']),
    ("deepseek-v2", {"rope_interleave": True}, "rope_interleave", ["read by nobody"]),
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
    with pytest.raises(ConfigError, match="pluglm-arch-deepseek reads deepseek_v2, deepseek_v3") as caught:
        describe({**PUBLISHED["deepseek-v3"], "model_type": "deepseek_v32"})
    assert caught.value.key == "model_type"


SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    "max_position_embeddings", "hidden_act", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok",
)  # fmt: skip


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v3"])
def test_a_size_that_is_missing_is_never_guessed(name: str, key: str) -> None:
    config = {k: value for k, value in PUBLISHED[name].items() if k != key}
    with pytest.raises(ConfigError, match=f'lacks "{key}"'):
        describe(config)
