"""Tiny checkpoints that both libraries read, written once a session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
BOS, EOS, PAD = 0, 1, 2
V, SCALE = 336, 0.3
CORPUS = ["hello world, this is a small text", "def f(x): return x + 1", "naïve café 日本語 🙂", "user assistant"] * 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, *, bos: bool = True) -> None:
    """A byte-level tokenizer with a chat template."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)])
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256,
    }))  # fmt: skip
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def write_llama(folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A decoder-only model whose choices are far from ties."""
    C, F, H, K, D = 24, 40, 6, 3, 8
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,), "lm_head.weight": (V, C)}
    for i in range(layers):
        of = {
            "self_attn.q_proj": (H * D, C), "self_attn.k_proj": (K * D, C), "self_attn.v_proj": (K * D, C),
            "self_attn.o_proj": (C, H * D), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F),
            "input_layernorm": (C,), "post_attention_layernorm": (C,),
        }  # fmt: skip
        shapes.update({f"model.layers.{i}.{name}.weight": shape for name, shape in of.items()})
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": C,
        "intermediate_size": F, "num_hidden_layers": layers, "num_attention_heads": H, "num_key_value_heads": K,
        "head_dim": D, "max_position_embeddings": 256, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": BOS, "eos_token_id": EOS,
        "pad_token_id": PAD, "dtype": "float32",
    }  # fmt: skip
    return _write(folder, config, shapes, seed)


def write_t5(folder: Path) -> Path:
    """An encoder-decoder."""
    C, F, H, D, layers = 24, 40, 3, 8, 2
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (V, C)}
    for stack in ("encoder", "decoder"):
        shapes[f"{stack}.final_layer_norm.weight"] = (C,)
        parts = (
            ["SelfAttention", "EncDecAttention", "DenseReluDense"]
            if stack == "decoder"
            else ["SelfAttention", "DenseReluDense"]
        )
        for i in range(layers):
            for j, part in enumerate(parts):
                at = f"{stack}.block.{i}.layer.{j}"
                shapes[f"{at}.layer_norm.weight"] = (C,)
                of = {"wi": (F, C), "wo": (C, F)}
                if part != "DenseReluDense":
                    of = {"q": (H * D, C), "k": (H * D, C), "v": (H * D, C), "o": (C, H * D)}
                shapes.update({f"{at}.{part}.{name}.weight": shape for name, shape in of.items()})
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, H)
    config = {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": V, "d_model": C, "d_kv": D,
        "d_ff": F, "num_layers": layers, "num_heads": H, "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu",
        "is_encoder_decoder": True, "tie_word_embeddings": True, "decoder_start_token_id": PAD, "pad_token_id": PAD,
        "eos_token_id": EOS, "dtype": "float32",
    }  # fmt: skip
    return _write(folder, config, shapes, 1)


def _write(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], seed: int) -> Path:
    """Weights as transformers draws them, four times as large, so that choices are far from ties; norms are one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * SCALE
        for name, shape in sorted(shapes.items())
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    (folder / "generation_config.json").write_text(json.dumps({k: config[k] for k in names if k in config}))
    write_tokenizer(folder)
    return folder
