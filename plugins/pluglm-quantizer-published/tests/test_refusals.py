"""What cannot be honoured is refused: keys of the config by name, tensors by name, before anything is computed."""

from __future__ import annotations

from typing import Any

import pluglm_quantizer_published
import pytest
import torch
from published_cases import ALL, CASES, FP8, ROUNDING
from torch import Tensor, nn

from pluglm import CheckpointError, ConfigError, UnsupportedRequestError
from pluglm.contracts import PublishedQuantizer, QuantizerRequest

LAYER = "model.layers.0.mlp.up_proj"
PROVIDERS = {name.replace("_", "-"): getattr(pluglm_quantizer_published, name)
             for name in ("gptq", "awq", "compressed_tensors", "fp8")}  # fmt: skip
GPTQ, AWQ = CASES["gptq, 4 bits"][0], CASES["awq, gemm"][0]
PACKED, DYNAMIC = CASES["compressed-tensors, 4 bits"][0], ROUNDING["int8 by row, int8 tokens"][0]
DEEPSEEK = FP8["fp8, ragged blocks"][0]


def build(config: Any, **request: Any) -> Any:
    provider = PROVIDERS[config["quant_method"]]
    return provider.pluglm_build_quantizer(request=QuantizerRequest("cpu", "float32", config=config, **request))


def changed(config: dict[str, Any], part: str, **keys: Any) -> dict[str, Any]:
    """A compressed-tensors config with other keys in its group, or in a part of the group."""
    group = dict(config["config_groups"]["group_0"])
    group = group | keys if part == "" else group | {part: {**group[part], **keys}}
    return {**config, "config_groups": {"group_0": group}}


