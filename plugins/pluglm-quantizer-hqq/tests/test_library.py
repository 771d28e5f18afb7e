"""Against the package hqq: the same codes and outputs, and its files; runs where the package is (make test-hqq)."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluglm_quantizer_hqq
import pytest
import torch

import pluglm
from pluglm.contracts import QuantizerRequest

pytest.importorskip("hqq.core.optimize", reason="make test-hqq runs these")

LAYER = "layers.0.mlp.up"


@pytest.fixture(scope="module")
def hqq() -> Iterator[Any]:
    """`hqq.core.quantize`; it colours its warnings by a package that is not needed otherwise."""
    absent = "termcolor" not in sys.modules
    if absent:
        stand_in = types.ModuleType("termcolor")
        stand_in.colored = lambda text, *_: text  # type: ignore[attr-defined]
        sys.modules["termcolor"] = stand_in
    import hqq.core.quantize as library

    yield library
    if absent:
        del sys.modules["termcolor"]


def theirs(hqq: Any, linear: torch.nn.Linear, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return hqq.HQQLinear(
        linear, hqq.BaseQuantizeConfig(**settings), del_orig=False, compute_dtype=dtype, device="cpu"
    )  # fmt: skip


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_layer_is_that_of_the_package_bit_by_bit(hqq: Any, bits: int, axis: int) -> None:
    torch.manual_seed(bits)
    dtype = (torch.float32, torch.bfloat16)[axis]
    linear = torch.nn.Linear(96, 40, bias=axis == 1)
    linear.weight.data[3, 5] = 4.0  # an outlier, which the zeros are not to follow
    linear.weight.data[7] = 0.25  # a group without width
    linear = linear.to(dtype)
    want = theirs(hqq, linear, dtype, nbits=bits, group_size=16, axis=axis)
    request = QuantizerRequest(
        "cpu", str(dtype).removeprefix("torch."), variant=f"int{bits}", options=(("axis", axis), ("group_size", 16))
    )
    quantizer = pluglm_quantizer_hqq.pluglm_build_quantizer(request=request)
    module = quantizer.quantize(LAYER, linear.weight.detach(), None if axis == 0 else linear.bias.detach())
    ours, file = quantizer.pack(module), want.state_dict()
    assert ours.keys() == file.keys()
    for name, tensor in file.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    x = torch.randn(2, 3, 96).to(dtype)
    with torch.no_grad():
        assert torch.equal(module(x), want(x))


@pytest.mark.parametrize(("variant", "bound"), [("int8", 0.008), ("int4", 0.13), ("int3", 0.27), ("int2", 0.6)])
def test_errors_are_small_and_smaller_than_without_moved_zeros(variant: str, bound: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 128)
    weight[torch.rand(48, 128) < 0.01] *= 6
    quantizer = pluglm_quantizer_hqq.pluglm_build_quantizer(request=QuantizerRequest("cpu", "float32", variant=variant))
    error = (quantizer.quantize(LAYER, weight, None).dense() - weight).abs()
    assert float(error.mean() / weight.abs().mean()) < bound
    groups, top = weight.reshape(-1, 64), 2 ** int(variant[3:]) - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / top
    plain = ((groups - low) / step).round() * step + low
    assert float(error.pow(0.7).mean()) < float((plain - groups).abs().pow(0.7).mean())


def test_a_model_that_the_package_packed_gives_its_logits(hqq: Any, tmp_path: Path) -> None:
    """Written as Transformers 4 wrote it (5.23 neither writes nor reads it): each layer's own tensors, one config."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, attention_bias=True, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    settings = {"self_attn.q_proj": {"nbits": 3, "group_size": 64, "axis": 0}, "mlp.up_proj": {"nbits": 2}}
    for name, part in list(model.named_modules()):
        tag = ".".join(name.split(".")[-2:])
        if isinstance(part, torch.nn.Linear) and tag not in ("lm_head", "self_attn.k_proj"):
            told = {"nbits": 4, "group_size": 32, "axis": 1, **settings.get(tag, {})}
            model.set_submodule(name, theirs(hqq, part, **told))
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    entries = {tag: hqq.BaseQuantizeConfig(**{"nbits": 4, "axis": 1, **told}) for tag, told in settings.items()}
    written = {
        **config.to_dict(), "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"quant_method": "hqq", "quant_config": entries, "skip_modules": ["lm_head", "k_proj"]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    lm = pluglm.load(folder, dtype="float32")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, model(ids).logits)
    lm.save(tmp_path / "ours")
    ours, file = load_file(tmp_path / "ours" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == file.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in file.items())


def test_a_model_is_packed_with_settings_for_some_modules_saved_and_loaded(tmp_path: Path) -> None:
    modules = {"*.mlp.*": {"bits": 2, "group_size": 16}, "*.attn.v": {"bits": 8}}
    lm = pluglm.load("pystdlib", quantizer="hqq:int4", options={"quantizer": {"modules": modules, "group_size": 32}})
    lm.save(tmp_path / "packed")
    again = pluglm.load(tmp_path / "packed", dtype=lm.plan.dtype)
    assert again.model.module.get_submodule("layers.0.mlp.up").grid.bits == 2  # type: ignore[union-attr]
    assert again.model.module.get_submodule("layers.0.attn.v").grid.bits == 8  # type: ignore[union-attr]
    assert again.model.module.get_submodule("layers.0.attn.q").grid.group_size == 32  # type: ignore[union-attr]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, lm.model(ids).logits)
