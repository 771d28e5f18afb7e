"""Tiny Llama checkpoints in plain files, with a tokenizer trained on the spot: whole loads in a few milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pluglm

#: Pairwise different, so that a swapped dimension cannot hide. The tokenizer has fewer ids than the embedding has rows.
V, C, F, L, H, K, D = 307, 24, 40, 2, 6, 3, 10
CONTEXT = 192
WORDS = ("the cat sat on a mat and read a book of cats . ", "hello world , how are you today ? fine ! ") * 3
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]

WriteModel = Callable[..., Path]


def config_of(**changed: Any) -> dict[str, Any]:
    """A config.json; a value of None as the reader sees it is left as null."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": C,
        "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K,
        "head_dim": D, "hidden_act": "silu", "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_theta": 500.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
        **changed,
    }  # fmt: skip


def weights_of(*, tied: bool = False, seed: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights whose next-token distribution has a clear winner; control tokens never win."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float) -> torch.Tensor:
        return gain * torch.randn(rows, columns, generator=draw) / columns**0.5

    def norm() -> torch.Tensor:
        return 1 + 0.3 * torch.randn(C, generator=draw)

    weights = {"model.embed_tokens.weight": matrix(V, C, 5.0), "model.norm.weight": norm()}
    for i in range(L):
        layer = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", H * D, C), ("self_attn.k_proj", K * D, C), ("self_attn.v_proj", K * D, C),
            ("self_attn.o_proj", C, H * D), ("mlp.gate_proj", F, C), ("mlp.up_proj", F, C), ("mlp.down_proj", C, F),
        ):  # fmt: skip
            weights[f"{layer}{name}.weight"] = matrix(rows, columns, 2.0)
        weights[layer + "input_layernorm.weight"] = norm()
        weights[layer + "post_attention_layernorm.weight"] = norm()
    head = matrix(V, C, 5.0)
    # Ids without a text and control tokens: score 0 where the best has about 15.
    head[: len(SPECIAL)] = 0.0
    head[290:] = 0.0
    if tied:
        weights["model.embed_tokens.weight"] = head
    else:
        weights["lm_head.weight"] = head
    return {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE tokenizer of 290 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    return str(tokenizer.to_str())


@pytest.fixture(scope="session")
def write_model(tokenizer_json: str) -> WriteModel:
    """Write a checkpoint: `write_model(folder, tied=…, dtype=…, tokenizer=…, template=…, config={…})`."""

    def write(
        folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 3, tokenizer: bool = True,
        template: bool = True, config: Mapping[str, Any] | None = None,
    ) -> Path:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        said = {"tie_word_embeddings": tied, "dtype": str(dtype).removeprefix("torch."), **(config or {})}
        (folder / "config.json").write_text(json.dumps(config_of(**said)))
        save_file(weights_of(tied=tied, seed=seed, dtype=dtype), folder / "model.safetensors", {"format": "pt"})
        if tokenizer:
            (folder / "tokenizer.json").write_text(tokenizer_json)
            more = {"bos_token": "<bos>", "eos_token": "<eos>"}
            if template:
                more["chat_template"] = TEMPLATE
            (folder / "tokenizer_config.json").write_text(json.dumps(more))
        return folder

    return write


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: WriteModel) -> Path:
    """The usual model. Tests only read it."""
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def lm(folder: Path) -> pluglm.LanguageModel:
    """The usual model, loaded."""
    return pluglm.load(folder)
