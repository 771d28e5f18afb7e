"""Configs as they are published are described, without torch, and the weight map fills exactly the module's parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_t5 import pluglm_build_model, pluglm_describe_model
from pluglm_arch_t5.config import read_config

from pluglm.contracts import AttentionRequest, CrossSlot, KVSlot, ModelParts
from pluglm.errors import ConfigError, UnsupportedRequestError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
SMALL = {"num_layers": 2, "num_decoder_layers": 3}


def parts(config: dict[str, Any], dtype: str = "float32") -> ModelParts:
    from pluglm_attention_eager import pluglm_build_attention

    described = pluglm_describe_model(config=config)
    backend = pluglm_build_attention(request=AttentionRequest(described.attention, "cpu", dtype))
    return ModelParts(described, backend, {}, "cpu", dtype)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_described_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = pluglm_describe_model(config=config)
    assert described.is_encoder_decoder and described.program is None and described.max_seq_len is None
    assert (described.vocab_size, described.hidden_size) == (config["vocab_size"], config["d_model"])
    assert (described.decoder_start_token_id, described.eos_token_ids, described.pad_token_id) == (0, (1,), 0)
    assert {*described.used, *described.ignored} >= set(config)
    H, D = config["num_heads"], config["d_kv"]
    L = config.get("num_decoder_layers", config["num_layers"])
    assert described.num_layers == L
    assert described.slots == (KVSlot(H, D, D),) * L + (CrossSlot(H, D, D),) * L
    encoder, decoder, cross = described.attention
    assert all(s.scale == 1.0 and (s.num_heads, s.head_dim) == (H, D) for s in described.attention)
    assert [(s.mask.causal, s.bias) for s in (encoder, decoder, cross)] == [(False, True), (True, True), (False, False)]


def test_version_1_0_ties_and_scales_its_head_and_1_1_does_neither() -> None:
    heads = {name: read_config(config)[0] for name, config in PUBLISHED.items()}
    assert {name: (t5.tied, t5.scaled) for name, t5 in heads.items()} == {
        "t5-small": (True, True), "t5-11b": (True, True), "t5-v1.1-base": (False, False), "flan-t5-xl": (False, False),
    }  # fmt: skip
    as_v5 = {**PUBLISHED["flan-t5-xl"], "tie_word_embeddings": True, "scale_decoder_outputs": False}
    assert read_config(as_v5)[0] == heads["flan-t5-xl"]
    both = read_config({**PUBLISHED["t5-small"], "tie_word_embeddings": False, "scale_decoder_outputs": True})[0]
    assert (both.tied, both.scaled) == (False, True)


@pytest.mark.parametrize(
    ("written", "gated", "activation"),
    [
        (None, False, "relu"), ("relu", False, "relu"), ("gelu", False, "gelu"), ("gated-gelu", True, "gelu_tanh"),
        ("gated-silu", True, "silu"), ("gated-gelu_new", True, "gelu_tanh"), ("gated-relu", True, "relu"),
    ],
)  # fmt: skip
def test_the_feed_forward_is_named_by_one_key(written: str | None, gated: bool, activation: str) -> None:
    t5 = read_config({**PUBLISHED["t5-small"], "feed_forward_proj": written})[0]
    assert (t5.gated, t5.activation) == (gated, activation)


def test_numbers_that_the_first_files_leave_out_are_the_references() -> None:
    silent = {k: v for k, v in PUBLISHED["t5-small"].items() if "relative" not in k and k != "layer_norm_epsilon"}
    t5 = read_config(silent)[0]
    assert (t5.num_buckets, t5.max_distance, t5.norm_eps, t5.num_decoder_layers) == (32, 128, 1e-6, 6)
    assert pluglm_describe_model(config={**silent, "decoder_start_token_id": None}).decoder_start_token_id is None


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_t5 import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_weight_map_fills_every_parameter_and_no_other(name: str) -> None:
    import torch

    config = {**PUBLISHED[name], **SMALL}
    given = parts(config)
    with torch.device("meta"):
        module: Any = pluglm_build_model(config=config, parts=given)
    found = given.description.weights.rules
    targets = [target for rule in found if not rule.optional for target in rule.targets]
    assert sorted(targets) == sorted(key for key, _ in module.named_parameters())
    sources = [source for rule in found for source in rule.sources]
    assert len(set(sources)) == len(sources) and not any("{" in name for name in (*sources, *targets))
    assert sum("cross" in target for target in targets) == 5 * 3


def test_float16_is_refused_with_the_reason() -> None:
    config = {**PUBLISHED["t5-small"], **SMALL}
    with pytest.raises(UnsupportedRequestError, match="residual stream exceeds what float16 can hold") as caught:
        pluglm_build_model(config=config, parts=parts(config, "float16"))
    assert caught.value.reasons and 'dtype="bfloat16"' in caught.value.fix


def test_packed_texts_are_refused() -> None:
    import torch

    from pluglm.contracts import ForwardInput
    from pluglm.errors import InputError

    config = {**PUBLISHED["t5-small"], **SMALL, "d_model": 12, "d_ff": 20, "vocab_size": 40}
    module = pluglm_build_model(config=config, parts=parts(config))
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(InputError, match="neither segments nor prefix lengths"):
        module.forward(ForwardInput(ids, torch.arange(2)[None], None, segments=ids))
    with pytest.raises(InputError, match="nothing to attend to"):
        module.forward(ForwardInput(ids, torch.arange(2)[None], None))


ROWS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"model_type": "mt5"}, "model_type", ["'mt5'", "reads t5"]),
    ({"is_encoder_decoder": False}, "is_encoder_decoder", ["encoder and decoder"]),
    ({"is_decoder": True}, "is_decoder", ["encoder and decoder"]),
    ({"scale_embeddings": True}, "scale_embeddings", ["read by nobody"]),
    ({"d_kv": None}, "d_kv", ['lacks "d_kv"']),
    ({"num_heads": 0}, "num_heads", ["above zero"]),
    ({"num_decoder_layers": -1}, "num_decoder_layers", ["above zero"]),
    ({"layer_norm_epsilon": -1e-6}, "layer_norm_epsilon", ["not negative"]),
    ({"relative_attention_num_buckets": 30}, "relative_attention_num_buckets", ["multiple of 4"]),
    ({"relative_attention_max_distance": 16}, "relative_attention_max_distance", ["32 buckets for distances up to 16"]),
    ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj", ["'gated-tanh'", "quick_gelu"]),
    ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "dense_act_fn", ["gelu_new", "feed_forward_proj"]),
    ({"is_gated_act": True}, "is_gated_act", ["feed_forward_proj says so"]),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings", ["Expected bool"]),
    ({"tie_encoder_decoder": True}, "tie_encoder_decoder", ["no encoder to share"]),
]


@pytest.mark.parametrize(("changes", "key", "words"), ROWS, ids=[row[1] for row in ROWS])
def test_a_config_that_cannot_be_honoured_is_refused(changes: dict[str, Any], key: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        pluglm_describe_model(config={**PUBLISHED["t5-small"], **changes})
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)
