"""Configs as they are published, in both spellings, become the program that their model type means."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_gemma import pluglm_describe_model as describe

from pluglm.contracts import Attention, DecoderProgram, FeedForward, Norm, Part, Rope

#: The keys of published models, as Transformers 4 wrote them.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
SLIDING, FULL = "sliding_attention", "full_attention"


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as Transformers 5 writes it."""
    config = dict(config)
    scaling = {"rope_type": "default", **(config.pop("rope_scaling", None) or {})}
    full = {"rope_theta": config.pop("rope_theta"), **scaling}
    if config["model_type"] != "gemma3_text":
        return {**config, "rope_parameters": full}
    local = {"rope_theta": config.pop("rope_local_base_freq"), "rope_type": "default"}
    pattern = config.pop("sliding_window_pattern", 6)
    kinds = [SLIDING if (i + 1) % pattern else FULL for i in range(config["num_hidden_layers"])]
    return {**config, "layer_types": kinds, "rope_parameters": {FULL: full, SLIDING: local}}


def program(name: str, **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def attention(described: DecoderProgram, layer: int) -> tuple[Part, Attention]:
    part = described.layers[layer].branches[0].parts[0]
    assert isinstance(part.op, Attention)
    return part, part.op


def feed_forward(described: DecoderProgram) -> tuple[Part, FeedForward]:
    part = described.layers[0].branches[1].parts[0]
    assert isinstance(part.op, FeedForward)
    return part, part.op


def windows(described: DecoderProgram) -> list[int | None]:
    found = [attention(described, i)[1].spec.mask.window for i in range(len(described.layers))]
    assert found == [slot.window for slot in described.slots]  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert described.model_type == config["model_type"]
    assert (described.num_layers, described.vocab_size) == (config["num_hidden_layers"], config["vocab_size"])
    dropped = {key for key in config if key.startswith("_")}
    assert {key.partition(".")[0] for key in described.used} | set(described.ignored) | dropped >= set(config)
    assert described.program is not None
    assert DecoderProgram.from_json(json.loads(json.dumps(described.program.to_json()))) == described.program


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    assert describe(as_v5(PUBLISHED[name])).program == describe(PUBLISHED[name]).program


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_name_of_the_weight_map_occurs_once_and_reads_back(name: str) -> None:
    weights = describe(PUBLISHED[name]).weights
    targets = [target for rule in weights.rules for target in rule.targets]
    sources = [source for rule in weights.rules for source in rule.sources]
    assert len(set(targets)) == len(targets) == len(set(sources)) == len(sources)
    assert all(rule.transform is None for rule in weights.rules)


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_gemma import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_generation_scales_embeddings_and_stores_its_norms_less_one(name: str) -> None:
    described, size = program(name), PUBLISHED[name]["hidden_size"]
    assert described.embedding.scale == size**0.5
    assert described.final_norm == Norm("rms", size, 1e-6, offset=1.0, cast_late=True)
    assert attention(described, 0)[0].norm_in == feed_forward(described)[0].norm_in == described.final_norm
    assert described.head.tied


def test_gemma_has_a_norm_before_each_part_and_no_windows_and_caps() -> None:
    described = program("gemma-2b")
    part, op = attention(described, 0)
    assert (part.norm_out, feed_forward(described)[0].norm_out) == (None, None)
    assert (op.spec.num_heads, op.spec.num_kv_heads, op.spec.head_dim, op.spec.scale) == (8, 1, 256, 1 / 16)
    assert (op.spec.softcap, described.head.softcap, described.max_seq_len) == (None, None, 8192)
    assert windows(described) == [None] * 18


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-7b-1.1"])
def test_the_first_files_say_gelu_and_mean_its_approximation(name: str) -> None:
    assert feed_forward(program(name))[1].activation == "gelu_tanh"
    assert feed_forward(program("gemma-2b", hidden_activation="gelu_pytorch_tanh"))[1].activation == "gelu_tanh"
    assert feed_forward(program("gemma-2b", hidden_act="silu"))[1].activation == "silu"


def test_the_later_generations_mean_the_gelu_that_they_say() -> None:
    assert feed_forward(program("gemma-2-2b", hidden_activation="gelu"))[1].activation == "gelu"
    assert feed_forward(program("gemma-2-2b", hidden_act="silu"))[1].activation == "gelu_tanh"  # hidden_act is unread


def test_gemma2_has_norms_around_each_part_and_two_caps() -> None:
    described = program("gemma-2-9b")
    part, op = attention(described, 7)
    assert part.norm_out == feed_forward(described)[0].norm_out == described.final_norm
    assert (op.spec.softcap, described.head.softcap) == (50.0, 30.0)
    assert windows(described) == [4096, None] * 21


def test_a_cap_is_off_if_the_file_says_null_and_the_references_if_it_says_nothing() -> None:
    off = program("gemma-2-2b", attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (attention(off, 0)[1].spec.softcap, off.head.softcap) == (None, None)
    silent = {key: value for key, value in PUBLISHED["gemma-2-2b"].items() if "softcapping" not in key}
    assert describe(silent).program == program("gemma-2-2b")


def test_the_scale_of_scores_follows_query_pre_attn_scalar_and_not_the_head() -> None:
    assert attention(program("gemma-2-27b"), 0)[1].spec.scale == 1 / 12  # 4608 / 32 heads; head_dim is 128
    assert attention(program("medgemma-27b"), 0)[1].spec.scale == 168**-0.5


def test_gemma2_windows_follow_layer_types_where_the_file_has_them() -> None:
    assert windows(program("gemma-2-2b", layer_types=[FULL, SLIDING] * 13)) == [None, 4096] * 13
    assert windows(program("gemma-2-2b", layer_types=[FULL] * 26, sliding_window=None)) == [None] * 26


def test_gemma3_has_five_layers_with_a_window_to_each_without_one() -> None:
    assert windows(program("gemma-3-1b")) == ([512] * 5 + [None]) * 4 + [512] * 2
    assert windows(program("gemma-3-270m")) == ([512] * 5 + [None]) * 3
    by_pattern = program("gemma-3-1b", sliding_window_pattern=2)
    assert windows(by_pattern) == [512, None] * 13
    silent = {key: value for key, value in PUBLISHED["gemma-3-1b"].items() if key != "sliding_window_pattern"}
    assert describe(silent).program == program("gemma-3-1b")  # the reference's six


def test_gemma3_turns_by_layer_type_and_stretches_the_layers_without_a_window_only() -> None:
    described = program("medgemma-27b")
    assert attention(described, 0)[1].rope == Rope("default", 10_000.0, 128, max_seq_len=131072)
    assert attention(described, 5)[1].rope == Rope(
        "linear", 1e6, 128, parameters=(("factor", 8.0),), max_seq_len=131072
    )
    assert described.max_seq_len == 131072  # counts the stretched positions already


def test_gemma3_bases_that_a_file_leaves_out_are_the_references() -> None:
    silent = {key: value for key, value in PUBLISHED["medgemma-27b"].items() if not key.startswith("rope_")}
    thetas = [op.rope.theta for op in describe(silent).program.ops() if isinstance(op, Attention)]  # type: ignore[union-attr]
    assert thetas[:7] == [1e4] * 5 + [1e6, 1e4]


def test_gemma3_normalises_each_head_of_q_and_k() -> None:
    op = attention(program("gemma-3-1b"), 0)[1]
    assert op.qk_norm == Norm("rms", 256, 1e-6, offset=1.0, cast_late=True)
    assert op.qk_norm_over == "head"
    assert attention(program("gemma-2-2b"), 0)[1].qk_norm is None


def test_gemma3_caps_logits_if_the_file_asks() -> None:
    assert program("gemma-3-1b").head.softcap is None
    assert program("gemma-3-1b", final_logit_softcapping=20).head.softcap == 20.0


def test_biases_are_on_all_four_projections() -> None:
    op = attention(program("gemma-3-1b", attention_bias=True), 3)[1]
    assert op.q_bias and op.k_bias and op.v_bias and op.o_bias


def test_norms_of_one_name_stand_in_the_place_of_their_generation() -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    places = {
        generation: next(
            rule.targets for rule in describe(PUBLISHED[generation]).weights.rules if rule.sources == (name,)
        )
        for generation in ("gemma-2b", "gemma-2-2b", "gemma-3-1b")
    }
    assert places["gemma-2b"] == ("layers.1.mlp_norm_in.weight",)
    assert places["gemma-2-2b"] == places["gemma-3-1b"] == ("layers.1.attn_norm_out.weight",)


def test_an_untied_head_must_be_in_the_file_and_a_tied_one_may() -> None:
    tied = describe(PUBLISHED["gemma-3-1b"]).weights.rules[-1]
    assert (tied.sources, tied.optional, tied.tied_to) == (("lm_head.weight",), True, "embed.weight")
    untied = describe({**PUBLISHED["gemma-3-1b"], "tie_word_embeddings": False}).weights.rules[-1]
    assert (untied.sources, untied.optional, untied.tied_to) == (("lm_head.weight",), False, None)


def test_ids_that_the_file_leaves_out_are_the_references_defaults() -> None:
    silent = {key: value for key, value in PUBLISHED["gemma-2b"].items() if not key.endswith("_token_id")}
    described = describe(silent)
    assert (described.bos_token_id, described.eos_token_ids, described.pad_token_id) == (2, (1,), 0)
