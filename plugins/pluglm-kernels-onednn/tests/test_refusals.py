"""What the onednn quantizer refuses, with every reason; every message is read."""

from __future__ import annotations

from typing import Any

import pluglm_kernels_onednn
import pytest
import torch
from pluglm_kernels_onednn import capability
from pluglm_kernels_onednn.lossless import PackedLinear, WidenedLinear

from pluglm import CheckpointError, ConfigError, UnsupportedRequestError
from pluglm.contracts import QuantizerRequest

LAYER = "layers.0.mlp.up"


def build(dtype: str = "bfloat16", device: str = "cpu", **request: Any) -> Any:
    return pluglm_kernels_onednn.pluglm_build_quantizer(request=QuantizerRequest(device, dtype, **request))


def reasons(*arguments: str, **request: Any) -> tuple[str, ...]:
    with pytest.raises(UnsupportedRequestError) as caught:
        build(*arguments, **request)
    assert caught.value.what == "the onednn quantizer cannot honour this request."
    assert caught.value.fix == 'Write quantizer="onednn:int8" or "onednn:bf16", with device="cpu".'
    assert caught.value.why == "; ".join(caught.value.reasons)
    return tuple(caught.value.reasons)


def test_every_reason_is_given_at_once() -> None:
    assert reasons("float16", "cuda:0", variant="int4", options=(("group_size", 32),)) == (
        "variant 'int4' is unknown; there is int8 and bf16",
        "option 'group_size' is unknown",
        "compute dtype float16 is not one of bfloat16, float32",
        "oneDNN's products run on the CPU, not on cuda:0",
    )


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"variant": "bf16", "dtype": "float32"}, "compute dtype float32 is not one of bfloat16"),
        ({"options": (("few_rows", -1),)}, "option few_rows is a whole number from 0 on, not -1"),
        ({"options": (("few_rows", True),)}, "option few_rows is a whole number from 0 on, not True"),
        ({"options": (("keep_packed", 1),)}, "option keep_packed is True or False, not 1"),
        ({"options": (("threads", 1),)}, "option 'threads' is unknown; int8 has few_rows and keep_packed"),
        ({"variant": "bf16", "options": (("few_rows", 1),)}, "option 'few_rows' is unknown"),
        (
            {"variant": "bf16", "config": {"quant_type": "int8", "packing": "pluglm"}},
            "the checkpoint is packed as int8, not as bf16",
        ),
    ],
)
def test_a_refusal_says_what_would_do(request_: dict[str, Any], reason: str) -> None:
    given = dict(request_)
    assert reasons(given.pop("dtype", "bfloat16"), **given) == (reason,)


def test_a_torch_without_onednn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert reasons() == ("this build of torch has no oneDNN",)
    monkeypatch.setattr(capability, "missing", lambda: "torch 9 has no onednn::qlinear_prepack")
    assert reasons() == ("torch 9 has no onednn::qlinear_prepack",)


def test_a_checkpoint_of_another_packing_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        build(config={"quant_method": "onednn", "quant_type": "int8"})
    assert caught.value.what == "this checkpoint is packed as 'int8' in the packing None."
    assert caught.value.why is not None and "int8 and bf16 in the packing 'pluglm'" in caught.value.why
    assert caught.value.fix == "Load the plain weights and pack them with quantizer='onednn:int8'."
    assert caught.value.key == "quantization_config"


def test_layers_that_stay_as_they_are() -> None:
    packer = build()
    assert packer.refusal("head", 64, 40) == "the head stays in full precision"
    assert packer.refusal(LAYER, 50, 40) == (
        "50 columns are no multiple of 32, which torch's int8 product reads at a time"
    )
    assert packer.refusal(LAYER, 64, 41) is None
    lossless = build(variant="bf16")
    assert lossless.refusal("head", 50, 41) is None


@pytest.mark.parametrize(
    ("short", "wrong", "found"),
    [
        ("codes", torch.zeros(12, 32), "codes is torch.float32 [12, 32], not torch.int8 [out, in]"),
        ("codes", torch.full((12, 32), -128, dtype=torch.int8),
         "codes is columns no multiple of 32 or a code of -128, not -127 … 127"),
        ("scale", torch.zeros(12), "scale is torch.float32 [12], not torch.bfloat16 [12]"),
        ("scale", torch.zeros(11).bfloat16(), "scale is torch.bfloat16 [11], not torch.bfloat16 [12]"),
        ("bias", torch.zeros(32), "bias is torch.float32 [32], not torch.bfloat16 [12]"),
    ],
)  # fmt: skip
def test_packed_tensors_of_another_kind_are_refused(short: str, wrong: torch.Tensor, found: str) -> None:
    packer = build()
    tensors = packer.pack(packer.quantize(LAYER, torch.randn(12, 32), torch.randn(12)))
    with pytest.raises(CheckpointError) as caught:
        packer.unpack(LAYER, {**tensors, short: wrong})
    assert caught.value.what == f"the packed weight of {LAYER!r} does not fit: {found}."
    assert caught.value.why == "quantization_config says that pluglm-kernels-onednn packed it."
    assert caught.value.fix == "Save the model again from its plain weights."
    assert caught.value.tensor == f"{LAYER}.{short}"


def test_whether_the_cpu_multiplies_bfloat16_chooses_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    packer = build(variant="bf16")
    weight = torch.randn(12, 32).bfloat16()
    native = capability.multiplies_bfloat16()
    assert type(packer.quantize(LAYER, weight, None)) is (PackedLinear if native else WidenedLinear)
    monkeypatch.setattr(capability, "multiplies_bfloat16", lambda: False)
    assert type(packer.quantize(LAYER, weight, None)) is WidenedLinear
