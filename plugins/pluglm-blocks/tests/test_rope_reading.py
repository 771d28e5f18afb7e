"""Rotary positions: each method's numbers, both spellings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pluglm_blocks.reading import read_rope, stretched

from pluglm.checkpoint import ConfigReader
from pluglm.contracts import Rope
from pluglm.errors import ConfigError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.5, 2], "long_factor": [2.0, 3.0, 4.0]}


def read(**config: Any) -> Rope:
    """Read a config with heads of 6 dimensions and 512 positions, and account for its keys."""
    reader = ConfigReader(config)
    rope = read_rope(reader, head_dim=6, max_positions=512)
    reader.finish()
    return rope


def test_without_a_key_the_rotation_is_plain_with_the_published_base() -> None:
    assert read() == Rope("default", 10_000.0, 6, max_seq_len=512)
    assert read(rope_theta=500_000) == Rope("default", 500_000.0, 6, max_seq_len=512)
    assert read(rope_scaling=None, rope_theta=7.5) == Rope("default", 7.5, 6, max_seq_len=512)


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("linear", {"factor": 2.0}),
        ("dynamic", {"factor": 3.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 0.5}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.2, "truncate": False}),
        ("llama3", LLAMA3),
        ("proportional", {"partial_rotary_factor": 0.5}),
    ],
)
@pytest.mark.parametrize("spelling", ["v4", "v4 with rope_type", "v5"])
def test_every_method_is_read_in_every_spelling(kind: str, numbers: dict[str, Any], spelling: str) -> None:
    if spelling == "v5":
        rope = read(rope_parameters={"rope_type": kind, "rope_theta": 99.0, **numbers})
    else:
        rope = read(rope_theta=99.0, rope_scaling={"type" if spelling == "v4" else "rope_type": kind, **numbers})
    assert rope == Rope(kind, 99.0, 6, parameters=tuple(sorted(numbers.items())), max_seq_len=512)


def test_longrope_has_a_factor_for_each_pair_and_derives_the_whole_from_the_lengths() -> None:
    rope = read(rope_scaling={"type": "longrope", **FACTORS}, original_max_position_embeddings=128)
    assert dict(rope.parameters) == {
        "factor": 4.0, "original_max_position_embeddings": 128,
        "short_factor": (1.0, 1.5, 2.0), "long_factor": (2.0, 3.0, 4.0),
    }  # fmt: skip


def test_numbers_that_a_file_leaves_out_come_from_the_lengths() -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    assert dict(read(rope_scaling={"type": "llama3", **scaling}).parameters)["original_max_position_embeddings"] == 512
    yarn = read(rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 64})
    assert dict(yarn.parameters) == {"factor": 8.0, "original_max_position_embeddings": 64}


def test_a_length_that_the_method_does_not_read_is_no_obstacle() -> None:
    assert read(rope_scaling={"type": "linear", "factor": 2.0}, original_max_position_embeddings=64).kind == "linear"


def test_two_equal_spellings_are_one() -> None:
    both = read(
        rope_theta=5.0,
        rope_scaling={"type": "linear", "factor": 2},
        rope_parameters={"rope_type": "linear", "factor": 2.0},
    )
    assert both == read(rope_theta=5.0, rope_scaling={"type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 512),
        ({"type": "linear", "factor": 2.0}, 1024),
        ({"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128}, 2048),
        ({"type": "llama3", **LLAMA3}, 512),
        ({"type": "linear", "factor": 0.5}, 512),
    ],
)
def test_a_stretched_model_is_made_for_the_stretched_length(scaling: dict[str, Any] | None, length: int) -> None:
    assert stretched(read(rope_scaling=scaling)) == length


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, ["rope_scaling.type = 'su'", "'longrope'", "'yarn'"]),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, ["'mrope'"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, ["'yarn'", "'linear'", "one thing"]),
        ({"rope_scaling": {"type": "linear"}}, ['"rope_scaling.factor"', "no such key"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["rope_scaling.factor", "float", "'2'"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor of 0", "above zero"]),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
            ["rope_scaling.beta_fast", "read by nobody"],
        ),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling.factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters.full_attention"]),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1]}}, ["rope_parameters.mrope_section"]),
        ({"rope_parameters": {"rope_theta": 2.0}, "rope_theta": 3.0}, ["rope_parameters.rope_theta = 2.0", "3.0"]),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            ["they differ"],
        ),
        ({"rope_theta": -1.0}, ["rope_theta of -1.0"]),
        ({"partial_rotary_factor": 0.5}, ["0.5 of each head", "whole heads"]),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "partial_rotary_factor": 0.25}},
            ["0.25 of each head"],
        ),
        (
            {"rope_scaling": {"type": "longrope", **FACTORS, "short_factor": [1.0]}},
            ["short_factor", "1 entries", "3 numbers"],
        ),
        (
            {"rope_scaling": {"type": "longrope", **FACTORS, "long_factor": [1.0, 2.0, True]}},
            ["long_factor", "3 numbers"],
        ),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            ["high_freq_factor", "low_freq_factor"],
        ),
        (
            {"rope_scaling": {"type": "llama3", **LLAMA3}, "original_max_position_embeddings": 99},
            ["original_max_position_embeddings", "64", "99"],
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}}, ["stretching is 0"]),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_the_files_own_words(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**config)
    for word in words:
        assert word in str(caught.value)