REFUSED = {
    "quantization_config.bits": [GPTQ | {"bits": 5}, GPTQ | {"bits": None}, GPTQ | {"bits": True}, AWQ | {"bits": 8}],
    "quantization_config.group_size": [GPTQ | {"group_size": 0}, GPTQ | {"group_size": "32"}, AWQ | {"group_size": -2}],
    "quantization_config.checkpoint_format": [GPTQ | {"checkpoint_format": "marlin"}],
    "quantization_config.is_marlin_format": [GPTQ | {"is_marlin_format": True}],
    "quantization_config.pack_dtype": [GPTQ | {"pack_dtype": "int16"}],
    "quantization_config.desc_act": [GPTQ | {"desc_act": "yes"}, AWQ | {"desc_act": True}],
    "quantization_config.adapter": [GPTQ | {"adapter": {"name": "lora"}}],
    "quantization_config.surprise": [GPTQ | {"surprise": 1}, AWQ | {"surprise": 1}, DEEPSEEK | {"surprise": 1}],
    "quantization_config.dynamic": [GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, GPTQ | {"dynamic": 3}],
    "quantization_config.dynamic.+:x": [GPTQ | {"dynamic": {"+:x": 8}}],
    "quantization_config.dynamic.+:x.bits": [GPTQ | {"dynamic": {"+:x": {"bits": 6}}}],
    "quantization_config.dynamic.+:x.surprise": [GPTQ | {"dynamic": {"+:x": {"surprise": 6}}}],
    "quantization_config.version": [AWQ | {"version": "gemv_fast"}, AWQ | {"version": "marlin"}],
    "quantization_config.zero_point": [AWQ | {"zero_point": False}],
    "quantization_config.format": [
        {**changed(PACKED, "", format=None), "format": "nvfp4-pack-quantized"}, changed(PACKED, "", format="marlin-24"),
    ],
    "quantization_config.quantization_status": [PACKED | {"quantization_status": "calibration"}],
    "quantization_config.kv_cache_scheme": [PACKED | {"kv_cache_scheme": {"num_bits": 8}}],
    "quantization_config.sparsity_config.format": [PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}],
    "quantization_config.transform_config": [PACKED | {"transform_config": {"config_groups": {"a": {}}}}],
    "quantization_config.config_groups": [PACKED | {"config_groups": {}}],
    "quantization_config.ignore": [PACKED | {"ignore": ["re:("]}, PACKED | {"ignore": "lm_head"}],
    "quantization_config.config_groups.group_0.weights": [changed(PACKED, "", weights=None)],
    "quantization_config.config_groups.group_0.output_activations": [
        changed(PACKED, "", output_activations={"num_bits": 8})
    ],
    "quantization_config.config_groups.group_0.surprise": [changed(PACKED, "", surprise=1)],
    "quantization_config.config_groups.group_0.weights.num_bits": [changed(PACKED, "weights", num_bits=9)],
    "quantization_config.config_groups.group_0.weights.type": [changed(PACKED, "weights", type="float")],
    "quantization_config.config_groups.group_0.weights.group_size": [
        changed(PACKED, "weights", group_size=None), changed(PACKED, "weights", strategy="channel")
    ],
    "quantization_config.config_groups.group_0.weights.strategy": [
        changed(PACKED, "weights", strategy="tensor_group"),
        changed(PACKED, "weights", strategy="block", group_size=None, block_structure=[2, 2]),
        changed(PACKED, "weights", strategy="tensor", group_size=None, symmetric=False),
    ],
    "quantization_config.config_groups.group_0.weights.block_structure": [
        changed(DYNAMIC, "weights", strategy="block", block_structure=[0, 2]),
    ],
    "quantization_config.config_groups.group_0.weights.actorder": [changed(DYNAMIC, "weights", actorder="group")],
    "quantization_config.config_groups.group_0.weights.surprise": [changed(PACKED, "weights", surprise=1)],
    "quantization_config.config_groups.group_0.input_activations.strategy": [
        changed(DYNAMIC, "input_activations", strategy="tensor"),
        changed(DYNAMIC, "input_activations", dynamic=False),
    ],
    "quantization_config.config_groups.group_0.input_activations.dynamic": [
        changed(DYNAMIC, "input_activations", dynamic="local"),
    ],
    "quantization_config.config_groups.group_0.input_activations.num_bits": [
        changed(DYNAMIC, "input_activations", num_bits=16),
    ],
    "quantization_config.fmt": [DEEPSEEK | {"fmt": "e5m2"}],
    "quantization_config.scale_fmt": [DEEPSEEK | {"scale_fmt": "e4m3"}],
    "quantization_config.activation_scheme": [DEEPSEEK | {"activation_scheme": s} for s in ("none", "static")],
    "quantization_config.weight_block_size": [DEEPSEEK | {"weight_block_size": b} for b in ([128], [0, 2], 128)],
    "quantization_config.modules_to_convert": [DEEPSEEK | {"modules_to_convert": ["embed_tokens"]}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "config"), [(key, config) for key, configs in REFUSED.items() for config in configs], ids=str
)
def test_a_setting_that_cannot_be_honoured_is_refused_by_its_key(key: str, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build(config)
    assert caught.value.key == key
    assert caught.value.what.startswith(f"{key} cannot be honoured: ")
    assert caught.value.why
    assert "config.json" in caught.value.fix


def test_the_message_of_a_refused_setting_says_what_why_and_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        build(GPTQ | {"bits": 5})
    assert caught.value.what == "quantization_config.bits cannot be honoured: it is 5."
    assert caught.value.why == "known are 2, 3, 4, 8."
    assert caught.value.fix == (
        "Correct config.json if it is wrong, or use a copy of the model that is packed otherwise or not at all."
    )


@pytest.mark.parametrize("config", [GPTQ, AWQ, PACKED, DEEPSEEK], ids=lambda config: config["quant_method"])
def test_variants_options_and_unknown_dtypes_are_refused_together(config: dict[str, Any]) -> None:
    provider = PROVIDERS[config["quant_method"]]
    request = QuantizerRequest("cpu", "int8", config=config, variant="fast", options=(("speed", 1),))
    with pytest.raises(UnsupportedRequestError) as caught:
        provider.pluglm_build_quantizer(request=request)
    assert [reason.split()[0] for reason in caught.value.reasons] == ["option", "variant", "compute"]
    assert caught.value.fix == "Load the folder without naming a quantizer."


def tensors_of(name: str) -> dict[str, Tensor]:
    tensors, _ = ALL[name][1](96, 64, 1)
    return {short: tensor.contiguous() for short, tensor in tensors.items()} | {"bias": torch.zeros(96).half()}


def read(name: str, tensors: dict[str, Tensor], *, sizes: tuple[int, int] = (64, 96)) -> nn.Module:
    """As the core does it: sizes, names, tensors."""
    quantizer = build(ALL[name][0])
    assert quantizer.refusal("layers.0.mlp.up", *sizes) is None
    names = quantizer.stored_names("layers.0.mlp.up", LAYER, frozenset(tensors))
    assert set(names) >= set(tensors)
    assert quantizer.tensor_names("layers.0.mlp.up") == names
    module: nn.Module = quantizer.unpack("layers.0.mlp.up", tensors)
    return module


@pytest.mark.parametrize("name", ALL)
def test_what_is_read_is_packed_again_as_it_was(name: str) -> None:
    tensors = tensors_of(name)
    quantizer = build(ALL[name][0])
    assert isinstance(quantizer, PublishedQuantizer)
    packed = quantizer.pack(read(name, tensors))
    assert packed.keys() == tensors.keys()
    assert all(packed[short] is tensor for short, tensor in tensors.items())
    assert quantizer.config() == ALL[name][0]
    assert quantizer.name == ALL[name][0]["quant_method"]
    assert 2 <= quantizer.bits < 10


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_must_have_its_shape_and_dtype(name: str) -> None:
    whole = tensors_of(name)
    for short, tensor in whole.items():
        if short == "weight_shape":
            continue
        longer = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 1) if tensor.ndim else torch.zeros(2)
        for wrong in (longer.to(tensor.dtype), torch.zeros(tensor.shape, dtype=torch.bool)):
            with pytest.raises(CheckpointError) as caught:
                read(name, {**whole, short: wrong})
            assert caught.value.what.startswith(f"the packed tensor {caught.value.tensor.rpartition('.')[2]} of ")
            assert "does not fit" in caught.value.what


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_but_a_bias_must_be_there(name: str) -> None:
    whole = tensors_of(name)
    quantizer = build(ALL[name][0])
    quantizer.stored_names("layers.0.mlp.up", LAYER, frozenset(whole))
    for short in quantizer.tensor_names("layers.0.mlp.up"):
        left = {s: tensor for s, tensor in whole.items() if s != short}
        if short in ("bias", "g_idx") and name != "gptq, 4 bits, columns in no order":
            quantizer.unpack("layers.0.mlp.up", left)
        elif short != "bias":
            with pytest.raises(CheckpointError) as caught:
                quantizer.unpack("layers.0.mlp.up", left)
            assert caught.value.what == f"the packed tensor {short} of layers.0.mlp.up does not fit: it is missing."


