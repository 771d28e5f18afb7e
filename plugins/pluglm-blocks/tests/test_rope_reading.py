"""Rotary positions: each method's numbers, both spellings, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pluglm_blocks.reading import read_rope, read_ropes, stretched

from pluglm.checkpoint import ConfigReader
from pluglm.contracts import Rope
from pluglm.errors import ConfigError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.5, 2], "long_factor": [2.0, 3.0, 4.0]}


#: Names of methods as Phi-3's files have them.
SU = {"default": "default", "longrope": "longrope", "su": "longrope"}
FULL, SLIDING = "full_attention", "sliding_attention"


def read(family: dict[str, Any] | None = None, /, **config: Any) -> Rope:
    """Read a config with heads of 6 dimensions and 512 positions, and account for its keys."""
    reader = ConfigReader(config)
    rope = read_rope(reader, **{"head_dim": 6, "max_positions": 512, **(family or {})})
    reader.finish()
    return rope


def read_both(**config: Any) -> tuple[Rope, Rope]:
    """The rotations of full and of sliding layers, from a config like Gemma 3's."""
    reader = ConfigReader(config)
    ropes = read_ropes(
        reader, head_dim=6, max_positions=512, scaled=FULL,
        bases={FULL: ("rope_theta", 900.0), SLIDING: ("rope_local_base_freq", 30.0)},
    )  # fmt: skip
    reader.finish()
    assert list(ropes) == [FULL, SLIDING]
    return ropes[FULL], ropes[SLIDING]


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


def test_longrope_lengths_may_stand_among_its_numbers_or_beside_them() -> None:
    inside = read(rope_scaling={"type": "longrope", **FACTORS, "original_max_position_embeddings": 64})
    beside = read(rope_scaling={"type": "longrope", **FACTORS}, original_max_position_embeddings=64)
    assert inside == beside
    assert dict(inside.parameters)["factor"] == 8.0
    said = read(rope_scaling={"type": "longrope", **FACTORS, "factor": 3.0}, original_max_position_embeddings=64)
    assert dict(said.parameters)["factor"] == 3.0


def test_a_length_that_the_file_leaves_out_is_the_familys_or_else_the_whole() -> None:
    scaling = {"type": "longrope", **FACTORS}
    assert dict(read(rope_scaling=scaling).parameters)["original_max_position_embeddings"] == 512
    numbers = dict(read({"length": 128}, rope_scaling=scaling).parameters)
    assert (numbers["original_max_position_embeddings"], numbers["factor"]) == (128, 4.0)
    assert read({"length": 128}).parameters == ()  # the plain rotation reads none


def test_a_family_may_have_names_of_its_own_for_methods() -> None:
    family, length = {"methods": SU}, {"original_max_position_embeddings": 64}
    named = read(family, rope_scaling={"type": "longrope", **FACTORS}, **length)
    assert named.kind == "longrope"
    assert read(family, rope_scaling={"type": "su", **FACTORS}, **length) == named
    assert read(family, rope_parameters={"rope_type": "su", **FACTORS, "rope_theta": 1e4}, **length) == named
    assert read(family, rope_scaling={"type": "su", "rope_type": "longrope", **FACTORS}, **length) == named


@pytest.mark.parametrize(
    "config",
    [
        {"partial_rotary_factor": 0.4},
        {"rope_parameters": {"partial_rotary_factor": 0.4}},
        {"rope_parameters": {"partial_rotary_factor": 0.4}, "partial_rotary_factor": 0.4},
        {"rope_scaling": {"type": "default"}, "partial_rotary_factor": 0.4},
    ],
)
def test_a_family_may_turn_a_part_of_each_head(config: dict[str, Any]) -> None:
    assert read({"head_dim": 10, "partial": 1.0}, **config) == Rope("default", 10_000.0, 4, max_seq_len=512)


def test_a_part_that_the_file_leaves_out_is_the_familys() -> None:
    assert read({"head_dim": 8, "partial": 0.25}).dim == 2
    assert read({"head_dim": 8, "partial": 0.25}, rope_scaling={"type": "linear", "factor": 2.0}).dim == 2
    assert read({"head_dim": 8, "partial": 0.25}, partial_rotary_factor=1.0).dim == 8


def test_a_part_is_rounded_down_as_in_the_reference() -> None:
    assert read({"head_dim": 80, "partial": 0.5}, partial_rotary_factor=0.4).dim == 32
    assert read({"head_dim": 10, "partial": 0.5}, partial_rotary_factor=0.45).dim == 4


def test_longrope_has_a_factor_for_each_pair_of_the_part_that_turns() -> None:
    rope = read(
        {"head_dim": 8, "partial": 1.0}, rope_scaling={"type": "longrope", **FACTORS}, partial_rotary_factor=0.75
    )
    assert (rope.dim, dict(rope.parameters)["short_factor"]) == (6, (1.0, 1.5, 2.0))


