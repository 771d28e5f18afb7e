"""Configs as they are published, in both spellings, become the program that they mean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_falcon import pluglm_describe_model as describe

from pluglm.contracts import Attention, AttentionSpec, DecoderProgram, FeedForward, KVSlot, Norm, Part, Rope

#: The keys of published models, as Transformers 4 wrote them.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as Transformers 5 writes it: with every default, and `rope_parameters` even beside biases."""
    config = {**config, "dtype": config["torch_dtype"], "pad_token_id": None}
    theta, scaling = config.pop("rope_theta", 10_000.0), config.pop("rope_scaling", None) or {}
    defaults = {
        "activation": "gelu", "ffn_hidden_size": 4 * config["hidden_size"], "max_position_embeddings": 2048,
        "num_kv_heads": config["num_attention_heads"], "num_ln_in_parallel_attn": None, "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default", **scaling},
    }  # fmt: skip
    return {**defaults, **config}


def program(name: str, **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def spec_of(described: DecoderProgram) -> AttentionSpec:
    (spec,) = described.attention_specs()
    return spec


def attention(described: DecoderProgram) -> Attention:
    return next(op for op in described.ops() if isinstance(op, Attention))


def feed_forward(described: DecoderProgram) -> FeedForward:
    return next(op for op in described.ops() if isinstance(op, FeedForward))


def branches(described: DecoderProgram) -> list[list[Part]]:
    assert len({str(layer).replace(f"slot={i}", "") for i, layer in enumerate(described.layers)}) == 1
    return [list(branch.parts) for branch in described.layers[0].branches]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert described.model_type == "falcon"
    assert described.num_layers == config["num_hidden_layers"]
    assert described.vocab_size == config["vocab_size"]
    assert set(described.used) | set(described.ignored) >= set(config)
    assert described.program is not None
    assert DecoderProgram.from_json(json.loads(json.dumps(described.program.to_json()))) == described.program


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    assert describe(as_v5(PUBLISHED[name])).program == describe(PUBLISHED[name]).program


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_falcon import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_falcon_7b_has_one_norm_for_both_parts_and_one_key_for_all_queries() -> None:
    described = program("falcon-7b")
    ((attn, mlp),) = branches(described)
    assert (attn.norm_in, attn.share_norm_in) == (Norm("layer", 4544, 1e-5, bias=True), False)
    assert (mlp.norm_in, mlp.share_norm_in) == (None, True)
    spec = spec_of(described)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.scale) == (71, 1, 64, 64**-0.5)
    assert described.slots[0] == KVSlot(1, 64, 64)
    assert attention(described).rope == Rope("default", 10_000.0, 64, max_seq_len=2048)
    assert feed_forward(described) == FeedForward(4544, 4 * 4544, "gelu", gated=False)


@pytest.mark.parametrize(("name", "num_heads", "head_dim"), [("falcon-40b", 128, 64), ("falcon-180b", 232, 64)])
def test_the_new_form_has_a_norm_for_each_part_and_queries_in_groups(name: str, num_heads: int, head_dim: int) -> None:
    described = program(name)
    ((attn, mlp),) = branches(described)
    assert attn.norm_in == mlp.norm_in == described.final_norm
    assert not mlp.share_norm_in
    spec = spec_of(described)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (num_heads, 8, head_dim)


def test_falcon_2_has_the_new_form_with_one_norm() -> None:
    described = program("falcon2-11b")
    ((attn, mlp),) = branches(described)
    assert (attn.norm_in, mlp.norm_in, mlp.share_norm_in) == (described.final_norm, None, True)
    assert spec_of(described).num_kv_heads == 8
    assert attention(described).rope == Rope("default", 500_042.0, 128, max_seq_len=8192)
    assert not described.head.tied


def test_the_new_form_without_a_number_of_keys_has_one_each() -> None:
    silent = {key: value for key, value in PUBLISHED["falcon-40b"].items() if key != "num_kv_heads"}
    assert describe(silent).attention[0].num_kv_heads == 128  # and not 1: multi_query is of the old form


def test_falcon_rw_has_one_part_after_the_other_and_biases_of_both_kinds() -> None:
    described = program("falcon-rw-1b")
    (attn,), (mlp,) = branches(described)
    assert attn.norm_in == mlp.norm_in == Norm("layer", 2048, 1e-5, bias=True)
    op = attention(described)
    assert op.q_bias and op.k_bias and op.v_bias and op.o_bias and op.rope is None
    assert feed_forward(described).bias
    spec = spec_of(described)
    assert (spec.num_heads, spec.num_kv_heads) == (32, 32)
    assert spec.alibi_slopes is not None
    assert spec.alibi_slopes[3::4] == tuple(2.0**-i / 8 for i in range(1, 9))  # of 8 heads, by sqrt(64)
    assert spec.alibi_slopes[0] == 0.83984375 / 8  # 2 ** -0.25 in bfloat16
    assert described.max_seq_len == 2048


def test_rotary_positions_may_be_stretched() -> None:
    described = program("falcon-7b", rope_scaling={"type": "linear", "factor": 4.0})
    assert described.max_seq_len == 8192
    rope = attention(described).rope
    assert rope is not None
    assert (rope.kind, rope.parameters) == ("linear", (("factor", 4.0),))


def test_what_rotation_is_described_beside_linear_biases_is_ignored() -> None:
    described = describe({**PUBLISHED["falcon-rw-1b"], "rope_theta": 500.0, "rope_scaling": {"type": "bent"}})
    assert described.program == program("falcon-rw-1b")
    assert set(described.ignored) >= {"rope_theta", "rope_scaling"}


def test_biases_of_projections_are_off_unless_the_file_says_so() -> None:
    op = attention(program("falcon-7b"))
    assert not (op.q_bias or op.k_bias or op.v_bias or op.o_bias or feed_forward(program("falcon-7b")).bias)
    assert feed_forward(program("falcon-7b", bias=True)).bias


def test_the_feed_forward_is_as_wide_as_the_file_says() -> None:
    assert feed_forward(program("falcon2-11b")).intermediate_size == 16384
    assert feed_forward(program("falcon-7b", ffn_hidden_size=1000)).intermediate_size == 1000


def test_the_head_is_tied_unless_the_file_says_otherwise() -> None:
    assert program("falcon-7b").head.tied
    assert not program("falcon-7b", tie_word_embeddings=False).head.tied


def test_ids_that_the_file_leaves_out_are_the_references_defaults() -> None:
    silent = {key: value for key, value in PUBLISHED["falcon-rw-1b"].items() if not key.endswith("_token_id")}
    described = describe(silent)
    assert (described.bos_token_id, described.eos_token_ids, described.pad_token_id) == (11, (11,), None)
