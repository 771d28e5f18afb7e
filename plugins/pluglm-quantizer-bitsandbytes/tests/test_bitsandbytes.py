"""What is special to bitsandbytes: its options, its config, its files, and the outliers of LLM.int8."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Sequence
from typing import Any

import pluglm_quantizer_bitsandbytes
import pytest
import torch
from pluglm_quantizer_bitsandbytes import library

from pluglm import CheckpointError, ConfigError, UnsupportedRequestError
from pluglm.contracts import QuantizerRequest

LAYER = "layers.0.mlp.up"
OUT, IN = 24, 80
FIX = 'Write quantizer="bitsandbytes:nf4", ":fp4" or ":int8"; its README lists the options of each.'


def build(dtype: str = "float32", device: str = "cpu", **request: Any) -> Any:
    return pluglm_quantizer_bitsandbytes.pluglm_build_quantizer(request=QuantizerRequest(device, dtype, **request))


def refused(**request: Any) -> tuple[str, ...]:
    with pytest.raises(UnsupportedRequestError) as caught:
        build(**request)
    assert caught.value.what == "the bitsandbytes quantizer cannot honour this request."
    assert caught.value.fix == FIX
    assert caught.value.why == "; ".join(caught.value.reasons)
    return tuple(caught.value.reasons)


def tensors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*size, generator=generator) for size in ((OUT, IN), (OUT,), (5, IN)))  # type: ignore[return-value]


# What is refused


@pytest.mark.parametrize(
    ("variant", "options", "reason"),
    [
        (None, {"block_size": 48}, "block_size=48 makes no sense; it may be 32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ("fp4", {"block_size": True}, "block_size=True makes no sense; it may be 32, 64, 128, 256, 512, 1024, 2048, 4096"),
        ("nf4", {"double_quant": 1}, "double_quant=1 makes no sense; it may be True or False"),
        ("nf4", {"compute_dtype": torch.float16},
         "compute_dtype=torch.float16 makes no sense; it may be float32, bfloat16, float16"),
        ("int8", {"threshold": -1.0}, "threshold=-1.0 makes no sense; it may be any number from 0"),
        ("int8", {"threshold": float("nan")}, "threshold=nan makes no sense; it may be any number from 0"),
        ("nf4", {"threshold": 6.0}, "option 'threshold' is for int8, nf4 has none such"),
        ("int8", {"double_quant": True}, "option 'double_quant' is for nf4 and fp4, int8 has none such"),
        ("int8", {"blocksize": 64}, "option 'blocksize' is unknown, int8 has none such"),
        ("int4", {}, "variant 'int4' is unknown; there are nf4, fp4, int8"),
        ("", {}, "variant '' is unknown; there are nf4, fp4, int8"),
    ],
)  # fmt: skip
def test_what_a_variant_has_not_is_refused(variant: str | None, options: dict[str, Any], reason: str) -> None:
    assert refused(variant=variant, options=tuple(options.items())) == (reason,)


def test_every_reason_is_given_at_once() -> None:
    options = (("threshold", 6.0), ("double_quant", "yes"))
    reasons = refused(dtype="float64", device="mps", variant="nf4", options=options)
    assert reasons == (
        "option 'threshold' is for int8, nf4 has none such",
        "double_quant='yes' makes no sense; it may be True or False",
        "compute dtype float64 has no product in bitsandbytes; float32, bfloat16, float16 have",
        "device mps was not tried; cpu and cuda are",
    )


def test_packed_weights_take_no_variant_and_no_options() -> None:
    config = build(variant="fp4").config()
    assert refused(config=config, variant="nf4", options=(("double_quant", True),)) == (
        "option 'double_quant' is given for weights that are packed already",
        "variant 'nf4' is given for weights that are packed already",
    )


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    whole = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return whole(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    compiler = torch.compile
    with pytest.raises(UnsupportedRequestError) as caught:
        build(variant="int8")
    assert caught.value.what == "bitsandbytes cannot compute int8 layers on cpu here."
    assert caught.value.why == "the package bitsandbytes cannot be imported (No module named 'bitsandbytes')"
    assert caught.value.fix == "Run pip install 'bitsandbytes>=0.50,<0.51', or load the model without it."
    assert torch.compile is compiler
    assert "kernels" not in sys.modules or sys.modules["kernels"] is not None


def test_an_operator_that_the_installed_version_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    monkeypatch.setitem(library.OPERATORS, "nf4", ("gemm_4bit", "gemm_2bit"))
    with pytest.raises(UnsupportedRequestError) as caught:
        build()
    assert caught.value.reasons == ("this bitsandbytes has no gemm_2bit for cpu",)


def test_a_native_library_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    from bitsandbytes import cextension

    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("broken"))
    with pytest.raises(UnsupportedRequestError) as caught:
        build()
    (reason,) = caught.value.reasons
    assert reason == "the native library of bitsandbytes cannot be loaded; python -m bitsandbytes says why"


# Configs


@pytest.mark.parametrize(
    ("change", "key", "why"),
    [
        ({"load_in_4bit": False}, "load_in_4bit", "one of load_in_4bit and load_in_8bit must be true."),
        ({"load_in_8bit": True}, "load_in_4bit", "one of load_in_4bit and load_in_8bit must be true."),
        ({"_load_in_4bit": False}, "load_in_4bit", "_load_in_4bit says False."),
        ({"bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type", "it may be nf4, fp4."),
        ({"bnb_4bit_compute_dtype": "float64"}, "bnb_4bit_compute_dtype", "it may be float32, bfloat16, float16."),
        ({"bnb_4bit_use_double_quant": None}, "bnb_4bit_use_double_quant", "it may be True, False."),
        ({"bnb_4bit_quant_storage": "int4"}, "bnb_4bit_quant_storage",
         "it may be uint8, int8, float16, bfloat16, float32, float64."),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight", "it may be False."),
        ({"llm_int8_threshold": "6"}, "llm_int8_threshold", "it may be any number from 0."),
        ({"llm_int8_skip_modules": "lm_head"}, "llm_int8_skip_modules", "it may be a list of names."),
        ({"bnb_4bit_rotation": 3}, "bnb_4bit_rotation", "this package does not know what it means."),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_honoured_is_refused(change: dict[str, Any], key: str, why: str) -> None:
    config = {**build().config(), **change}
    with pytest.raises(ConfigError) as caught:
        build(config=config)
    assert caught.value.what == (
        f"quantization_config has {key}={config[key]!r}, with which these weights cannot be read."
    )
    assert caught.value.why == why
    assert caught.value.key == f"quantization_config.{key}"
    assert "quantizer='bitsandbytes:nf4'" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("variant", "options"),
    [("nf4", {"double_quant": True}), ("fp4", {}), ("int8", {"threshold": 2.5}), ("int8", {"threshold": 2})],
)
def test_a_config_says_again_what_was_asked_for(variant: str, options: dict[str, Any]) -> None:
    config = build("bfloat16", variant=variant, options=tuple(options.items())).config()
    assert build("float16", config={**config, "_load_in_4bit": variant != "int8"}).config() == config
    assert type(config["llm_int8_threshold"]) is float


# What a file holds


@pytest.mark.parametrize(
    ("present", "names"),
    [
        (("weight", "bias"), ()),
        (("weight", "SCB", "weight_format"), ("weight", "SCB", "weight_format")),
        (("weight", "SCB", "bias"), ("weight", "SCB", "weight_format", "bias")),
        (("SCB",), ("weight", "SCB", "weight_format")),
    ],
)
def test_a_layer_is_plain_if_nothing_lies_beside_its_weight(present: Sequence[str], names: tuple[str, ...]) -> None:
    assert build(variant="int8").stored_names(LAYER, "model.layers.0.mlp.up_proj", frozenset(present)) == names


def test_the_head_stays_plain_unless_a_file_has_it_packed() -> None:
    writer = build()
    assert writer.refusal("head", IN, OUT) == "the head stays in full precision"
    assert build(config=writer.config()).refusal("head", IN, OUT) is None


def test_an_odd_row_is_left_alone_by_four_bits_and_not_by_eight() -> None:
    assert build().refusal(LAYER, 7, 6) == "7 columns do not fill whole bytes of 4-bit codes"
    assert build(variant="int8").refusal(LAYER, 7, 6) is None


def changed(kind: str, blob: bool, change: Any) -> Any:
    """Pack, change a tensor or what the JSON says, and read again; the reader knows the layer's size."""
    weight, bias, _ = tensors()
    options = () if kind == "int8" else (("double_quant", True),)
    writer = build(variant=kind, options=options)
    packed = writer.pack(writer.quantize(LAYER, weight, bias))
    if blob:
        name = f"weight.quant_state.bitsandbytes__{kind}"
        facts = {**json.loads(bytes(packed[name].tolist())), **change}
        packed[name] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    else:
        packed = {**packed, **change}
    reader = build(config=writer.config())
    assert reader.refusal(LAYER, IN, OUT) is None
    return reader.unpack(LAYER, packed)