@pytest.mark.parametrize("name", ["gptq, 4 bits", "awq, gemv", "compressed-tensors, 4 bits", "fp8, ragged blocks"])
def test_a_layer_of_other_sizes_than_the_models_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read(name, tensors_of(name), sizes=(96, 64))
    assert "it is packed from 64 columns and 96 rows, the model has 96 and 64" in caught.value.what


@pytest.mark.parametrize(
    ("name", "short"),
    [("gptq, 4 bits, columns in no order", "g_idx"),
     ("compressed-tensors, 4 bits, zero points, columns in no order", "weight_g_idx")],
)  # fmt: skip
@pytest.mark.parametrize("wrong", [-1, 2, 2**31 - 1])
def test_a_column_of_a_group_that_does_not_exist_is_refused(name: str, short: str, wrong: int) -> None:
    tensors = tensors_of(name)
    tensors[short][7] = wrong
    with pytest.raises(CheckpointError) as caught:
        read(name, tensors)
    assert f"{short} has groups from {min(wrong, 0)} to {max(wrong, 1)}, there are 2" in caught.value.what


@pytest.mark.parametrize("inputs", [None, {"type": "int", "strategy": "token", "dynamic": True}])
def test_an_order_that_was_never_set_is_the_columns_own(inputs: Any) -> None:
    """compressed-tensors writes -1 for each column then."""
    name = "compressed-tensors, 4 bits, zero points, columns in no order"
    tensors, quantizer = tensors_of(name), build(changed(ALL[name][0], "", input_activations=inputs))

    def read(index: Tensor) -> Any:
        return quantizer.unpack("layers.0.mlp.up", {**tensors, "weight_g_idx": index.int()})

    unset, own = read(torch.full((64,), -1)), read(torch.arange(64) // 32)
    assert torch.equal(unset.scaled().dense(torch.float32), own.scaled().dense(torch.float32))


@pytest.mark.parametrize(("name", "short"), [("gptq, 4 bits", "scales"), ("fp8, ragged blocks", "weight_scale_inv")])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(name: str, short: str, wrong: float) -> None:
    tensors = tensors_of(name)
    tensors[short][0, 0] = wrong
    with pytest.raises(CheckpointError, match="scales that are no numbers"):
        read(name, tensors)


def test_columns_in_an_order_must_tell_their_groups() -> None:
    name = "gptq, 4 bits, columns in no order"
    tensors = tensors_of(name)
    del tensors["g_idx"]
    quantizer = build(ALL[name][0])
    assert "g_idx" in quantizer.stored_names("layers.0.mlp.up", LAYER, frozenset(tensors))
    with pytest.raises(CheckpointError) as caught:
        quantizer.unpack("layers.0.mlp.up", tensors)
    assert caught.value.what == "the packed tensor g_idx of layers.0.mlp.up does not fit: it is missing."
    assert caught.value.tensor == "layers.0.mlp.up.g_idx"


def test_codes_that_earlier_versions_of_compressed_tensors_packed_otherwise_are_refused() -> None:
    """3 bits of 40 columns: 4 words in either layout, with another meaning."""
    config = changed(PACKED, "weights", num_bits=3, strategy="channel", group_size=None)
    quantizer = build(config)
    tensors = {"weight_packed": torch.zeros(32, 4, dtype=torch.int32), "weight_scale": torch.ones(32, 1),
               "weight_shape": torch.tensor([32, 40])}  # fmt: skip
    with pytest.raises(CheckpointError, match="40 columns of 3 bits do not fill runs of 32 codes"):
        quantizer.unpack("layers.0.mlp.up", tensors)


@pytest.mark.parametrize("shape", [[0, 64], [96, 0], [-96, 64], [96, 2**40], [96]])
def test_a_weight_shape_that_lies_is_refused(shape: list[int]) -> None:
    name = "compressed-tensors, 4 bits"
    with pytest.raises(CheckpointError):
        read(name, {**tensors_of(name), "weight_shape": torch.tensor(shape)})
    quantizer = build(ALL[name][0])  # nobody has said the model's sizes
    with pytest.raises(CheckpointError):
        quantizer.unpack("layers.0.mlp.up", {**tensors_of(name), "weight_shape": torch.tensor(shape)})


def test_a_scale_of_one_number_may_have_a_dimension_or_none() -> None:
    name = "float8 by tensor, a stored scale"
    tensors = tensors_of(name)
    scalars = {s: t.reshape(()) if s in ("weight_scale", "input_scale") else t for s, t in tensors.items()}
    one, two = read(name, tensors), read(name, scalars)
    x = torch.randn(3, 64)
    assert torch.equal(one(x), two(x))


def test_a_weight_cannot_be_packed_here() -> None:
    with pytest.raises(UnsupportedRequestError, match="gptq only reads weights"):
        build(GPTQ).quantize("layers.0.mlp.up", torch.ones(96, 64), None)
