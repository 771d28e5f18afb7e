"""What is special to torchao: one packing, one variant, and how near int8 rows come to the dense layer."""

from __future__ import annotations

from typing import Any

import pluglm_quantizer_torchao
import pytest
import torch

from pluglm import CheckpointError, ConfigError, UnsupportedRequestError
from pluglm.contracts import QuantizerRequest

LAYER = "layers.0.mlp.up"


def build(dtype: str = "float32", **request: Any) -> Any:
    return pluglm_quantizer_torchao.pluglm_build_quantizer(request=QuantizerRequest("cpu", dtype, **request))


def refusal(dtype: str = "float32", **request: Any) -> UnsupportedRequestError:
    with pytest.raises(UnsupportedRequestError) as caught:
        build(dtype, **request)
    assert caught.value.what == "the torchao quantizer cannot honour this request."
    assert caught.value.fix == 'Write quantizer="torchao" or "torchao:int8".'
    assert caught.value.why == "; ".join(caught.value.reasons)
    return caught.value


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_compute_dtypes_are_refused(dtype: str) -> None:
    (reason,) = refusal(dtype).reasons
    assert reason == f"compute dtype {dtype} has no int8 product in torchao; float32 and bfloat16 have"


@pytest.mark.parametrize("variant", ["int4", "fp8", "", "INT8"])
def test_other_variants_are_refused(variant: str) -> None:
    (reason,) = refusal(variant=variant).reasons
    assert reason == f"variant {variant!r} is unknown; there is int8"


def test_every_reason_is_given_at_once() -> None:
    reasons = refusal("float16", variant="int4", options=(("group_size", 32),)).reasons
    assert [reason.split()[0] for reason in reasons] == ["option", "variant", "compute"]
    assert "'group_size'" in reasons[0]


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "torchao", "quant_type": "int4_weight_only", "packing": "pluglm"},
        {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
        {"quant_method": "torchao", "quant_type": "int8_weight_only"},
        {},
    ],
)
def test_a_checkpoint_of_another_packing_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(config=config)
    assert caught.value.what == f"this checkpoint is packed by torchao as {config.get('quant_type')!r}."
    assert caught.value.why == "this package reads int8_weight_only in the layout that `lm.save` writes."
    assert caught.value.fix == "Load the plain weights and pack them with quantizer='torchao:int8'."
    assert caught.value.key == "quantization_config"


def packed(dtype: torch.dtype = torch.float32, *, bias: bool = True) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    quantizer = build(str(dtype).removeprefix("torch."))
    module = quantizer.quantize(LAYER, torch.randn(12, 20).to(dtype), torch.randn(12).to(dtype) if bias else None)
    return quantizer, quantizer.pack(module)


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    [
        ("qdata", torch.zeros(12, 20), "qdata is torch.float32 [12, 20], not torch.int8 [12, 20]"),
        ("qdata", torch.zeros(12, dtype=torch.int8), "qdata is torch.int8 [12], not torch.int8 [out, in]"),
        ("scale", torch.zeros(11, 1), "scale is torch.float32 [11, 1], not torch.float32 [12, 1]"),
        ("scale", torch.zeros(12, 1).half(), "scale is torch.float16 [12, 1], not torch.float32 [12, 1]"),
        (
            "zero_point",
            torch.zeros(12, 2, dtype=torch.int8),
            "zero_point is torch.int8 [12, 2], not torch.int8 [12, 1]",
        ),
        ("bias", torch.zeros(20), "bias is torch.float32 [20], not torch.float32 [12]"),
    ],
)
def test_packed_tensors_of_another_kind_are_refused(name: str, wrong: torch.Tensor, found: str) -> None:
    quantizer, tensors = packed()
    with pytest.raises(CheckpointError) as caught:
        quantizer.unpack(LAYER, {**tensors, name: wrong})
    assert caught.value.what == f"the packed weight of {LAYER!r} does not fit: {found}."
    assert caught.value.why == "quantization_config says torchao int8, one scale a row."
    assert caught.value.fix == "Save the model again from its plain weights."
    assert caught.value.tensor == f"{LAYER}.{name}"


@pytest.mark.parametrize(("saved", "wanted"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_weights_that_were_packed_in_one_dtype_run_in_the_other(saved: torch.dtype, wanted: str) -> None:
    writer, tensors = packed(saved)
    reader = build(wanted, config=writer.config())
    x = torch.randn(3, 20)
    y = reader.unpack(LAYER, tensors)(x.to(getattr(torch, wanted)))
    assert y.dtype is getattr(torch, wanted)
    torch.testing.assert_close(y.float(), writer.unpack(LAYER, tensors)(x.to(saved)).float(), rtol=2e-2, atol=5e-2)


def test_each_weight_is_off_by_half_a_step_at_most() -> None:
    torch.manual_seed(1)
    weight = torch.randn(30, 50) * torch.logspace(-3, 1, 30)[:, None]
    quantizer = build()
    module = quantizer.quantize(LAYER, weight, None)
    error = (module(torch.eye(50)).T - weight).abs()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool((error <= 0.51 * step).all())


def test_the_head_stays_in_full_precision() -> None:
    assert build().refusal("head", 20, 12) == "the head stays in full precision"
    assert build().refusal("layers.0.head", 20, 12) is None


def test_which_layers_have_a_bias_is_written_into_the_config() -> None:
    writer, _ = packed()
    assert writer.config()["biased"] == [LAYER]
    reader = build(config=writer.config())
    assert "bias" in reader.tensor_names(LAYER)
    assert "bias" not in reader.tensor_names("layers.0.mlp.down")