BLOB = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("kind", "blob", "change", "name", "found"),
    [
        ("nf4", True, {"quant_type": "fp4"}, BLOB, "quant_type is 'fp4'"),
        ("nf4", True, {"blocksize": 63}, BLOB, "blocksize is 63"),
        ("nf4", True, {"dtype": "int8"}, BLOB, "dtype is 'int8'"),
        ("nf4", True, {"shape": [IN, OUT]}, BLOB, "shape is [80, 24], the layer is [24, 80]"),
        ("nf4", True, {"shape": [24]}, BLOB, "shape is [24]"),
        ("nf4", True, {"nested_blocksize": 128}, BLOB, "nested_blocksize is 128"),
        ("nf4", True, {"nested_dtype": "float16"}, BLOB, "nested_dtype is 'float16'"),
        ("nf4", True, {"nested_offset": None}, BLOB, "nested_offset is None"),
        ("nf4", True, {"axis": 0}, BLOB, "axis is unknown"),
        ("nf4", False, {BLOB: torch.zeros(3, dtype=torch.uint8)}, BLOB,
         "it is no JSON: Expecting value: line 1 column 1 (char 0)"),
        ("nf4", False, {BLOB: torch.tensor([52], dtype=torch.uint8)}, BLOB, "it is no table of JSON"),
        ("nf4", False, {BLOB: torch.zeros(3)}, BLOB, "it is torch.float32 [3], not bytes of JSON"),
        ("nf4", False, {"weight": torch.zeros(959, 1, dtype=torch.uint8)}, "weight",
         "it is torch.uint8 [959, 1], not 960 bytes for 24 x 80 codes"),
        ("nf4", False, {"weight": torch.zeros(240, dtype=torch.int32)}, "weight",
         "it is torch.int32 [240], not 960 bytes for 24 x 80 codes"),
        ("nf4", False, {"weight.absmax": torch.zeros(30)}, "weight.absmax",
         "it is torch.float32 [30], not torch.uint8 [30]"),
        ("nf4", False, {"weight.nested_absmax": torch.zeros(2)}, "weight.nested_absmax",
         "it is torch.float32 [2], not torch.float32 [1]"),
        ("nf4", False, {"weight.quant_map": torch.linspace(-1, 1, 16)}, "weight.quant_map",
         "its values are not those of nf4"),
        ("nf4", False, {"weight.nested_quant_map": torch.linspace(-1, 1, 256)}, "weight.nested_quant_map",
         "its values are not those of nf4"),
        ("nf4", False, {"bias": torch.zeros(23)}, "bias", "it is torch.float32 [23], not floating point [24]"),
        ("int8", False, {"weight": torch.zeros(24, 80)}, "weight",
         "it is torch.float32 [24, 80], not torch.int8 [24, 80]"),
        ("int8", False, {"weight": torch.zeros(24, 79, dtype=torch.int8)}, "weight",
         "it is torch.int8 [24, 79], not torch.int8 [24, 80]"),
        ("int8", False, {"SCB": torch.zeros(24).half()}, "SCB", "it is torch.float16 [24], not torch.float32 [24]"),
        ("int8", False, {"weight_format": torch.tensor(1)}, "weight_format", "it is 1, not 0 (rows)"),
        ("int8", False, {"bias": torch.zeros(24, dtype=torch.int8)}, "bias",
         "it is torch.int8 [24], not floating point [24]"),
    ],
)  # fmt: skip
def test_damaged_tensors_are_named(kind: str, blob: bool, change: Any, name: str, found: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        changed(kind, blob, change)
    assert caught.value.what == f"the packed weight of {LAYER!r} cannot be read: {name}: {found}."
    assert str(caught.value.why).startswith("quantization_config says bitsandbytes")
    assert caught.value.fix == "Get the file again, or save the model again from its plain weights."
    assert caught.value.tensor == f"{LAYER}.{name}"


def test_codes_may_be_stored_as_any_dtype() -> None:
    weight, bias, x = tensors()
    writer = build()
    module = writer.quantize(LAYER, weight, bias)
    packed = writer.pack(module)
    stored = {**packed, "weight": packed["weight"].view(-1).view(torch.bfloat16)[:, None]}
    again = build(config={**writer.config(), "bnb_4bit_quant_storage": "bfloat16"}).unpack(LAYER, stored)
    assert torch.equal(again(x), module(x))


# What is computed


def test_blocks_of_another_size_are_read_back_from_the_file() -> None:
    weight, _, x = tensors()
    writer = build(variant="fp4", options=(("block_size", 32),))
    module = writer.quantize(LAYER, weight, None)
    packed = writer.pack(module)
    assert packed["weight.absmax"].shape == (OUT * IN // 32,)
    reader = build(config=writer.config())
    assert reader.bits == 4.5
    assert torch.equal(reader.unpack(LAYER, packed)(x), module(x))
    assert reader.bits == writer.bits == 5.0


def test_scales_of_scales_cost_less_and_change_little() -> None:
    weight, _, x = tensors()
    plain, double = build(), build(options=(("double_quant", True),))
    assert (plain.bits, round(double.bits, 3)) == (4.5, 4.127)
    one, two = plain.quantize(LAYER, weight, None)(x), double.quantize(LAYER, weight, None)(x)
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, atol=0.02 * float(one.abs().max()), rtol=0)


def test_a_file_computes_in_the_dtype_of_its_config_and_answers_in_its_input_s() -> None:
    weight, bias, x = tensors()
    writer = build("bfloat16")
    packed = writer.pack(writer.quantize(LAYER, weight.bfloat16(), bias.bfloat16()))
    y = build("float32", config=writer.config()).unpack(LAYER, packed)(x)
    assert y.dtype is torch.float32
    assert torch.equal(y, writer.unpack(LAYER, packed)(x.bfloat16()).float())


def test_the_compute_dtype_may_differ_from_that_of_the_model() -> None:
    weight, bias, x = (t.bfloat16() for t in tensors())
    module = build("bfloat16", options=(("compute_dtype", "float32"),)).quantize(LAYER, weight, bias)
    y, plain = module(x), build("bfloat16").quantize(LAYER, weight, bias)(x)
    want = build("float32").quantize(LAYER, weight, bias)(x.float())
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, want.bfloat16())
    assert not torch.equal(y, plain)


