"""Every kind of rope against the numbers of transformers 5.23 (tests only), and against its own promises."""

import math

import pytest
import torch
from pluglm_blocks.rope import RotaryTable, refusals

from pluglm.contracts import Rope

SHORT, LONG = (1.0, 1.05, 1.3, 2.0), (1.2, 3.0, 7.0, 11.0)
CONTEXT = {"original_max_position_embeddings": 16}
CASES = [
    ("default", {}),
    ("linear", {"factor": 2.5}),
    ("dynamic", {"factor": 2.5}),
    ("yarn", {"factor": 4.0, **CONTEXT}),
    ("yarn", {"factor": 4.0, "beta_fast": 1.0, "beta_slow": 0.2, **CONTEXT}),
    ("yarn", {"factor": 4.0, "beta_fast": 1.0, "beta_slow": 0.2, "truncate": False, **CONTEXT}),
    ("yarn", {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.3, **CONTEXT}),
    ("yarn", {"factor": 4.0, "attention_factor": 1.25, **CONTEXT}),
    ("longrope", {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG, **CONTEXT}),
    ("longrope", {"attention_factor": 1.1, "factor": 4.0, "short_factor": SHORT, "long_factor": LONG, **CONTEXT}),
    ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **CONTEXT}),
    ("proportional", {"partial_rotary_factor": 0.5}),
    ("proportional", {"partial_rotary_factor": 0.75, "factor": 2.0}),
]


def make(kind, parameters, *, theta=100.0, dim=8, limit=64):
    return Rope(kind, theta, dim, parameters=tuple(sorted(parameters.items())), max_seq_len=limit)


@pytest.mark.parametrize(("kind", "parameters"), CASES)
@pytest.mark.parametrize("length", [9, 16, 17, 64, 65, 200])
@pytest.mark.parametrize("theta", [100.0, 500_000.0])
def test_angles_are_those_of_transformers(kind, parameters, length, theta):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}
    config = transformers.LlamaConfig(
        hidden_size=24, num_attention_heads=3, head_dim=8, max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **listed},
    )  # fmt: skip
    positions = torch.arange(length)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    found = RotaryTable(make(kind, parameters, theta=theta)).cos_sin(positions)
    torch.testing.assert_close(found[0], cos[..., :4], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], sin[..., :4], rtol=0, atol=1e-6)


def test_the_comparison_has_teeth():
    positions = torch.arange(65)[None]  # one past what `dynamic` leaves alone
    tables = [RotaryTable(make(*case)).cos_sin(positions)[0] for case in CASES]
    for i, one in enumerate(tables):
        assert all((one - other).abs().max() > 1e-3 for other in tables[:i]), CASES[i]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_row_decides_by_its_own_length(kind):
    parameters = dict(next(p for k, p in CASES if k == kind))
    table = RotaryTable(make(kind, parameters, limit=20))
    both = torch.stack((torch.arange(7), torch.arange(90, 97)))
    cos, sin = table.cos_sin(both)
    for row in (0, 1):
        alone = table.cos_sin(both[row : row + 1])
        assert torch.equal(cos[row], alone[0][0])
        assert torch.equal(sin[row], alone[1][0])
    assert not torch.equal(table.speeds(both)[0], table.speeds(both)[1])


def test_a_factor_that_is_left_out_follows_from_the_lengths():
    given = make("yarn", {"factor": 4.0, **CONTEXT})
    derived = make("yarn", CONTEXT, limit=64)
    positions = torch.arange(30)[None]
    assert torch.equal(RotaryTable(given).cos_sin(positions)[1], RotaryTable(derived).cos_sin(positions)[1])


def test_a_table_made_under_the_meta_device_holds_numbers():
    with torch.device("meta"):
        table = RotaryTable(make("longrope", _longrope()))
    cos, _ = table.cos_sin(torch.arange(3)[None])
    assert cos.device.type == "cpu"
    assert cos.dtype == torch.float32
    assert cos[0, 0, 0].item() == pytest.approx(math.sqrt(1 + math.log(4) / math.log(16)))


def _longrope(**changes):
    return {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG, **CONTEXT, **changes}


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        (
            make("rotten", {}),
            "rope kind 'rotten' is not one of default, linear, dynamic, yarn, longrope, llama3, proportional",
        ),
        (make("default", {}, dim=7), "rope dim 7 is not a positive even number"),
        (make("linear", {}), "rope 'linear' needs the parameters ['factor']"),
        (make("default", {"factor": 2.0}), "rope 'default' has no parameters ['factor']"),
        (make("dynamic", {"factor": 2.0}, limit=None), "rope 'dynamic' needs max_seq_len and a dim above 2"),
        (make("yarn", CONTEXT, limit=None), "rope 'yarn' needs a factor, or max_seq_len to derive it from"),
        (
            make("longrope", _longrope(long_factor=(1.0,))),
            "rope 'longrope' needs a tuple of 4 numbers as long_factor, one a pair",
        ),
    ],
)
def test_a_rope_that_no_table_can_be_made_of_is_refused(rope, reason):
    assert refusals(rope) == [reason]


@pytest.mark.parametrize(("kind", "parameters"), CASES)
def test_the_ropes_of_these_tests_are_not_refused(kind, parameters):
    assert refusals(make(kind, parameters)) == []
