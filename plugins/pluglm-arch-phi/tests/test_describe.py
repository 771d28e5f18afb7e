"""Configs as they are published, in both spellings, become the program that their model type means.

The factors of longrope in `published.json` are stand-ins of the right number; everything else is as published.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_phi import pluglm_describe_model as describe

from pluglm.contracts import Attention, DecoderProgram, FeedForward, Norm, Part, Rope

#: The keys of published models, as Transformers 4 wrote them: `rope_theta` beside `rope_scaling`.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as Transformers 5 writes it."""
    config = dict(config)
    scaling = config.pop("rope_scaling", None) or {}
    numbers = {key: value for key, value in scaling.items() if key != "type"}
    if numbers:
        numbers["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    part = config.pop("partial_rotary_factor", 1.0)
    inner = {"rope_theta": config.pop("rope_theta"), "rope_type": scaling.get("type", "default"), **numbers}
    return {**config, "rope_parameters": {**inner, "partial_rotary_factor": part}}


def program(name: str, **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def without(name: str, key: str) -> dict[str, Any]:
    return {k: value for k, value in PUBLISHED[name].items() if k != key}


def attention(described: DecoderProgram, layer: int = 0) -> tuple[Part, Attention]:
    part = described.layers[layer].branches[0].parts[0]
    assert isinstance(part.op, Attention)
    return part, part.op


def rope(described: DecoderProgram) -> Rope:
    (found,) = {op.rope for op in described.ops() if isinstance(op, Attention)}
    assert found is not None
    return found


def windows(described: DecoderProgram) -> set[int | None]:
    found = [op.spec.mask.window for op in described.ops() if isinstance(op, Attention)]
    assert found == [slot.window for slot in described.slots]  # type: ignore[union-attr]
    return set(found)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert described.model_type == config["model_type"]
    assert (described.num_layers, described.vocab_size) == (config["num_hidden_layers"], config["vocab_size"])
    assert {key.partition(".")[0] for key in described.used} | set(described.ignored) >= set(config)
    assert described.program is not None
    assert DecoderProgram.from_json(json.loads(json.dumps(described.program.to_json()))) == described.program


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    assert describe(as_v5(PUBLISHED[name])).program == describe(PUBLISHED[name]).program


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_phi import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_phi_adds_both_parts_at_once_behind_one_norm() -> None:
    described = program("phi-2")
    (branch,) = described.layers[7].branches
    attn, mlp = branch.parts
    assert attn.norm_in == described.final_norm == Norm("layer", 2560, 1e-5, bias=True)
    assert (mlp.norm_in, mlp.share_norm_in, attn.share_norm_in) == (None, True, False)
    assert mlp.op == FeedForward(2560, 10240, "gelu_tanh", gated=False, bias=True)


def test_phi_has_a_bias_on_every_projection_and_on_the_head() -> None:
    described = program("phi-1.5")
    op = attention(described)[1]
    assert op.q_bias and op.k_bias and op.v_bias and op.o_bias and described.head.bias
    assert (op.spec.num_heads, op.spec.num_kv_heads, op.spec.head_dim, op.spec.scale) == (32, 32, 64, 1 / 8)


def test_phi_turns_the_part_of_each_head_that_the_file_names_or_else_half() -> None:
    assert rope(program("phi-2")) == Rope("default", 1e4, 32, max_seq_len=2048)  # 0.4 × 80
    assert rope(program("phi-1.5")).dim == 32  # 0.5 × 64
    assert describe(without("phi-1.5", "partial_rotary_factor")).program == program("phi-1.5")


def test_phi_normalises_heads_of_q_and_k_if_asked() -> None:
    assert attention(program("phi-2"))[1].qk_norm is None
    op = attention(program("phi-2", qk_layernorm=True))[1]
    assert (op.qk_norm, op.qk_norm_over) == (Norm("layer", 80, 1e-5, bias=True), "head")


def test_phi3_is_a_layer_of_two_branches_without_biases() -> None:
    described = program("phi-3-mini-4k")
    part, op = attention(described)
    assert part.norm_in == described.final_norm == Norm("rms", 3072, 1e-5)
    assert not (op.q_bias or op.k_bias or op.v_bias or op.o_bias or described.head.bias)
    mlp = described.layers[0].branches[1].parts[0]
    assert (mlp.norm_in, mlp.op) == (part.norm_in, FeedForward(3072, 8192, "silu"))


def test_phi3_has_one_window_for_all_layers_or_none() -> None:
    assert windows(program("phi-3-mini-4k")) == {2047}
    assert windows(program("phi-4")) == {None}
    assert windows(describe(without("phi-3-mini-4k", "sliding_window")).program) == {None}  # type: ignore[arg-type]


def test_longrope_reads_its_lengths_from_beside_the_factors() -> None:
    described = program("phi-3-mini-128k")
    numbers = dict(rope(described).parameters)
    assert (numbers["factor"], numbers["original_max_position_embeddings"]) == (32.0, 4096)
    assert rope(described).dim == 96
    assert numbers["short_factor"] == tuple(PUBLISHED["phi-3-mini-128k"]["rope_scaling"]["short_factor"])
    assert described.max_seq_len == 131072


def test_longrope_without_a_length_has_the_references() -> None:
    silent = without("phi-3-mini-128k", "original_max_position_embeddings")
    assert describe(silent).program == program("phi-3-mini-128k")


def test_the_first_files_call_longrope_su() -> None:
    scaling = {**PUBLISHED["phi-3-mini-128k"]["rope_scaling"], "type": "su"}
    assert program("phi-3-mini-128k", rope_scaling=scaling) == program("phi-3-mini-128k")
    both = {**scaling, "rope_type": "longrope"}
    assert program("phi-3-mini-128k", rope_scaling=both) == program("phi-3-mini-128k")


def test_phi_4_mini_turns_three_quarters_of_each_head() -> None:
    described = program("phi-4-mini")
    assert attention(described)[1].spec.head_dim == 128
    assert rope(described).dim == 96
    assert len(dict(rope(described).parameters)["long_factor"]) == 48  # type: ignore[arg-type]
    assert described.head.tied


def test_a_length_that_nothing_reads_changes_nothing() -> None:
    assert rope(program("phi-4")) == Rope("default", 250_000.0, 128, max_seq_len=16384)


def test_ids_that_the_file_leaves_out_are_the_references_defaults() -> None:
    for name, expected in (("phi-4", (1, (32000,), 32000)), ("phi-1.5", (1, (2,), None))):
        silent = {key: value for key, value in PUBLISHED[name].items() if not key.endswith("_token_id")}
        described = describe(silent)
        assert (described.bos_token_id, described.eos_token_ids, described.pad_token_id) == expected
