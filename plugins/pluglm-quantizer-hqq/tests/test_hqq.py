"""What is special to hqq and needs no package of that name: settings, configs, files."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pluglm_quantizer_hqq
import pytest
import torch
from pluglm_quantizer_hqq import codes, settings
from pluglm_quantizer_hqq.layer import BESIDE, NEEDED, HqqLinear, make
from pluglm_quantizer_hqq.settings import Grid

from pluglm import CheckpointError, ConfigError, UnsupportedRequestError
from pluglm.contracts import GroupedLinear, QuantizerRequest

LAYER = "layers.0.mlp.up"
OUT, IN = 24, 80
FIX = 'Write quantizer="hqq" or "hqq:int4", ":int8", …; its README lists the options.'
PARAMETERS = {
    "nbits": 2, "channel_wise": True, "group_size": 16, "optimize": True, "round_zero": False, "axis": 0,
    "view_as_float": False,
}  # fmt: skip
ENTRY = {
    "weight_quant_params": PARAMETERS, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False,
}  # fmt: skip


def build(dtype: str = "float32", device: str = "cpu", **request: Any) -> Any:
    return pluglm_quantizer_hqq.pluglm_build_quantizer(request=QuantizerRequest(device, dtype, **request))


def reader(dtype: str = "float32") -> Any:
    return build(dtype, config={"quant_method": "hqq", "quant_config": ENTRY})


@pytest.fixture
def packer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`build`, where packing passes for possible: these tests pack nothing."""
    monkeypatch.setattr(settings, "missing", lambda: None)
    return build


def refused(**request: Any) -> UnsupportedRequestError:
    with pytest.raises(UnsupportedRequestError) as caught:
        build(**request)
    assert caught.value.what == "the hqq quantizer cannot honour this request."
    assert caught.value.why == "; ".join(caught.value.reasons)
    return caught.value


# What is refused


