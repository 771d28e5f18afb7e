"""Files of bitsandbytes: those that Transformers writes are read bit by bit, and it reads those that pluglm writes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pluglm_hf
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.quantizers import quantizer_bnb_4bit, quantizer_bnb_8bit

import pluglm

#: Name -> how Transformers is told, and what pluglm is told instead.
KINDS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes", {}),
    "double": (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        "bitsandbytes:nf4", {"double_quant": True},
    ),
    "fp4": ({"load_in_4bit": True}, "bitsandbytes:fp4", {}),
    "int8": ({"load_in_8bit": True, "llm_int8_threshold": 1.5}, "bitsandbytes:int8", {"threshold": 1.5}),
}  # fmt: skip
IDS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers asks for accelerate, to spread a model over devices; one device needs nothing of it."""
    for module in (quantizer_bnb_4bit, quantizer_bnb_8bit):
        monkeypatch.setattr(module, "is_accelerate_available", lambda *_: True)
    monkeypatch.setattr(logging.getLogger("bitsandbytes.autograd._functions"), "disabled", True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, attention_bias=True, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def reference(folder: Path, **told: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**told) if told else None
    arguments = {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_transformers_wrote_gives_its_logits_and_is_written_back_as_it_was(
    kind: str, plain: Path, tmp_path: Path
) -> None:
    model = reference(plain, **KINDS[kind][0])
    model.save_pretrained(tmp_path / "theirs")
    lm = pluglm.load(tmp_path / "theirs", dtype="float32")
    assert torch.equal(logits(lm.model), logits(model))
    lm.save(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_pluglm_packed_and_has_its_logits(kind: str, plain: Path, tmp_path: Path) -> None:
    told, quantizer, options = KINDS[kind]
    lm = pluglm.load(plain, dtype="float32", quantizer=quantizer, options={"quantizer": options})
    lm.save(tmp_path / "ours")
    want = logits(reference(plain, **told))
    assert torch.equal(logits(lm.model), want)
    assert torch.equal(logits(reference(tmp_path / "ours")), want)


def test_what_a_file_keeps_plain_stays_plain_and_what_computes_in_bfloat16_does(plain: Path, tmp_path: Path) -> None:
    model = reference(
        plain, load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16", bnb_4bit_quant_storage="bfloat16",
        llm_int8_skip_modules=["k_proj", "lm_head"],
    )  # fmt: skip
    model.save_pretrained(tmp_path / "theirs")
    lm = pluglm.load(tmp_path / "theirs", dtype="float32")
    module = lm.model.module
    assert isinstance(module.get_submodule("layers.1.attn.k"), torch.nn.Linear)
    assert not isinstance(module.get_submodule("layers.1.attn.q"), torch.nn.Linear)
    assert torch.equal(logits(lm.model), logits(model))
    lm.save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == ["k_proj", "lm_head"]
    assert torch.equal(logits(reference(tmp_path / "ours")), logits(model))


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        ({"load_in_4bit": True}, {"load_in_4bit": True}),
        (
            {"quantization_config": pluglm_hf.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.0)},
            {"load_in_8bit": True, "llm_int8_threshold": 2.0},
        ),
    ],
)
def test_the_facade_takes_the_settings_of_transformers(
    mine: dict[str, Any], theirs: dict[str, Any], plain: Path
) -> None:
    model = pluglm_hf.AutoModelForCausalLM.from_pretrained(str(plain), **mine)
    assert torch.equal(logits(model), logits(reference(plain, **theirs)))