def test_proportional_turns_slow_pairs_not_at_all_and_counts_the_whole_head() -> None:
    rope = read({"head_dim": 8, "partial": 0.5}, rope_scaling={"type": "proportional"}, partial_rotary_factor=0.75)
    assert rope == Rope("proportional", 10_000.0, 8, parameters=(("partial_rotary_factor", 0.75),), max_seq_len=512)


PLAIN = Rope("default", 30.0, 6, max_seq_len=512)
SCALED = Rope("linear", 700.0, 6, parameters=(("factor", 8.0),), max_seq_len=512)
OLDER = {"rope_theta": 700, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
BY_TYPE = {FULL: {"rope_type": "linear", "rope_theta": 700.0, "factor": 8.0}, SLIDING: {"rope_type": "default"}}


@pytest.mark.parametrize(
    "config",
    [
        OLDER,
        {**OLDER, "rope_local_base_freq": 30.0},
        {"rope_parameters": BY_TYPE},
        {"rope_parameters": {FULL: BY_TYPE[FULL], SLIDING: {"rope_theta": 30}}},
        {"rope_parameters": {FULL: BY_TYPE[FULL], SLIDING: None}},
        {"rope_parameters": {FULL: {"type": "linear", "factor": 8}}, "rope_theta": 700.0},
        {**OLDER, "rope_parameters": BY_TYPE, "rope_local_base_freq": 30.0},
    ],
)
def test_two_rotations_are_read_in_both_spellings(config: dict[str, Any]) -> None:
    assert read_both(**config) == (SCALED, PLAIN)


def test_rotations_by_layer_type_have_the_familys_bases_and_any_method() -> None:
    assert read_both() == (Rope("default", 900.0, 6, max_seq_len=512), PLAIN)
    full, sliding = read_both(rope_parameters={SLIDING: {"rope_type": "longrope", "rope_theta": 5.0, **FACTORS}})
    assert (full.kind, sliding.kind, sliding.theta) == ("default", "longrope", 5.0)
    assert dict(sliding.parameters)["original_max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta", ["read by nobody"]),
        ({"rope_parameters": {"chunked": {}}}, "rope_parameters.chunked", ["read by nobody"]),
        ({"rope_parameters": {FULL: 5.0}}, f"rope_parameters.{FULL}", ["Expected dict"]),
        (
            {"rope_parameters": {SLIDING: {"rope_type": "linear"}}},
            f"rope_parameters.{SLIDING}.factor",
            ["no such key"],
        ),
        (
            {"rope_parameters": {SLIDING: {"rope_theta": 5.0}}, "rope_local_base_freq": 6.0},
            f"rope_parameters.{SLIDING}.rope_theta",
            ["5.0", "rope_local_base_freq = 6.0"],
        ),
        (
            {**OLDER, "rope_parameters": {FULL: {"rope_theta": 700.0}}},
            "rope_scaling",
            [f"rope_parameters.{FULL} and rope_scaling", "they differ"],
        ),
        ({"rope_local_base_freq": 0}, "rope_local_base_freq", ["rope_local_base_freq of 0", "above zero"]),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", ["read by nobody"]),
        (
            {"rope_parameters": {FULL: {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor",
            ["0.5 of each head", "whole heads"],
        ),
    ],
)
def test_two_rotations_that_cannot_be_honoured_are_refused(config: dict[str, Any], key: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_both(**config)
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ({"partial": 0.5}, {}, ["0.5 of each head", "3 of 6"]),
        ({"partial": 1.0}, {"partial_rotary_factor": 0}, ["0.0 of each head", "0 of 6"]),
        ({"partial": 1.0}, {"partial_rotary_factor": 2.0}, ["2.0 of each head", "12 of 6"]),
        ({"partial": 1.0}, {"partial_rotary_factor": "half"}, ["Expected float, found 'half'"]),
        (
            {"partial": 1.0},
            {"rope_parameters": {"partial_rotary_factor": 0.4}, "partial_rotary_factor": 0.8},
            ["rope_parameters.partial_rotary_factor = 0.4", "0.8", "one thing"],
        ),
        (
            {"partial": 1.0, "head_dim": 8},
            {"rope_scaling": {"type": "longrope", **FACTORS}},
            ["short_factor", "3 entries", "4 numbers"],
        ),
        ({"methods": SU}, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, ["'yarn'", "'longrope', 'su'"]),
        (
            {"methods": SU, "length": 128},
            {"rope_scaling": {"type": "su", **FACTORS, "original_max_position_embeddings": 64}},
            ["64", "128", "one thing"],
        ),
    ],
)
def test_what_a_family_cannot_honour_is_refused(
    family: dict[str, Any], config: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(family, **config)
    for word in words:
        assert word in str(caught.value)


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
