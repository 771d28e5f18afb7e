"""Configs as they are published, in every spelling, become the program that their model type means."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_bloom import pluglm_describe_model as describe
from pluglm_blocks.reading import alibi_slopes

from pluglm.contracts import Attention, AttentionSpec, DecoderProgram, FeedForward, Norm

#: The keys of published models, as Transformers 4 or the models' own code wrote them.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
MPT = ("mpt-7b", "mpt-7b-storywriter", "mpt-30b")
#: What Transformers 5 adds to the object within MPT's config.
INNER = {
    "_name_or_path": "", "architectures": None, "chunk_size_feed_forward": 0, "dtype": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "model_type": "", "output_attentions": False,
    "output_hidden_states": False, "problem_type": None, "return_dict": True,
}  # fmt: skip


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as Transformers 5 writes it."""
    config = {**config, "tie_word_embeddings": True, "dtype": config.get("torch_dtype")}
    for key, older in (("hidden_size", "n_embed"), ("n_head", "num_attention_heads")):
        if older in config:
            config[key] = config.pop(older)
    if config["model_type"] == "mpt":
        config |= {"attn_config": {**config["attn_config"], **INNER}, "layer_norm_epsilon": 1e-5}
    return config


def program(name: str, **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def mpt_with(**changes: Any) -> DecoderProgram:
    return program("mpt-7b", attn_config={**PUBLISHED["mpt-7b"]["attn_config"], **changes})


def spec_of(described: DecoderProgram) -> AttentionSpec:
    (spec,) = described.attention_specs()
    return spec


def attention(described: DecoderProgram) -> Attention:
    return next(op for op in described.ops() if isinstance(op, Attention))


def feed_forward(described: DecoderProgram) -> FeedForward:
    return next(op for op in described.ops() if isinstance(op, FeedForward))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert described.model_type == config["model_type"]
    assert described.num_layers == config.get("n_layer", config.get("n_layers"))
    assert described.vocab_size == config["vocab_size"]
    assert set(described.used) | set(described.ignored) >= set(config)
    inner = {f"attn_config.{key}" for key in config.get("attn_config", {})}
    assert set(described.used) | set(described.ignored) >= inner
    assert described.program is not None
    assert DecoderProgram.from_json(json.loads(json.dumps(described.program.to_json()))) == described.program


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    assert describe(as_v5(PUBLISHED[name])).program == describe(PUBLISHED[name]).program


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_bloom import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_bloom_has_linear_biases_and_a_norm_on_its_embeddings() -> None:
    described = program("bloom")
    norm = Norm("layer", 14336, 1e-5, bias=True)
    assert described.embedding.norm == described.final_norm == norm
    assert [[part.norm_in for part in branch.parts] for branch in described.layers[7].branches] == [[norm], [norm]]
    spec = spec_of(described)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.scale) == (112, 112, 128, 128**-0.5)
    assert spec.alibi_slopes == alibi_slopes(112)
    op = attention(described)
    assert op.q_bias and op.k_bias and op.v_bias and op.o_bias and op.rope is None and op.qkv_clip is None
    assert feed_forward(described) == FeedForward(14336, 57344, "gelu_tanh", gated=False, bias=True)


@pytest.mark.parametrize(
    ("key", "other"), [("hidden_size", "n_embed"), ("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers")]
)
def test_bloom_spells_its_sizes_in_two_ways(key: str, other: str) -> None:
    config = dict(PUBLISHED["bloom"])
    both = describe({**config, other: config[key]})
    config[other] = config.pop(key)
    assert describe(config).program == both.program == program("bloom")


def test_bloom_is_as_long_as_its_file_says_or_without_a_limit() -> None:
    assert program("bloom").max_seq_len == 2048
    assert program("bloom-560m").max_seq_len is None


def test_mpt_has_neither_biases_nor_shifts() -> None:
    described = program("mpt-30b")
    norm = Norm("layer", 7168, 1e-5)
    assert described.embedding.norm is None
    assert described.final_norm == norm
    op = attention(described)
    assert not (op.q_bias or op.k_bias or op.v_bias or op.o_bias)
    assert feed_forward(described) == FeedForward(7168, 28672, "gelu", gated=False)
    assert spec_of(described).alibi_slopes == alibi_slopes(64)
    assert described.max_seq_len == 8192


def test_mpt_clips_what_its_file_says() -> None:
    assert attention(program("mpt-7b-storywriter")).qkv_clip == 6.0
    assert attention(program("mpt-7b")).qkv_clip is None
    assert attention(mpt_with(clip_qkv=0)).qkv_clip is None  # as the reference takes it


def test_mpt_s_steepest_and_flattest_slopes_follow_the_file() -> None:
    """StoryWriter's biases fall to 2 ** -16; Transformers takes 2 ** -8 for it."""
    slopes = spec_of(program("mpt-7b-storywriter")).alibi_slopes
    assert slopes is not None
    assert slopes == alibi_slopes(32, max_exponent=16)
    assert (slopes[0], slopes[-1]) == (2**-0.5, 2**-16)


def test_mpt_scales_scores_as_the_file_says() -> None:
    assert spec_of(program("mpt-7b")).scale == 128**-0.5
    assert spec_of(mpt_with(softmax_scale=0.25)).scale == 0.25


def test_mpt_without_an_attention_config_has_the_references_defaults() -> None:
    silent = {key: value for key, value in PUBLISHED["mpt-7b"].items() if key != "attn_config"}
    assert describe(silent).program == program("mpt-7b")
    assert describe({**silent, "attn_config": {}}).program == program("mpt-7b")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_head_is_tied_unless_the_file_says_otherwise(name: str) -> None:
    assert program(name).head.tied
    assert not program(name, tie_word_embeddings=False).head.tied


def test_ids_that_the_file_leaves_out_are_the_references_defaults() -> None:
    silent = {key: value for key, value in PUBLISHED["bloom"].items() if not key.endswith("_token_id")}
    described = describe(silent)
    assert (described.bos_token_id, described.eos_token_ids, described.pad_token_id) == (1, (2,), None)
    assert describe(PUBLISHED["mpt-7b"]).eos_token_ids == ()