def test_no_tokens_give_no_outputs_and_strides_do_not_matter() -> None:
    weight, bias, x = tensors()
    for variant in ("nf4", "int8"):
        module = build(variant=variant).quantize(LAYER, weight, bias)
        assert module(x[:0]).shape == (0, OUT)
        assert torch.equal(module(x.T.contiguous().T), module(x))


def test_large_inputs_are_multiplied_in_full_precision() -> None:
    weight, _, x = tensors()
    x[2, 7] = 300.0  # 127 steps up to here would leave nothing of the others
    errors = []
    for threshold in (0.0, 6.0):
        quantizer = build(variant="int8", options=(("threshold", threshold),))
        before = x.clone()
        module = quantizer.quantize(LAYER, weight, None)
        y = module(x)
        assert torch.equal(x, before)
        packed = quantizer.pack(module)
        want = x.double() @ (packed["weight"].double() * packed["SCB"].double()[:, None] / 127).T
        errors.append(float((y - want)[2].abs().max()))
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["nf4", "fp4", "int8"])
def test_a_gpu_computes_what_the_cpu_does(variant: str) -> None:
    weight, bias, x = (t.half() for t in tensors())
    writer = build("float16", variant=variant)
    module = writer.quantize(LAYER, weight, bias)
    reader = build("float16", device="cuda", config=writer.config())
    there = reader.unpack(LAYER, writer.pack(module)).to("cuda")
    torch.testing.assert_close(there(x.cuda()).cpu(), module(x), rtol=1e-2, atol=2e-2)
