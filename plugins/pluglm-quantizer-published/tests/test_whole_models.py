"""Packed folders load by themselves and compute what the plain weights compute, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_cases import CASES, compressed, gptq
from published_models import LINEAR, load, logits, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from pluglm import CheckpointError, PlanError, UnsupportedRequestError
from pluglm.contracts import GroupedLinear

#: Columns of a group, where they do not divide all layers. Elsewhere executors may take every layer over.
COLUMNS = {"gptq, 2 bits, no g_idx, a ragged group": 40, "compressed-tensors, int8 by block": 24}


@pytest.mark.parametrize("name", CASES)
def test_a_packed_folder_computes_what_its_plain_weights_compute(name: str, tmp_path: Path) -> None:
    packed, plain = write(tmp_path, *CASES[name])
    lm = load(packed)
    want = load_file(plain / "model.safetensors")
    for place, layer in layers(lm).items():
        weight = want[f"{place}.weight"]
        assert torch.equal(layer.scaled().dense(torch.float32), weight), place
        regular = "no order" not in name and weight.shape[1] % COLUMNS.get(name, 1) == 0
        assert isinstance(layer, GroupedLinear) == regular
        if regular:
            torch.testing.assert_close(layer.grouped().dense(), weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(lm), logits(load(plain)))


def layers(lm: Any) -> dict[str, Any]:
    """The packed layers by their name in the file."""
    from pluglm_quantizer_published.layer import PackedLinear

    names = {"attn": "self_attn", **{n: f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}}
    found = {
        "model." + ".".join(names.get(part, part) for part in name.split(".")): module
        for name, module in lm.model.module.named_modules()
        if isinstance(module, PackedLinear)
    }
    assert found.keys() == LINEAR.keys()
    return found


@pytest.mark.parametrize("name", ["gptq, 4 bits, columns in no order", "awq, gemm", "compressed-tensors, 8 bits, by row",
                                  "compressed-tensors, int8 by block"])  # fmt: skip
def test_saving_writes_the_published_tensors_again(name: str, tmp_path: Path) -> None:
    packed, _ = write(tmp_path, *CASES[name], bias=True)
    lm = load(packed)
    lm.save(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor), key
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"] == CASES[name][0]
    assert torch.equal(logits(load(tmp_path / "again")), logits(lm))


def test_biases_are_read_with_their_layer(tmp_path: Path) -> None:
    packed, plain = write(tmp_path, *CASES["gptq, 4 bits"], bias=True)
    lm = load(packed)
    assert torch.equal(logits(lm), logits(load(plain)))
    bias = layers(lm)["model.layers.0.self_attn.v_proj"].grouped_bias()
    assert bias is not None
    assert bias.dtype is torch.float32


def test_a_bias_that_the_model_needs_must_be_there(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, *CASES["gptq, 4 bits"], bias=True)
    tensors = load_file(packed / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.bias"]
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load(packed)
    assert caught.value.what.endswith(
        "lacks packed tensors of layers.0.attn.k: 'model.layers.0.self_attn.k_proj.bias'."
    )


def test_a_bias_that_the_file_alone_has_is_added_as_its_packer_meant_it(tmp_path: Path) -> None:
    """AutoGPTQ wrote biases of zeros for layers without one."""
    (tmp_path / "zeros").mkdir()
    (tmp_path / "ones").mkdir()
    packed, plain = write(tmp_path / "zeros", *CASES["gptq, 4 bits"], stray_bias=0.0)
    assert torch.equal(logits(load(packed)), logits(load(plain)))
    other, _ = write(tmp_path / "ones", *CASES["gptq, 4 bits"], stray_bias=1.0)
    assert not torch.allclose(logits(load(other)), logits(load(plain)))


@pytest.mark.parametrize("name", ["gptq, 4 bits", "awq, gemm", "compressed-tensors, 4 bits"])
def test_layers_that_the_file_keeps_plain_stay_plain(name: str, tmp_path: Path) -> None:
    packed, plain = write(tmp_path, *CASES[name], plain=("o_proj", "down_proj"))
    lm = load(packed)
    assert type(lm.model.module.get_submodule("layers.0.attn.o")) is torch.nn.Linear
    assert torch.equal(logits(lm), logits(load(plain)))


def test_a_group_of_layers_may_be_packed_otherwise_by_name(tmp_path: Path) -> None:
    """gptq calls that `dynamic`, compressed-tensors has config groups; both match the names of the file."""
    small, large = gptq(4, 32), gptq(8, 32)

    def pack(rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        return (large if (rows, columns) == (64, 96) else small)[1](rows, columns, seed)

    rules = {r"-:.*\.nowhere": {}, r"+:.*\.mlp\.down_proj$": {"bits": 8}}
    packed, plain = write(tmp_path, {**small[0], "dynamic": rules}, pack)
    assert torch.equal(logits(load(packed)), logits(load(plain)))


def test_config_groups_are_met_by_name_before_pattern_before_class(tmp_path: Path) -> None:
    four, eight, three = compressed(4, 32), compressed(8, -1), compressed(3, 32)
    sizes = {(64, 96): eight, (64, 128): three}

    def pack(rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        return sizes.get((rows, columns), four)[1](rows, columns, seed)

    groups = {
        "first": dict(four[0]["config_groups"]["group_0"]),
        "second": {**eight[0]["config_groups"]["group_0"], "targets": [r"re:.*\.(down|o)_proj"]},
        "third": {**three[0]["config_groups"]["group_0"],
                  "targets": [f"model.layers.{i}.self_attn.o_proj" for i in range(1)]},
    }  # fmt: skip
    packed, plain = write(tmp_path, {**four[0], "format": "mixed-precision", "config_groups": groups}, pack)
    assert torch.equal(logits(load(packed)), logits(load(plain)))


def test_a_layer_that_is_packed_against_its_config_is_refused(tmp_path: Path) -> None:
    config, pack = CASES["compressed-tensors, 4 bits"]
    packed, _ = write(tmp_path, {**config, "ignore": ["lm_head", "re:.*up_proj"]}, pack)
    with pytest.raises(CheckpointError) as caught:
        load(packed)
    assert caught.value.what == (
        "the file holds weight_packed of model.layers.0.mlp.up_proj, a layer that quantization_config keeps plain."
    )


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_weights_are_rounded_once_to_the_compute_dtype(dtype: str, tmp_path: Path) -> None:
    packed, plain = write(tmp_path, *CASES["gptq, 4 bits"])
    lm, want = load(packed, dtype=dtype), load_file(plain / "model.safetensors")
    for place, layer in layers(lm).items():
        assert torch.equal(
            layer.scaled().dense(getattr(torch, dtype)), want[f"{place}.weight"].to(getattr(torch, dtype))
        )
    if dtype != "float16":
        assert torch.equal(logits(lm), logits(load(plain, dtype=dtype)))


def test_the_layers_hold_the_tensors_of_the_file_and_nothing_else(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, *CASES["gptq, 4 bits"])
    file = load_file(packed / "model.safetensors")
    for place, layer in layers(load(packed)).items():
        stored = sum(t.nbytes for name, t in file.items() if name.startswith(place))
        assert sum(t.nbytes for t in [*layer.buffers(), *layer.parameters()]) == stored


@pytest.mark.parametrize("quantizer", ["gptq", "awq", "compressed-tensors", "fp8"])
def test_packing_a_plain_model_is_refused_with_what_to_use_instead(quantizer: str, tmp_path: Path) -> None:
    _, plain = write(tmp_path, *CASES["gptq, 4 bits"])
    with pytest.raises(UnsupportedRequestError) as caught:
        load(plain, quantizer=quantizer)
    assert caught.value.what == f"the {quantizer} quantizer cannot honour this request."
    assert caught.value.reasons == (
        f"{quantizer} only reads weights that others have packed: to pack them takes calibration data and its own tools",
    )
    assert "native:int8" in caught.value.fix
    with pytest.raises(UnsupportedRequestError):
        load(plain).quantize(quantizer)


def test_a_packed_folder_takes_no_other_quantizer(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, *CASES["gptq, 4 bits"])
    with pytest.raises(PlanError, match="packed already"):
        load(packed, quantizer="awq")