@pytest.mark.parametrize(
    ("variant", "options", "reason"),
    [
        ("int5", {}, "variant 'int5' is unknown; there are int1, int2, int3, int4, int8"),
        ("4", {}, "variant '4' is unknown; there are int1, int2, int3, int4, int8"),
        (None, {"bits": 4}, "option 'bits' is unknown; there are group_size, axis, modules"),
        (None, {"group_size": 12},
         "group_size=12 makes no sense; it may be a multiple of 8, or None for whole rows or columns"),
        (None, {"group_size": 0},
         "group_size=0 makes no sense; it may be a multiple of 8, or None for whole rows or columns"),
        ("int2", {"axis": True}, "axis=True makes no sense; it may be 0 or 1"),
        (None, {"axis": -1}, "axis=-1 makes no sense; it may be 0 or 1"),
        (None, {"modules": ["*.q"]}, "modules=['*.q'] makes no sense; it may be a table of patterns and their settings"),
        (None, {"modules": {"*.q": 2}}, "modules['*.q']=2 makes no sense; it may set bits, group_size and axis"),
        (None, {"modules": {"*.q": {"nbits": 2}}},
         "modules['*.q']={'nbits': 2} makes no sense; it may set bits, group_size and axis"),
        (None, {"modules": {"*.q": {"bits": 6}}}, "modules['*.q']: bits=6 makes no sense; it may be 1, 2, 3, 4, 8"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(variant: str | None, options: dict[str, Any], reason: str) -> None:
    error = refused(variant=variant, options=tuple(options.items()))
    assert error.reasons == (reason,)
    assert error.fix == FIX


def test_every_reason_is_given_at_once() -> None:
    assert refused(dtype="float64", device="mps", variant="int7", options=(("axis", 2), ("nbits", 1))).reasons == (
        "option 'nbits' is unknown; there are group_size, axis, modules",
        "variant 'int7' is unknown; there are int1, int2, int3, int4, int8",
        "axis=2 makes no sense; it may be 0 or 1",
        "compute dtype float64 is none of this package's; float32, bfloat16, float16 are",
        "device mps was not tried; cpu and cuda are",
    )


def test_packed_weights_take_no_variant_and_no_options() -> None:
    error = refused(config=reader().config(), variant="int4", options=(("axis", 1),))
    assert error.reasons == (
        "option 'axis' is given for weights that are packed already",
        "variant 'int4' is given for weights that are packed already",
    )


def test_without_the_package_nothing_is_packed_and_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "hqq"]:
        monkeypatch.delitem(sys.modules, name)
    whole = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "hqq":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return whole(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    error = refused()
    assert error.reasons == ("packing needs the package hqq (No module named 'hqq.core.optimize')",)
    assert error.fix == (
        'Run DISABLE_CUDA=1 pip install "pluglm-quantizer-hqq[hqq]", or load a model that is packed already.'
    )
    assert reader().bits > 0  # which needs no package


# Which layers


@pytest.mark.parametrize(
    ("variant", "options", "size", "reason"),
    [
        ("int4", {}, (24, 80), "80 columns are not made of groups of 64"),
        ("int4", {"group_size": 16}, (24, 80), None),
        ("int4", {"group_size": None}, (24, 80), None),
        ("int4", {"group_size": None}, (23, 80), "23 rows of codes do not fill bytes of 2 codes"),
        ("int1", {"group_size": 80}, (12, 80), "12 rows of codes do not fill bytes of 8 codes"),
        ("int3", {"group_size": 80}, (7, 80), None),
        ("int2", {"axis": 0, "group_size": 64}, (10, 12), "10 x 12 weights are not made of groups of 64"),
        ("int2", {"axis": 0, "group_size": 16}, (10, 32), None),
        ("int2", {"axis": 0, "group_size": None}, (10, 32), "10 rows of codes do not fill bytes of 4 codes"),
    ],
)
def test_a_layer_that_does_not_fit_the_groups_is_left_alone(
    packer: Any, variant: str, options: dict[str, Any], size: tuple[int, int], reason: str | None
) -> None:
    assert packer(variant=variant, options=tuple(options.items())).refusal(LAYER, size[1], size[0]) == reason


def test_modules_have_settings_of_their_own_and_the_first_pattern_counts(packer: Any) -> None:
    modules = {"*.mlp.*": {"bits": 2, "group_size": 16}, "*.up": {"bits": 8}, "*.attn.q": {"axis": 0}}
    quantizer = packer(variant="int4", options=(("group_size", 64), ("modules", modules)))
    assert quantizer.refusal(LAYER, 80, 24) is None
    assert quantizer.refusal("layers.0.attn.k", 80, 24) == "80 columns are not made of groups of 64"
    of = quantizer._settings.of
    assert (of(LAYER), of("layers.1.attn.q"), of("x.up")) == (Grid(2, 16, 1), Grid(4, 64, 0), Grid(8, 64, 1))


def test_the_head_stays_plain_unless_a_file_has_it_packed(packer: Any) -> None:
    assert packer().refusal("head", 64, 100) == "the head stays in full precision"
    assert reader().refusal("head", 64, 100) is None


# Configs


@pytest.mark.parametrize(
    ("config", "key", "why"),
    [
        ({"quant_config": None}, "quant_config", "it may be a table of settings."),
        ({"quant_config": {}}, "quant_config", "it may be a table of settings."),
        ({"quant_config": ENTRY, "bits": 4}, "bits", "this package does not know what it means."),
        ({"quant_config": ENTRY, "skip_modules": "lm_head"}, "skip_modules", "it may be a list of names."),
        ({"quant_config": {**ENTRY, "offload_meta": True}}, "quant_config.offload_meta",
         "scales and zeros that are packed in turn are not read."),
        ({"quant_config": {"self_attn.q_proj": {**ENTRY, "zero_quant_params": {"nbits": 8}}}},
         "quant_config.self_attn.q_proj.zero_quant_params", "scales and zeros that are packed in turn are not read."),
        ({"quant_config": {"mlp.up_proj": 4}}, "quant_config.mlp.up_proj",
         "it may be a table with weight_quant_params."),
        ({"quant_config": {**ENTRY, "weight_quant_params": {**PARAMETERS, "channel_wise": False}}},
         "quant_config.channel_wise", "one scale for a whole weight is not read."),
        ({"quant_config": {**ENTRY, "weight_quant_params": {**PARAMETERS, "rotate": 1}}}, "quant_config.rotate",
         "this package does not know what it means."),
        ({"quant_config": {**ENTRY, "weight_quant_params": {**PARAMETERS, "nbits": 5}}},
         "quant_config.weight_quant_params", "bits=5 makes no sense; it may be 1, 2, 3, 4, 8."),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_honoured_is_refused(config: dict[str, Any], key: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(config={"quant_method": "hqq", **config})
    assert caught.value.what.startswith(f"quantization_config has {key}=")
    assert caught.value.what.endswith(", with which these weights cannot be read.")
    assert caught.value.why == why
    assert caught.value.key == f"quantization_config.{key}"
    assert caught.value.fix == "Correct config.json, or load the plain weights and pack them with quantizer='hqq'."


def test_a_config_says_again_what_was_asked_for(packer: Any) -> None:
    writer = packer(variant="int2", options=(("axis", 0), ("group_size", 16)))
    config = writer.config()
    assert config == {"quant_method": "hqq", "quant_config": ENTRY, "skip_modules": ["lm_head"]}
    assert build(config={**config, "skip_modules": ["lm_head", "k_proj"]}).config()["skip_modules"][1:] == ["k_proj"]
    tagged = {"self_attn.q_proj": None, "mlp.up_proj": ENTRY}
    assert build(config={**config, "quant_config": tagged}).config()["quant_config"] == ENTRY
    assert writer.bits == 2 + 2 * 32 / 16


# Files


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_lie_with_the_first_rows_in_the_highest_bits(bits: int) -> None:
    rows = 40 if bits != 3 else 23
    whole = torch.randint(1 << bits, (rows, 3), generator=torch.Generator().manual_seed(bits))
    packed = codes.pack(whole.float(), bits)
    assert packed.dtype is (torch.int32 if bits == 3 else torch.uint8)
    assert packed.shape == (-(-rows // codes.PER[bits]), 3)
    assert torch.equal(codes.unpack(packed, bits, rows).long(), whole)
    assert int(packed[0, 0]) >> bits * (codes.PER[bits] - 1) == int(whole[0, 0])
    assert int(packed[-1, 2]) & (1 << bits) - 1 == (int(whole[-1, 2]) if bits != 3 else 0)


def layer(grid: Grid, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> HqqLinear:
    """A layer of any numbers: nothing is rounded."""
    generator = torch.Generator().manual_seed(grid.bits)
    groups = OUT * IN // (grid.group_size or 1)
    shape = (groups, grid.group_size or 1) if grid.axis == 1 else (grid.group_size or 1, groups)
    one = (groups, 1) if grid.axis == 1 else (1, groups)
    whole = torch.randint(1 << grid.bits, shape, generator=generator)
    scale, zero = (torch.rand(one, generator=generator).to(dtype) for _ in range(2))
    shift = torch.randn(OUT, generator=generator).to(dtype) if bias else None
    return make(codes.pack(whole, grid.bits), scale, zero * (1 << grid.bits), shift, grid, (OUT, IN))


@pytest.mark.parametrize("grid", [Grid(8, 16, 1), Grid(4, 40, 1), Grid(3, 8, 1), Grid(2, 80, 1), Grid(1, 16, 1)])
def test_groups_within_rows_are_offered_to_other_code(grid: Grid) -> None:
    module = layer(grid)
    assert isinstance(module, GroupedLinear)
    weight = module.grouped()
    assert (weight.bits, weight.group_size, weight.codes.dtype) == (grid.bits, grid.group_size, torch.uint8)
    assert weight.scale.shape == (OUT, IN // (grid.group_size or 1))
    torch.testing.assert_close(weight.dense(), module.dense(), rtol=1e-5, atol=1e-5)
    assert module.grouped_bias() is module.shift


@pytest.mark.parametrize("grid", [Grid(4, 16, 0), Grid(4, 160, 1), Grid(4, 48, 1)])
def test_groups_of_another_kind_are_not_offered(grid: Grid) -> None:
    assert not isinstance(layer(grid), GroupedLinear)


def test_columns_of_the_first_axis_are_as_far_apart_as_groups_are_many() -> None:
    module = layer(Grid(2, 16, 0))
    whole = codes.unpack(module.packed, 2, 16)  # [16, groups]
    groups = OUT * IN // 16
    at = 3 * groups + 7
    want = (float(whole[3, 7]) - float(module.zero[0, 7])) * float(module.scale[0, 7])
    assert float(module.dense().flatten()[at]) == pytest.approx(want)


@pytest.mark.parametrize("bits", [2, 3])
def test_codes_may_be_stored_as_floating_point(bits: int) -> None:
    quantizer, module = reader(), layer(Grid(bits, 16, 1))
    packed = quantizer.pack(module)
    stored = {**packed, "W_q": packed["W_q"].view(torch.float32 if bits == 3 else torch.float16)}
    stored["view_as_float"] = torch.tensor(1, dtype=torch.uint8)
    x = torch.randn(5, IN)
    assert torch.equal(quantizer.unpack(LAYER, stored)(x), module(x))


def test_a_file_of_one_dtype_runs_in_another() -> None:
    module = layer(Grid(4, 16, 1), dtype=torch.float16)
    again = reader("bfloat16").unpack(LAYER, reader().pack(module))
    x = torch.randn(5, IN)
    y = again(x.bfloat16())
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), module(x.half()).float(), rtol=5e-2, atol=5e-1)


@pytest.mark.parametrize(
    ("present", "names"),
    [
        ({"weight", "bias"}, ()),
        ({*NEEDED, *BESIDE, "bias"}, {*NEEDED, *BESIDE, "bias"}),
        ({*NEEDED, "channel_wise"}, {*NEEDED, "channel_wise"}),
        ({"W_q", "scale"}, {*NEEDED}),
        ({*NEEDED, "zero_q"}, {*NEEDED}),  # which the core then calls surplus
    ],
)
def test_a_layer_is_plain_if_its_weight_is(present: set[str], names: set[str]) -> None:
    assert set(reader().stored_names(LAYER, "model.layers.0.mlp.up_proj", frozenset(present))) == set(names)


def tensor(value: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "wrong", "found"),
    [
        ("W_q", torch.zeros(60, 15, dtype=torch.uint8), "it is torch.uint8 [60, 15], not torch.uint8 [60, 16]"),
        ("W_q", torch.zeros(60, 16, dtype=torch.int32), "it is torch.int32 [60, 16], not torch.uint8 [60, 16]"),
        ("scale", torch.zeros(119, 1), "it is torch.float32 [119, 1], not floating point [120, 1]"),
        ("zero", tensor([[0]] * 120), "it is torch.int32 [120, 1], not floating point [120, 1]"),
        ("bias", torch.zeros(25), "it is torch.float32 [25], not floating point [24]"),
        ("nbits", tensor(5), "it is 5, not one of 1, 2, 3, 4, 8"),
        ("nbits", torch.tensor(4.0), "it is torch.float32 [], not a whole number"),
        ("axis", tensor(2), "it is 2, not 0 or 1"),
        ("group_size", tensor(7), "it is 7, of which 24 x 80 weights are not made"),
        ("group_size", tensor(0), "it is 0, of which 24 x 80 weights are not made"),
        ("shape", tensor([IN, OUT]), "it is [80, 24], the layer is [24, 80]"),
        ("shape", tensor([OUT]), "it is [24], not [out, in]"),
        ("packing", tensor(list(b"2bit_u8"), torch.uint8), "it is '2bit_u8', not '4bit_u8'"),
        ("packing", tensor([4, 4]), "it is None, not '4bit_u8'"),
        ("quant_zero", tensor(1, torch.uint8), "it is 1, which means a layout that is not read here"),
        ("quant_scale", tensor(1, torch.uint8), "it is 1, which means a layout that is not read here"),
        ("offload_meta", tensor(1, torch.uint8), "it is 1, which means a layout that is not read here"),
        ("channel_wise", tensor(0, torch.uint8), "it is 0, which means a layout that is not read here"),
    ],
)
def test_damaged_tensors_are_named(name: str, wrong: torch.Tensor, found: str) -> None:
    quantizer = reader()
    assert quantizer.refusal(LAYER, IN, OUT) is None
    tensors = {**quantizer.pack(layer(Grid(4, 16, 1))), name: wrong}
    with pytest.raises(CheckpointError) as caught:
        quantizer.unpack(LAYER, tensors)
    assert caught.value.what == f"the packed weight of {LAYER!r} cannot be read: {name}: {found}."
    assert caught.value.why == "quantization_config says hqq."
    assert caught.value.fix == "Get the file again, or save the model again from its plain weights."
    assert caught.value.tensor == f"{LAYER}.{name}"


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_a_gpu_computes_what_the_cpu_does(bits: int) -> None:
    module, x = layer(Grid(bits, 16, 1)), torch.randn(5, IN)
    want = module(x)
    torch.testing.assert_close(module.to("cuda")(x.cuda()).cpu(), want, rtol=1e-4, atol=1e-3)
