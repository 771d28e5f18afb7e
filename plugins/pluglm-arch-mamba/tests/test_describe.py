"""Configs with the keys and sizes of published models become the program that Mamba 2 means."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_mamba import pluglm_describe_model as describe

from pluglm.contracts import DecoderProgram, Norm, StateSlot, StateSpace

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
INFINITY = {"__float__": "Infinity"}


def program(name: str, **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def mixer(described: DecoderProgram, layer: int = 0) -> StateSpace:
    op = described.layers[layer].branches[0].parts[0].op
    assert isinstance(op, StateSpace)
    return op


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert (described.model_type, described.vocab_size) == ("mamba2", config["vocab_size"])
    assert described.num_layers == config["num_hidden_layers"] == len(described.slots)
    assert {key.partition(".")[0] for key in described.used} | set(described.ignored) >= set(config)
    assert described.program is not None
    text = json.dumps(described.program.to_json(), allow_nan=False)
    assert DecoderProgram.from_json(json.loads(text)) == described.program


@pytest.mark.parametrize("name", PUBLISHED)
def test_there_is_no_attention_and_no_limit_on_positions(name: str) -> None:
    described = describe(PUBLISHED[name])
    assert described.attention == ()
    assert described.max_seq_len is None
    assert {slot.kind for slot in described.slots} == {"state"}


def test_each_layer_is_one_mixer_behind_a_norm_in_a_slot_of_its_own() -> None:
    described = program("codestral-mamba")
    assert [mixer(described, i).slot for i in range(64)] == list(range(64))
    (branch,) = described.layers[5].branches
    (part,) = branch.parts
    assert (part.name, part.norm_in, part.norm_out) == ("ssm", Norm("rms", 4096, 1e-5), None)
    assert described.final_norm == part.norm_in


def test_the_mixers_sizes_are_the_files() -> None:
    op = mixer(program("codestral-mamba"))
    assert (op.inner_size, op.num_heads, op.head_dim, op.num_groups, op.state_size) == (8192, 128, 64, 8, 128)
    assert (op.conv_kernel, op.chunk_size, op.conv_size) == (4, 256, 8192 + 2 * 8 * 128)
    assert (op.norm_groups, op.norm_before_gate) == (8, False)
    assert op.norm == Norm("rms", 8192, 1e-5, cast_late=True)
    assert op.state_slot == StateSlot((("conv", (10240, 3), None), ("ssm", (128, 64, 128), "float32")))


def test_biases_follow_their_two_switches() -> None:
    op = mixer(program("mamba2-130m", use_bias=True, use_conv_bias=False))
    assert (op.in_bias, op.out_bias, op.conv_bias) == (True, True, False)
    op = mixer(program("mamba2-130m"))
    assert (op.in_bias, op.out_bias, op.conv_bias) == (False, False, True)


@pytest.mark.parametrize(
    ("written", "limits"),
    [
        ([0.0, INFINITY], (0.0, None)),
        ([0.0, float("inf")], (0.0, None)),
        ([0.001, INFINITY], (0.001, None)),
        ([0.001, 0.1], (0.001, 0.1)),
        ([0, 1], (0.0, 1.0)),
        (None, (0.0, None)),
    ],
)
def test_the_limit_of_the_time_step_may_be_infinite(written: Any, limits: tuple[float, float | None]) -> None:
    op = mixer(program("mamba2-130m", time_step_limit=written))
    assert (op.dt_min, op.dt_max) == limits


def test_the_residual_stream_is_in_float32_unless_the_file_says_otherwise() -> None:
    silent = {key: value for key, value in PUBLISHED["mamba2-130m"].items() if key != "residual_in_fp32"}
    assert describe(silent).program.float32_residual  # type: ignore[union-attr]
    assert not program("mamba2-130m", residual_in_fp32=False).float32_residual


def test_norm_before_gate_is_set_aside_as_the_reference_does() -> None:
    assert program("codestral-mamba", norm_before_gate=False) == program("codestral-mamba", norm_before_gate=True)
    assert "gates first" in describe(PUBLISHED["codestral-mamba"]).ignored["norm_before_gate"]


def test_what_a_file_leaves_out_is_the_references_default() -> None:
    sizes = ("model_type", "hidden_size", "num_heads", "head_dim", "state_size", "num_hidden_layers", "vocab_size")
    described = describe({key: PUBLISHED["codestral-mamba"][key] for key in sizes})
    assert described.program == program("codestral-mamba")
    assert (described.bos_token_id, described.eos_token_ids, described.pad_token_id) == (0, (2,), 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_target_of_the_weight_map_is_named_once_and_reads_back(name: str) -> None:
    weights = describe({**PUBLISHED[name], "use_bias": True}).weights
    targets = [target for rule in weights.rules for target in rule.targets]
    sources = [source for rule in weights.rules for source in rule.sources]
    assert len(set(targets)) == len(targets) == len(set(sources)) == len(sources)
    assert all(rule.transform is None for rule in weights.rules)


def test_a_tied_head_may_be_repeated_in_the_file_but_must_equal_the_embedding() -> None:
    head = describe(PUBLISHED["mamba2-130m"]).weights.rules[-1]
    assert (head.sources, head.optional, head.tied_to) == (("lm_head.weight",), True, "embed.weight")
    assert not describe(PUBLISHED["codestral-mamba"]).weights.rules[-1].optional


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_mamba import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
