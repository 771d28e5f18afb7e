"""Files that say the same in another way load to the same logits; those that say another thing are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pluglm.errors import CheckpointError, ConfigError

Tensors = dict[str, Tensor]
TEXT = kit.prompt(40)[None]


def copy(source: Path, target: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors, and other keys in its config."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    said = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**said, **config}))
    return target


def same_logits(folder: Path, loaded: Any) -> bool:
    with torch.no_grad():
        return torch.equal(kit.load(folder).model(TEXT).logits, loaded.model(TEXT).logits)


def test_a_tied_head_may_be_repeated(folder: Any, loaded: Any, tmp_path: Path) -> None:
    def repeat(tensors: Tensors) -> Tensors:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    assert same_logits(copy(folder("qwen3-full"), tmp_path, repeat), loaded("qwen3-full"))


def test_a_tied_head_that_differs_from_the_embedding_is_refused(folder: Any, tmp_path: Path) -> None:
    def other(tensors: Tensors) -> Tensors:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}

    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        kit.load(copy(folder("qwen3-full"), tmp_path, other))


def test_a_decoder_saved_without_its_head_has_no_prefix(folder: Any, loaded: Any, tmp_path: Path) -> None:
    def bare(tensors: Tensors) -> Tensors:
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    assert same_logits(copy(folder("granite-tied"), tmp_path, bare), loaded("granite-tied"))


def test_repeated_rotary_frequencies_are_ignored(folder: Any, loaded: Any, tmp_path: Path) -> None:
    def older(tensors: Tensors) -> Tensors:
        return {**tensors, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    assert same_logits(copy(folder("llama-linear"), tmp_path, older), loaded("llama-linear"))


@pytest.mark.parametrize("name", ["llama-linear", "smollm3-full", "olmo2-biases", "granite-biases"])
def test_biases_that_the_config_does_not_name_are_refused(name: str, folder: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"self_attn.q_proj.bias"):
        kit.load(copy(folder(name), tmp_path, dict, attention_bias=False))


def test_an_untied_head_that_is_missing_is_refused(folder: Any, tmp_path: Path) -> None:
    def headless(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}

    with pytest.raises(CheckpointError, match=r"lm_head.weight"):
        kit.load(copy(folder("llama-llama3"), tmp_path, headless))


def test_a_key_that_nothing_reads_is_refused_before_any_weight(folder: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        kit.load(copy(folder("llama-llama3"), tmp_path, dict, final_logit_softcapping=30.0))
