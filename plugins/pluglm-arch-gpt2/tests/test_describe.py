"""Configs as they are published, in both spellings, become the program that their model type means."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_gpt2 import pluglm_describe_model as describe

from pluglm.contracts import Attention, DecoderProgram, FeedForward, KVSlot, Norm

#: The keys of published models, as Transformers 4 wrote them.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
#: What Transformers 5 leaves out when it writes a config, and what it adds.
NOT_IN_V5 = ("n_ctx", "max_batch_size", "max_sequence_length", "inference_runner", "pad_key_length", "torch_dtype",
             "pre_allocate_kv_cache", "validate_runner_input", "task_specific_params", "output_past")  # fmt: skip
ADDED_BY_V5 = {"tie_word_embeddings": True, "add_cross_attention": False, "pad_token_id": None, "dtype": "float32"}


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as Transformers 5 writes it."""
    config = {key: value for key, value in config.items() if key not in NOT_IN_V5}
    if config["model_type"] == "gpt_bigcode":
        config["num_key_value_heads"] = 1 if config["multi_query"] else config["n_head"]
    return {**config, **ADDED_BY_V5}


def program(name: str, **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def attentions(described: DecoderProgram) -> list[Attention]:
    return [op for op in described.ops() if isinstance(op, Attention)]


def feed_forward(described: DecoderProgram) -> FeedForward:
    return next(op for op in described.ops() if isinstance(op, FeedForward))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert described.model_type == config["model_type"]
    assert described.num_layers == config["n_layer"]
    assert described.hidden_size == config["n_embd"]
    assert described.vocab_size == config["vocab_size"]
    assert set(described.used) | set(described.ignored) >= set(config)
    assert described.program is not None
    assert DecoderProgram.from_json(json.loads(json.dumps(described.program.to_json()))) == described.program


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    assert describe(as_v5(PUBLISHED[name])).program == describe(PUBLISHED[name]).program


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_gpt2 import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_gpt2_has_a_layer_norm_before_each_part_and_biases_everywhere() -> None:
    described = program("gpt2")
    norm = Norm("layer", 768, 1e-5, bias=True)
    for layer in described.layers:
        assert [[(part.norm_in, part.norm_out) for part in branch.parts] for branch in layer.branches] == [
            [(norm, None)],
            [(norm, None)],
        ]
    assert described.final_norm == norm
    assert all(op.q_bias and op.k_bias and op.v_bias and op.o_bias for op in attentions(described))
    assert feed_forward(described) == FeedForward(768, 3072, "gelu_tanh", gated=False, bias=True)


def test_gpt2_has_no_rotation_and_as_many_key_value_heads_as_heads() -> None:
    (spec,) = program("gpt2-xl").attention_specs()
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (25, 25, 64)
    assert spec.scale == 64**-0.5
    assert all(op.rope is None for op in attentions(program("gpt2-xl")))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_text_is_at_most_as_long_as_the_table_of_positions(name: str) -> None:
    described = describe(PUBLISHED[name])
    assert described.program is not None
    assert described.max_seq_len == PUBLISHED[name]["n_positions"] == described.program.embedding.learned_positions


def test_scores_are_divided_by_the_layers_number_if_the_file_says_so() -> None:
    scales = [op.spec.scale for op in attentions(program("stanford-gpt2-small"))]
    assert scales == [64**-0.5 / n for n in range(1, 13)]


def test_scores_are_not_scaled_if_the_file_says_so() -> None:
    assert [s.scale for s in program("gpt2", scale_attn_weights=False).attention_specs()] == [1.0]
    assert [s.scale for s in program("santacoder", scale_attn_weights=False).attention_specs()] == [1.0]
    both = program("gpt2", scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True)
    assert [op.spec.scale for op in attentions(both)][:3] == [1.0, 1 / 2, 1 / 3]


def test_bigcode_shares_one_key_value_head_or_has_one_each() -> None:
    (shared,) = program("starcoder").attention_specs()
    (each,) = program("starcoder", multi_query=False).attention_specs()
    assert (shared.num_heads, shared.num_kv_heads, shared.head_dim) == (48, 1, 128)
    assert (each.num_heads, each.num_kv_heads, each.head_dim) == (48, 48, 128)
    slot = program("starcoder").slots[0]
    assert isinstance(slot, KVSlot)
    assert slot.num_kv_heads == 1
    silent = {key: value for key, value in PUBLISHED["starcoder"].items() if key != "multi_query"}
    assert describe(silent).attention == (shared,)  # the reference's default


def test_the_feed_forward_is_as_wide_as_the_file_says_or_four_times_the_model() -> None:
    assert feed_forward(program("gpt2-xl")).intermediate_size == 4 * 1600
    assert feed_forward(program("gpt2-xl", n_inner=1000)).intermediate_size == 1000


def test_the_head_is_tied_unless_the_file_says_otherwise() -> None:
    assert program("gpt2").head.tied
    assert not program("gpt2", tie_word_embeddings=False).head.tied
    head = describe(PUBLISHED["gpt2"]).weights.rules[-1]
    assert (head.sources, head.optional, head.tied_to) == (("lm_head.weight",), True, "embed.weight")


def test_ids_that_the_file_leaves_out_are_the_references_defaults() -> None:
    silent = {key: value for key, value in PUBLISHED["gpt2"].items() if not key.endswith("_token_id")}
    described = describe(silent)
    assert (described.bos_token_id, described.eos_token_ids, described.pad_token_id) == (50256, (50256,), None)
