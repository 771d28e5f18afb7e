"""Reading a config: every key is used, ignored with a reason, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from pluglm.checkpoint import NEUTRAL, ConfigReader
from pluglm.errors import ConfigError

# What the dense Llama-like families read; their own plugins do it for real.
ARCHITECTURE_KEYS = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters rope_theta rope_scaling attention_bias mlp_bias "
    "sliding_window use_sliding_window max_window_layers layer_types no_rope_layers no_rope_layer_interval embedding_multiplier "
    "logits_scaling residual_multiplier attention_multiplier".split()
)


def test_values_come_back_typed() -> None:
    reader = ConfigReader({"n": 4, "eps": 1, "act": "silu", "tie": True, "ids": [1, 2], "rest": None})
    assert reader.take("n", int) == 4
    assert reader.take("eps", float) == 1.0
    assert isinstance(reader.take("eps", float), float)
    assert reader.take("act", str) == "silu"
    assert reader.take("tie", bool) is True
    assert reader.take("ids", (int, list)) == [1, 2]
    assert reader.take("rest", int, 7) == 7
    assert reader.take("absent", int, None) is None
    assert "rest" not in reader
    assert reader.finish().used == ("n", "eps", "act", "tie", "ids", "rest")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, int),
        (False, float),
        (1, bool),
        (1.0, int),
        ("4", int),
        (4, str),
        ([], dict),
        ({}, list),
        (True, (int, float)),
    ],
)
def test_a_value_of_another_type_is_refused(value: Any, expected: Any) -> None:
    with pytest.raises(ConfigError, match=r'"key" of the wrong type[\s\S]*Expected') as caught:
        ConfigReader({"key": value}, path="config.json", model_type="llama").take("key", expected)
    assert caught.value.key == "key"
    assert caught.value.path == "config.json"
    assert "llama" in str(caught.value)


def test_a_number_too_long_to_print_does_not_break_the_message() -> None:
    with pytest.raises(ConfigError, match="a very long number"):
        ConfigReader({"key": 10**6000}).take("key", str)


@pytest.mark.parametrize("config", [{}, {"hidden_size": None}])
def test_a_required_key_has_no_guess(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match='lacks "hidden_size"'):
        ConfigReader(config).take("hidden_size", int)


def test_a_choice_names_what_is_allowed() -> None:
    assert ConfigReader({"act": "silu"}).choice("act", ("silu", "gelu")) == "silu"
    assert ConfigReader({}).choice("act", ("silu",), None) is None
    assert ConfigReader({}).choice("act", ("silu",), "silu") == "silu"
    with pytest.raises(ConfigError, match=r"act = 'relu'[\s\S]*'silu', 'gelu'"):
        ConfigReader({"act": "relu"}).choice("act", ("silu", "gelu"))
    with pytest.raises(ConfigError, match="True"):
        ConfigReader({"n": True}).choice("n", (1, 2))


def test_an_expectation_refuses_another_value_with_its_reason() -> None:
    ConfigReader({"mlp_bias": False}).expect("mlp_bias", False, "no biases")
    ConfigReader({"mlp_bias": None}).expect("mlp_bias", False, "no biases")
    ConfigReader({}).expect("mlp_bias", False, "no biases")
    with pytest.raises(ConfigError, match=r"mlp_bias = True[\s\S]*False: no biases"):
        ConfigReader({"mlp_bias": True}).expect("mlp_bias", False, "no biases")
    with pytest.raises(ConfigError, match="mlp_bias = 0"):
        ConfigReader({"mlp_bias": 0}).expect("mlp_bias", False, "no biases")


def test_every_key_that_nobody_used_is_listed_at_once() -> None:
    reader = ConfigReader({"hidden_size": 8, "soft_cap": 30.0, "alibi": True, "use_cache": True}, path="config.json")
    reader.take("hidden_size", int)
    with pytest.raises(ConfigError, match=r'"soft_cap", "alibi"') as caught:
        reader.finish()
    assert caught.value.keys == ("soft_cap", "alibi")
    assert caught.value.key == "soft_cap"
    assert "lost in silence" in caught.value.why
    assert "remove it" in caught.value.fix


def test_the_report_tells_what_became_of_each_key() -> None:
    reader = ConfigReader(
        {"model_type": "llama", "n": 1, "note": "x", "auto_map": {"AutoModel": "evil.Model"}, "_attn": "eager"}
    )
    reader.take("n", int)
    reader.ignore("note", "a comment")
    reader.ignore("absent", "never there")
    report = reader.finish()
    assert report.used == ("model_type", "n")
    assert report.ignored["note"] == "a comment"
    assert "no code is taken" in report.ignored["auto_map"]
    assert "absent" not in report.ignored
    assert report.dropped == ("_attn",)


def test_a_nested_object_is_accounted_for_key_by_key() -> None:
    reader = ConfigReader({"rope": {"rope_type": "yarn", "factor": 4, "mscale": 1.0}, "none": None})
    assert reader.sub("none") is None
    assert reader.sub("absent") is None
    rope = reader.sub("rope")
    assert rope is not None
    assert reader.sub("rope") is rope
    assert rope.take("factor", float) == 4.0
    rope.choice("rope_type", ("yarn",))
    with pytest.raises(ConfigError, match=r'"rope\.mscale"') as caught:
        reader.finish()
    assert caught.value.keys == ("rope.mscale",)
    rope.take("mscale", float)
    assert reader.finish().used == ("rope", "none", "rope.rope_type", "rope.factor", "rope.mscale")


def test_a_neutral_key_inside_a_nested_object_is_not_neutral() -> None:
    reader = ConfigReader({"rope": {"use_cache": True}})
    reader.sub("rope")
    with pytest.raises(ConfigError, match=r"rope\.use_cache"):
        reader.finish()


@pytest.mark.parametrize(
    ("key", "neutral", "other"),
    [
        ("pruned_heads", {}, {"0": [1]}),
        ("is_encoder_decoder", False, True),
        ("add_cross_attention", False, True),
        ("tie_encoder_decoder", False, True),
        ("chunk_size_feed_forward", 0, 8),
        ("pretraining_tp", 1, 2),
        ("cross_attention_hidden_size", None, 64),
        ("temperature", 1.0, 0.7),
        ("repetition_penalty", 1.0, 1.1),
        ("do_sample", False, True),
        ("bad_words_ids", None, [[1]]),
        ("is_encoder_decoder", None, 0),
    ],
)
def test_a_key_that_is_neutral_at_one_value_is_refused_at_another(key: str, neutral: Any, other: Any) -> None:
    assert key in ConfigReader({key: neutral}).finish().ignored
    with pytest.raises(ConfigError, match=key):
        ConfigReader({key: other}).finish()


def test_a_neutral_key_can_be_taken_all_the_same() -> None:
    reader = ConfigReader({"pad_token_id": 3, "is_encoder_decoder": True})
    assert reader.take("pad_token_id", int) == 3
    assert reader.take("is_encoder_decoder", bool)
    assert reader.finish().ignored == {}


def test_every_neutral_key_has_a_reason() -> None:
    assert all(neutral.reason for neutral in NEUTRAL.values())
    assert not ARCHITECTURE_KEYS & set(NEUTRAL)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "granite"])
@pytest.mark.parametrize("full", [True, False])
def test_the_configs_that_transformers_5_writes_leave_only_keys_of_the_architecture(
    model_type: str, full: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type)
    written = config.to_dict() if full else config.to_diff_dict()
    reader = ConfigReader(written)
    for key in ARCHITECTURE_KEYS & set(written):
        reader.take(key, (int, float, str, bool, list, dict), None)
    report = reader.finish()
    assert set(report.used) | set(report.ignored) | set(report.dropped) == set(written)


V4_LLAMA = {
    "_name_or_path": "org/name", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": [2, 3], "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02,
    "intermediate_size": 128, "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0", "use_cache": True, "vocab_size": 128,
}  # fmt: skip
V4_DUMP = {
    "return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False, "use_bfloat16": False,
    "tf_legacy_loss": False, "pruned_heads": {}, "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False,
    "cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False, "max_length": 20, "min_length": 0,
    "do_sample": False, "early_stopping": False, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False,
    "return_dict_in_generate": False, "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None, "finetuning_task": None,
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tokenizer_class": None, "prefix": None, "pad_token_id": None,
    "sep_token_id": None, "decoder_start_token_id": None, "task_specific_params": None, "problem_type": None,
}  # fmt: skip


@pytest.mark.parametrize("extra", [{}, V4_DUMP], ids=["as published", "dumped in full"])
def test_the_configs_that_transformers_4_wrote_leave_only_keys_of_the_architecture(extra: dict[str, Any]) -> None:
    reader = ConfigReader({**V4_LLAMA, **extra})
    for key in ARCHITECTURE_KEYS & set(V4_LLAMA) - {"rope_scaling"}:
        reader.take(key, (int, float, str, bool))
    scaling = reader.sub("rope_scaling")
    assert scaling is not None
    assert scaling.choice("rope_type", ("llama3",)) == "llama3"
    assert scaling.take("factor", float) == 8.0
    assert reader.finish().dropped == ()


def test_a_scaling_that_nobody_reads_is_refused() -> None:
    reader = ConfigReader(V4_LLAMA)
    for key in ARCHITECTURE_KEYS & set(V4_LLAMA) - {"rope_scaling"}:
        reader.take(key, (int, float, str, bool))
    with pytest.raises(ConfigError, match="rope_scaling"):
        reader.finish()
