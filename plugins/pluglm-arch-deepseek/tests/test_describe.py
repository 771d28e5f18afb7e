"""Configs as they are published, in both spellings, become the program that their model type means."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_deepseek import pluglm_describe_model as describe

from pluglm.contracts import (
    AttentionSpec,
    DecoderProgram,
    Experts,
    FeedForward,
    LatentAttention,
    LatentSlot,
    Layer,
    Norm,
    Part,
)

#: The keys of published models, as Transformers 4 wrote them: `rope_theta` beside `rope_scaling`.
PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as Transformers 5 writes it."""
    config = dict(config)
    scaling = config.pop("rope_scaling", None) or {}
    numbers = {key: value for key, value in scaling.items() if key != "type"}
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": scaling.get("type", "default"), **numbers}
    return {
        **config, "rope_parameters": rope, "head_dim": config["qk_rope_head_dim"],
        "qk_head_dim": config["qk_nope_head_dim"] + config["qk_rope_head_dim"], "output_router_logits": False,
    }  # fmt: skip


def program(name: str, **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def attention(layer: Layer) -> tuple[Part, LatentAttention]:
    part = layer.branches[0].parts[0]
    assert isinstance(part.op, LatentAttention)
    return part, part.op


def mlp(layer: Layer) -> FeedForward | Experts:
    op = layer.branches[1].parts[0].op
    assert isinstance(op, FeedForward | Experts)
    return op


def experts(layer: Layer) -> Experts:
    op = mlp(layer)
    assert isinstance(op, Experts)
    return op


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


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_deepseek import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_v3_caches_a_latent_and_a_rotary_key_and_announces_both_ways_of_attending() -> None:
    described = describe(PUBLISHED["deepseek-v3"])
    assert described.slots == (LatentSlot(512, 64),) * 61
    scale = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    assert described.attention == (
        AttentionSpec(128, 128, 192, 128, pytest.approx(scale)),
        AttentionSpec(128, 1, 576, 512, pytest.approx(scale)),
    )
    assert described.max_seq_len == 163_840


def test_v3_has_low_rank_queries_interleaved_pairs_and_an_eps_of_its_own_on_latents() -> None:
    part, op = attention(program("deepseek-v3", rms_norm_eps=1e-5).layers[7])
    assert part.norm_in == Norm("rms", 7168, 1e-5)
    assert (op.slot, op.nope_dim, op.q_rank, op.kv_rank, op.norm_eps) == (7, 128, 1536, 512, 1e-6)
    assert (op.rope.kind, op.rope.dim, op.rope.theta, op.rope.interleaved) == ("yarn", 64, 10_000.0, True)
    assert not op.bias
    assert attention(program("deepseek-v3", attention_bias=True).layers[0])[1].bias
    assert not attention(program("deepseek-v3", rope_interleave=False).layers[0])[1].rope.interleaved


def test_null_means_full_queries_and_silence_the_references_rank() -> None:
    assert attention(program("moonlight").layers[0])[1].q_rank is None
    silent = {key: value for key, value in PUBLISHED["moonlight"].items() if key != "q_lora_rank"}
    described = describe(silent).program
    assert described is not None
    assert attention(described.layers[0])[1].q_rank == 1536


def test_positions_that_are_not_stretched_leave_the_scale_alone() -> None:
    assert attention(program("moonlight").layers[0])[1].spec.scale == 192**-0.5
    stretched = {**PUBLISHED["deepseek-v3"]["rope_scaling"], "mscale_all_dim": 0.0}
    assert attention(program("deepseek-v3", rope_scaling=stretched).layers[0])[1].spec.scale == 192**-0.5


def test_v3_chooses_from_groups_by_corrected_sigmoids() -> None:
    described = program("deepseek-v3")
    assert [isinstance(mlp(layer), Experts) for layer in described.layers] == [False] * 3 + [True] * 58
    assert mlp(described.layers[2]) == FeedForward(7168, 18_432, "silu")
    assert mlp(described.layers[3]) == Experts(
        FeedForward(7168, 2048, "silu"), 256, 8, scoring="sigmoid", scale=2.5, correction_bias=True, num_groups=8,
        top_k_groups=4, shared=FeedForward(7168, 2048, "silu"),
    )  # fmt: skip
    assert not experts(program("deepseek-v3", norm_topk_prob=False).layers[3]).normalise


def test_v2_chooses_by_softmax_from_groups_or_from_all() -> None:
    assert mlp(program("deepseek-v2").layers[1]) == Experts(
        FeedForward(5120, 1536, "silu"), 160, 6, normalise=False, scale=16.0, num_groups=8, top_k_groups=3,
        shared=FeedForward(5120, 3072, "silu"),
    )  # fmt: skip
    greedy = describe({**PUBLISHED["deepseek-v2-lite"], "n_group": 8, "topk_group": 3})
    assert greedy.program is not None
    op = experts(greedy.program.layers[1])
    assert (op.num_groups, op.top_k_groups) == (1, 1)
    assert "topk_method is greedy" in greedy.ignored["n_group"]


def test_v2s_mlp_bias_is_of_dense_layers_and_shared_experts_only() -> None:
    described = program("deepseek-v2", mlp_bias=True)
    dense, op = mlp(described.layers[0]), experts(described.layers[1])
    assert isinstance(dense, FeedForward)
    assert op.shared is not None
    assert (dense.bias, op.shared.bias, op.expert.bias) == (True, True, False)


def test_what_files_leave_out_has_the_references_default() -> None:
    knobs = (
        "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "first_k_dense_replace", "n_shared_experts",
        "scoring_func", "topk_method", "moe_layer_freq", "num_nextn_predict_layers", "attention_bias",
        "tie_word_embeddings", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    for name in ("deepseek-v3", "deepseek-v2-lite"):
        silent = describe({key: value for key, value in PUBLISHED[name].items() if key not in knobs})
        spoken = {
            "deepseek-v3": {},
            "deepseek-v2-lite": {"first_k_dense_replace": 0, "bos_token_id": 1, "eos_token_id": 2},
        }
        wanted = describe({**PUBLISHED[name], **spoken[name]})
        assert silent.program == wanted.program
        assert (silent.bos_token_id, silent.eos_token_ids) == (wanted.bos_token_id, wanted.eos_token_ids)
