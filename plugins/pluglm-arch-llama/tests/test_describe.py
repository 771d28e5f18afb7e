"""Configs as they are published, in both spellings, become the program that their model type means."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_llama import pluglm_describe_model as describe

from pluglm.contracts import Attention, DecoderProgram, FeedForward, Layer, Norm, Part

#: The keys of published models, as Transformers 4 wrote them: `rope_theta` beside `rope_scaling`.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as Transformers 5 writes it."""
    config = dict(config)
    scaling = config.pop("rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    numbers = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
    theta = config.pop("rope_theta", 10_000.0)
    return {**config, "rope_parameters": {"rope_theta": theta, "rope_type": kind, **numbers}}


def program(name: str, **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def attention(layer: Layer) -> tuple[Part, Attention]:
    part = layer.branches[0].parts[0]
    assert isinstance(part.op, Attention)
    return part, part.op


def feed_forward(layer: Layer) -> tuple[Part, FeedForward]:
    part = layer.branches[1].parts[0]
    assert isinstance(part.op, FeedForward)
    return part, part.op


def windows(described: DecoderProgram) -> list[int | None]:
    found = [attention(layer)[1].spec.mask.window for layer in described.layers]
    assert found == [slot.window for slot in described.slots]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert described.model_type == config["model_type"]
    assert described.num_layers == config["num_hidden_layers"]
    assert described.vocab_size == config["vocab_size"]
    assert {key.partition(".")[0] for key in described.used} | set(described.ignored) >= set(config)
    assert described.program is not None
    assert DecoderProgram.from_json(json.loads(json.dumps(described.program.to_json()))) == described.program


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    assert describe(as_v5(PUBLISHED[name])).program == describe(PUBLISHED[name]).program


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_target_of_the_weight_map_is_named_once_and_reads_back(name: str) -> None:
    weights = describe(PUBLISHED[name]).weights
    targets = [target for rule in weights.rules for target in rule.targets]
    sources = [source for rule in weights.rules for source in rule.sources]
    assert len(set(targets)) == len(targets) == len(set(sources)) == len(sources)
    assert all(rule.transform is None for rule in weights.rules)


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_llama import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_llama_has_plain_attention_and_no_biases() -> None:
    part, op = attention(program("llama-3.2").layers[3])
    assert part.norm_in == Norm("rms", 2048, 1e-5)
    assert part.norm_out is None
    assert (op.spec.num_heads, op.spec.num_kv_heads, op.spec.head_dim) == (32, 8, 64)
    assert op.spec.scale == 64**-0.5
    assert op.slot == 3
    assert not (op.q_bias or op.k_bias or op.v_bias or op.o_bias or op.qk_norm)


def test_llama_biases_follow_their_two_switches() -> None:
    biased = program("llama-3.2", attention_bias=True, mlp_bias=True)
    op = attention(biased.layers[0])[1]
    assert op.q_bias and op.k_bias and op.v_bias and op.o_bias
    assert feed_forward(biased.layers[0])[1].bias


def test_llama_1_has_as_many_key_value_heads_as_heads_and_no_padding_token() -> None:
    described = describe(PUBLISHED["llama-1"])
    assert described.attention[0].num_kv_heads == 32
    assert described.pad_token_id is None  # -1 names no token
    assert described.eos_token_ids == (1,)
    assert not described.program.head.tied  # type: ignore[union-attr]


def test_the_head_dim_of_the_file_goes_before_the_quotient() -> None:
    op = attention(program("qwen3").layers[0])[1]
    assert (op.spec.num_heads, op.spec.head_dim) == (16, 128)  # 1024 / 16 is 64
    without = {key: value for key, value in PUBLISHED["qwen3"].items() if key != "head_dim"}
    assert describe(without).attention[0].head_dim == 128  # Qwen 3's own default


def test_mistral_has_one_window_for_all_layers_and_null_means_none() -> None:
    assert windows(program("mistral")) == [4096] * 32
    assert windows(program("mistral", sliding_window=None)) == [None] * 32
    silent = {key: value for key, value in PUBLISHED["mistral"].items() if key != "sliding_window"}
    assert describe(silent).attention[0].mask.window == 4096  # the reference's default


def test_qwen2_has_biases_on_q_k_v_only_and_a_window_only_if_switched_on() -> None:
    op = attention(program("qwen2.5").layers[0])[1]
    assert (op.q_bias, op.k_bias, op.v_bias, op.o_bias) == (True, True, True, False)
    assert windows(program("qwen2.5")) == [None] * 24
    assert windows(program("qwen2.5", use_sliding_window=True)) == [None] * 21 + [32768] * 3
    typed = ["sliding_attention", "full_attention"] * 12
    assert windows(program("qwen2.5", use_sliding_window=True, layer_types=typed)) == [32768, None] * 12
    assert windows(program("qwen2.5", use_sliding_window=True, sliding_window=None)) == [None] * 24


def test_qwen3_normalises_each_head_of_q_and_k() -> None:
    op = attention(program("qwen3", attention_bias=True).layers[0])[1]
    assert op.qk_norm == Norm("rms", 128, 1e-6)
    assert op.qk_norm_over == "head"
    assert op.o_bias


def test_smollm3_leaves_every_fourth_layer_without_rotation() -> None:
    rotated = [attention(layer)[1].rope is not None for layer in program("smollm3").layers]
    assert rotated == [True, True, True, False] * 9
    by_interval = program("smollm3", no_rope_layers=None, no_rope_layer_interval=3)
    assert [attention(layer)[1].rope is not None for layer in by_interval.layers] == [True, True, False] * 12


def test_smollm3_is_tied_unless_the_file_says_otherwise() -> None:
    assert program("smollm3").head.tied
    assert not program("smollm3", tie_word_embeddings=False).head.tied


def test_smollm3_windows_are_on_the_layers_without_rotation_if_no_types_are_given() -> None:
    described = program("smollm3", use_sliding_window=True, sliding_window=512, layer_types=None)
    assert windows(described) == [None, None, None, 512] * 9


def test_olmo2_has_its_norms_after_the_parts_and_over_whole_projections() -> None:
    described = program("olmo2")
    part, op = attention(described.layers[0])
    late = Norm("rms", 2048, 1e-6, cast_late=True)
    assert (part.norm_in, part.norm_out) == (None, late)
    assert (op.qk_norm, op.qk_norm_over) == (late, "all")
    assert feed_forward(described.layers[0])[0].norm_out == late == described.final_norm


def test_granite_multiplies_embeddings_residuals_and_scores_and_divides_logits() -> None:
    described = program("granite")
    assert described.embedding.scale == 12.0
    assert [branch.scale for branch in described.layers[5].branches] == [0.22, 0.22]
    assert attention(described.layers[5])[1].spec.scale == 0.015625
    assert described.head.scale == 1 / 8


def test_a_tied_head_may_be_repeated_in_the_file_but_must_equal_the_embedding() -> None:
    head = describe(PUBLISHED["qwen3"]).weights.rules[-1]
    assert (head.sources, head.optional, head.tied_to) == (("lm_head.weight",), True, "embed.weight")
    untied = describe(PUBLISHED["olmo2"]).weights.rules[-1]
    assert untied == replace(head, optional=False, tied_to=None)


@pytest.mark.parametrize(
    ("written", "activation"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
    ],
)
def test_activations_are_known_by_their_published_names(written: str, activation: str) -> None:
    assert feed_forward(program("llama-3.2", hidden_act=written).layers[0])[1].activation == activation


@pytest.mark.parametrize(
    ("written", "expected"),
    [(None, ()), (7, (7,)), ([7, 9], (7, 9)), ([7, 999_999], (7,)), ([], ())],
)
def test_eos_may_be_one_id_several_or_none(written: Any, expected: tuple[int, ...]) -> None:
    assert describe({**PUBLISHED["llama-3.2"], "eos_token_id": written}).eos_token_ids == expected


def test_ids_that_the_file_leaves_out_are_the_references_defaults() -> None:
    silent = {key: value for key, value in PUBLISHED["llama-3.2"].items() if not key.endswith("_token_id")}
    described = describe(silent)
    assert (described.bos_token_id, described.eos_token_ids, described.pad_token_id) == (1, (2,), None)
