"""gpt-oss as it is published: packed stacks of experts become plain ones while they are read, and nothing is lost."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pluglm_quantizer_published
import pytest
import torch
from published_models import IDS, load, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from pluglm import CheckpointError, ConfigError, UnsupportedRequestError
from pluglm.contracts import QuantizerRequest, UnpackingQuantizer

# Pairwise different, whole blocks of 32 where they are packed: hidden, feed-forward, experts, vocabulary.
C, F, E, V = 64, 32, 3, 40
QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def four_bits(code: int) -> float:
    """E2M1: a sign, two bits of exponent with a bias of 1, one bit of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def stack(out_features: int, in_features: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """blocks, scales, and the weight [E, in, out] that they mean."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (E, out_features, in_features // 32, 32))
    exponents = rng.integers(118, 122, codes.shape[:3])
    values = np.vectorize(four_bits)(codes) * 2.0 ** (exponents[..., None] - 127)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    packed = {
        "_blocks": torch.from_numpy(blocks.astype(np.uint8)),
        "_scales": torch.from_numpy(exponents.astype(np.uint8)),
    }
    dense = torch.from_numpy(values.reshape(E, out_features, in_features)).mT
    return packed, dense.float().contiguous()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Packed and plain."""
    torch.manual_seed(0)
    config = {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_size": C, "intermediate_size": F,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": V,
        "num_local_experts": E, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "sliding_window": 16, "layer_types": ["full_attention"],
        "attention_bias": True, "tie_word_embeddings": False, "torch_dtype": "float32", "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    at = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (V, C), "lm_head.weight": (V, C), "model.norm.weight": (C,),
        f"{at}.input_layernorm.weight": (C,), f"{at}.post_attention_layernorm.weight": (C,),
        f"{at}.self_attn.sinks": (4,), f"{at}.mlp.router.weight": (E, C), f"{at}.mlp.router.bias": (E,),
        f"{at}.mlp.experts.gate_up_proj_bias": (E, 2 * F), f"{at}.mlp.experts.down_proj_bias": (E, C),
    }  # fmt: skip
    for name, rows in (("q", 32), ("k", 16), ("v", 16)):
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (rows, C), f"{at}.self_attn.{name}_proj.bias": (rows,)}
    shapes |= {f"{at}.self_attn.o_proj.weight": (C, 32), f"{at}.self_attn.o_proj.bias": (C,)}
    plain = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    packed = dict(plain)
    for seed, (name, sizes) in enumerate({"gate_up_proj": (2 * F, C), "down_proj": (C, F)}.items()):
        tensors, dense = stack(*sizes, seed)
        plain[f"{at}.mlp.experts.{name}"] = dense
        packed |= {f"{at}.mlp.experts.{name}{end}": tensor.contiguous() for end, tensor in tensors.items()}
    root = tmp_path_factory.mktemp("gpt-oss")
    for folder, tensors, more in (("packed", packed, {"quantization_config": QUANTIZED}), ("plain", plain, {})):
        (root / folder).mkdir()
        (root / folder / "config.json").write_text(json.dumps({**config, **more}))
        save_file(tensors, root / folder / "model.safetensors", metadata={"format": "pt"})
    return root / "packed", root / "plain"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_packed_experts_compute_what_plain_ones_compute(folders: tuple[Path, Path], dtype: str) -> None:
    packed, plain = (load(folder, dtype=dtype) for folder in folders)
    for (name, one), (other, two) in zip(
        packed.model.module.named_parameters(), plain.model.module.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(one, two), name
    assert torch.equal(logits(packed), logits(plain))


def test_logits_are_those_of_transformers(folders: tuple[Path, Path], transformers: Any) -> None:
    """Which unpacks the experts too, without its kernels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            folders[0], dtype=torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True)
        )
        with torch.no_grad():
            want = reference(torch.tensor(IDS)).logits[0]
    torch.testing.assert_close(logits(load(folders[0])), want, rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_plain_and_loads_again(folders: tuple[Path, Path], tmp_path: Path) -> None:
    lm = load(folders[0])
    lm.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    want, got = (load_file(folder / "model.safetensors") for folder in (folders[1], tmp_path / "saved"))
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert torch.equal(logits(load(tmp_path / "saved")), logits(lm))


def build(**config: Any) -> Any:
    request = QuantizerRequest("cpu", "float32", config={**QUANTIZED, **config})
    return pluglm_quantizer_published.mxfp4.pluglm_build_quantizer(request=request)


def test_its_object_reads_and_does_nothing_else() -> None:
    quantizer = build()
    assert isinstance(quantizer, UnpackingQuantizer)
    assert quantizer.refusal("layers.0.attn.q", 64, 32) == "mxfp4 packs experts, which are no linear layers here"
    for call in (lambda: quantizer.quantize("q", torch.ones(2, 2), None), lambda: quantizer.unpack("q", {})):
        with pytest.raises(UnsupportedRequestError, match="mxfp4 only reads weights"):
            call()
    with pytest.raises(ConfigError) as caught:
        build(block_size=16)
    assert caught.value.key == "quantization_config.block_size"


@pytest.mark.parametrize(
    ("end", "change", "what"),
    [
        ("_scales", lambda t: None, "it is missing"),
        ("_scales", lambda t: t[:, 1:], "it is U8 [3, 63, 1], not U8 [3, 64, 1]"),
        ("_scales", lambda t: t.float(), "it is F32 [3, 64, 1], not U8 [3, 64, 1]"),
        ("_scales", lambda t: torch.full_like(t, 255), "it holds scales that are no numbers"),
        ("_blocks", lambda t: t[..., 1:], "it is U8 [3, 64, 1, 15], not U8 [experts, out, in / 32, 16]"),
    ],
)
def test_stacks_that_do_not_fit_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, end: str, change: Any, what: str
) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(folders[0] / "model.safetensors")
    wrong = change(tensors.pop(name + end))
    tensors |= {} if wrong is None else {name + end: wrong.contiguous()}
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert caught.value.what == f"the packed tensor {end[1:]} of {name} does not fit: {what}."


def test_a_folder_that_holds_nothing_packed_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folders[0] / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folders[1] / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="holds no packed tensor"):
        load(tmp_path)
