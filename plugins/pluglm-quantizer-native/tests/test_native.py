"""What is special to the native quantizer: how it rounds, how its layer multiplies, what it says when it refuses."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from typing import Any

import pluglm_quantizer_native
import pytest
import torch
from pluglm_quantizer_native import rounding
from pluglm_quantizer_native.linear import NativeEmbedding, NativeLinear, Work
from pluglm_quantizer_native.settings import VARIANTS
from torch import Tensor

from pluglm import CheckpointError, ConfigError, PluglmError, UnsupportedRequestError
from pluglm.contracts import GroupedWeight, QuantizerRequest, RowBlocks

LAYER = "layers.0.mlp.up"
KINDS = [(variant.bits, variant.has_offset) for variant in VARIANTS.values()]


def build(dtype: str = "float32", **request: Any) -> Any:
    return pluglm_quantizer_native.pluglm_build_quantizer(request=QuantizerRequest("cpu", dtype, **request))


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def rounded(weight: Tensor, bits: int = 4, has_offset: bool = False, **how: Any) -> GroupedWeight:
    chosen = {"rounding": "search", "weighting": "even", **how}
    return rounding.rounded(LAYER, weight, bits=bits, has_offset=has_offset, **chosen)


def lost(weight: Tensor, packed: GroupedWeight) -> Tensor:
    """Squared error of each group."""
    return (weight - packed.dense()).square().view(len(weight), -1, 32).sum(-1)


# Rounding.


@pytest.mark.parametrize(("bits", "has_offset"), KINDS)
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_search_makes_no_group_worse_and_the_whole_better(bits: int, has_offset: bool, shift: float) -> None:
    weight = random(24, 160) * torch.logspace(-3, 1, 24)[:, None] + shift
    near = lost(weight, rounded(weight, bits, has_offset, rounding="nearest"))
    best = lost(weight, rounded(weight, bits, has_offset))
    assert (best <= near * (1 + 1e-3) + 1e-12).all()  # of float32 sums, in another order
    assert best.sum() < (0.95 if shift == 0 else 1) * near.sum()


def test_search_comes_close_to_the_best_of_many_more_scales() -> None:
    weight = random(8, 64)
    x, grid = weight.view(8, 2, 32), rounding.Grid(4, has_offset=False)
    least = torch.full((8, 2), torch.inf)
    top = x.abs().amax(-1, keepdim=True)
    for divisor in torch.linspace(-14, 14, 600).tolist():
        scale = rounding.half(top / divisor)
        least = least.minimum((x - grid.codes(x, scale, 0.0) * scale).square().sum(-1))
    assert lost(weight, rounded(weight)).sum() <= 1.03 * least.sum()


def test_offsets_take_up_a_mean_that_scales_cannot() -> None:
    weight = 2 + 0.1 * random(16, 64)
    assert lost(weight, rounded(weight, 4, True)).sum() < 0.05 * lost(weight, rounded(weight, 4, False)).sum()


def test_weighting_by_magnitude_favours_large_weights() -> None:
    weight = random(64, 96)
    even, by_size = rounded(weight), rounded(weight, weighting="magnitude")
    counts = weight.abs().view(64, -1, 32)
    counts = (counts + counts.square().mean(-1, keepdim=True).sqrt()).view(64, -1)
    errors = [(weight - packed.dense()).square() for packed in (even, by_size)]
    assert errors[0].sum() < errors[1].sum()
    assert (counts * errors[1]).sum() < (counts * errors[0]).sum()


@pytest.mark.parametrize(("bits", "has_offset"), KINDS)
@pytest.mark.parametrize("how", ["search", "nearest"])
def test_what_can_be_held_exactly_is(bits: int, has_offset: bool, how: str) -> None:
    low, high = -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
    codes = torch.randint(low, high + 1, (5, 96), generator=torch.Generator().manual_seed(1)).float()
    codes[:, ::32], codes[:, 1::32] = (low - 1 if has_offset else high), high
    scale = (2.0 ** torch.arange(-2, 3))[:, None]
    assert torch.equal(rounded(codes * scale, bits, has_offset, rounding=how).dense(), codes * scale)


@pytest.mark.parametrize(("bits", "has_offset"), KINDS)
@pytest.mark.parametrize("how", ["search", "nearest"])
def test_groups_without_a_range_come_back(bits: int, has_offset: bool, how: str) -> None:
    weight = torch.zeros(3, 96)
    weight[1], weight[2, 32:64], weight[0, 7] = 0.37, -5.0, 60000.0
    error = (rounded(weight, bits, has_offset, rounding=how).dense() - weight).abs()
    assert error.isfinite().all()
    assert (error <= weight.abs() * 2e-3).all()


@pytest.mark.parametrize(("bits", "has_offset"), KINDS)
def test_rows_in_slices_are_rounded_as_all_at_once(
    bits: int, has_offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(13, 64)
    whole = rounded(weight, bits, has_offset).dense()
    monkeypatch.setattr(rounding, "AT_ONCE", {"cpu": 3 * 64})
    assert torch.equal(rounded(weight, bits, has_offset).dense(), whole)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (float("nan"), "its weights are not finite."),
        (float("-inf"), "its weights are not finite."),
        (70000.0, "its largest magnitude is 7e+04, and scales and offsets are float16."),
        (1e-6, "its largest magnitude is 1e-06: scales are float16, which has no steps so small."),
    ],
)
def test_weights_that_have_no_such_form_are_refused(value: float, why: str) -> None:
    weight = torch.zeros(3, 32)
    weight[1, 5] = value
    with pytest.raises(CheckpointError) as caught:
        build().quantize(LAYER, weight, None)
    assert caught.value.what == f"the weight of {LAYER!r} cannot be packed."
    assert caught.value.why == why
    assert "leave the layer out by name" in caught.value.fix
    assert caught.value.tensor == f"{LAYER}.weight"


# The layer.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_any_work_gives_the_product_with_the_offered_weight(variant: str, dtype: str) -> None:
    compute = getattr(torch, dtype)
    grouped = rounded(random(43, 96), VARIANTS[variant].bits, VARIANTS[variant].has_offset)
    x, bias = random(5, 96, seed=1).to(compute), random(43, seed=2).to(compute)
    want = torch.nn.functional.linear(x.double(), grouped.dense().double(), bias.double())
    for product in (compute, torch.float32):
        for at_once in (1, 2 * 16 * 96, 2**18):
            layer = NativeLinear(RowBlocks.of(grouped), bias, Work(product, at_once))
            y = layer(x)
            assert y.dtype is compute
            error = float((y.double() - want).abs().max() / want.abs().max())
            assert error <= 4 * max(torch.finfo(compute).eps, 1e-6)


def test_products_are_float32_where_a_cpu_has_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, half in (("AVX2", torch.float32), ("AVX512", torch.bfloat16)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        assert Work.on("cpu", torch.bfloat16).dtype is half
        assert Work.on("cpu", torch.float16).dtype is torch.float32
        assert Work.on("cpu", torch.float64).dtype is torch.float64
        assert Work.on("cuda:0", torch.float16).dtype is torch.float16


def test_a_layer_takes_any_leading_shape_and_shows_what_it_is() -> None:
    layer = build(variant="int4").quantize(LAYER, random(20, 64), None)
    x = random(2, 3, 64)
    assert torch.equal(layer(x[1, 2]), layer(x[1, 2:3])[0])
    assert torch.equal(layer(x[:0]), torch.zeros(0, 3, 20))
    assert repr(layer) == "NativeLinear(in=64, out=20, bits=4, offset=False)"


def test_gradients_reach_the_input_and_nothing_else() -> None:
    layer = build().quantize(LAYER, random(20, 64), random(20))
    x = random(3, 64).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.grouped().dense().sum(0).expand(3, 64), atol=1e-5)


def test_eight_bits_are_much_nearer_than_the_package_declares_for_four() -> None:
    weight, x = random(96, 256), random(4, 256, seed=1)
    want = x @ weight.T
    for variant in ("int8", "int8-offset"):
        y = build(variant=variant).quantize(LAYER, weight, None)(x)
        assert float((y - want).abs().max()) <= 1e-2 * float(want.abs().max())


def test_the_weight_that_was_given_is_not_kept() -> None:
    weight = random(32, 64)
    seen = weakref.ref(weight.untyped_storage())
    layer = build().quantize(LAYER, weight, None)
    del weight
    assert seen() is None
    assert layer.codes.nbytes + layer.scale.nbytes == 32 * 64 * 8.5 / 8


def test_what_is_read_from_a_file_is_kept_where_it_lies() -> None:
    writer = build(variant="int4-offset")
    tensors = writer.pack(writer.quantize(LAYER, random(27, 64), None))
    layer = build(config=writer.config()).unpack(LAYER, tensors)
    for short in ("codes", "scale", "offset"):
        assert getattr(layer.blocks, short).data_ptr() == tensors[short].data_ptr()


@pytest.mark.parametrize(("saved", "wanted"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")])
def test_weights_that_were_packed_in_one_dtype_run_in_the_other(saved: torch.dtype, wanted: str) -> None:
    writer = build(str(saved).removeprefix("torch."))
    tensors = writer.pack(writer.quantize(LAYER, random(12, 64).to(saved), random(12, seed=1).to(saved)))
    layer, x = build(wanted, config=writer.config()).unpack(LAYER, tensors), random(3, 64, seed=2)
    compute = getattr(torch, wanted)
    assert layer.grouped_bias().dtype is layer(x.to(compute)).dtype is compute
    before = writer.unpack(LAYER, tensors)(x.to(saved)).float()
    assert torch.allclose(layer(x.to(compute)).float(), before, rtol=2e-2, atol=1e-1)


# The table.


def table(variant: str, dtype: str = "float32", rows: int = 101) -> NativeEmbedding:
    made = build(dtype, variant=variant, options=(("head", "same"),)).quantize_table("embed", random(rows, 96))
    assert isinstance(made, NativeEmbedding)
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_is_looked_up_as_its_row(variant: str, dtype: str) -> None:
    """101 rows do not fill the last block. What is looked up is float32 arithmetic, rounded once."""
    made, compute = table(variant, dtype), getattr(torch, dtype)
    rows = made(torch.arange(101))
    said = made.blocks.grouped()
    want = said.codes.double() * said.scale.double().repeat_interleave(32, dim=1)
    if said.offset is not None:
        want += said.offset.double().repeat_interleave(32, dim=1)
    assert rows.dtype is compute
    tolerance = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 2**-8}[dtype]
    assert torch.allclose(rows.double(), want, rtol=tolerance, atol=tolerance)
    assert torch.equal(made(torch.tensor(100)), rows[100])
    assert made(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 96)
    assert made(torch.tensor([[3, 100]], dtype=torch.int32)).shape == (1, 2, 96)


@pytest.mark.parametrize("token", [-1, -102, 101, 111, 112, 5000])
def test_tokens_that_the_table_lacks_are_no_rows(token: int) -> None:
    """The rows that fill the last block, 101 to 111, either."""
    with pytest.raises(IndexError):
        table("int8")(torch.tensor([3, token]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_table_multiplies_some_blocks_at_a_time(variant: str) -> None:
    made, x, bias = table(variant), random(2, 5, 96, seed=1), random(101, seed=2)
    want = torch.nn.functional.linear(x, made.grouped().dense(), bias)
    for at_once in (1, 3 * 16 * 96, 2**18):
        again = NativeEmbedding(made.blocks, Work(torch.float32, at_once), torch.float32)
        assert torch.allclose(again.project(x, bias), want, rtol=1e-5, atol=1e-5)
    assert torch.allclose(made.project(x), want - bias, rtol=1e-5, atol=1e-5)
    assert repr(table("int4")) == "NativeEmbedding(101, 96, bits=4, offset=False)"


def test_a_packed_table_of_another_size_than_the_models_is_refused() -> None:
    quantizer = build()
    tensors = quantizer.pack(table("int8"))
    assert "bias" not in tensors
    assert quantizer.table_refusal("embed", 96, 103) is None
    with pytest.raises(CheckpointError, match=r"'embed' does not fit: shape is \(101, 96\), and config.json says"):
        quantizer.unpack_table("embed", tensors)
    assert quantizer.table_refusal("embed", 80, 101) == "its 80 columns are no multiple of 32, the size of a group"


# Which layer gets what.


@pytest.mark.parametrize(
    ("variant", "options", "head", "up", "down"),
    [
        (None, {}, 8, 8, 8),
        ("int4", {}, 8, 4, 4),
        ("int4", {"head": "same"}, 4, 4, 4),
        ("int4", {"head": "none"}, None, 4, 4),
        ("int8", {"head": "int4"}, 4, 8, 8),
        ("int4", {"modules": {"*.down": "int8", "*.mlp.*": "none", "he*": "int4"}}, 4, None, 8),
        ("int4", {"modules": {"*.mlp.*": "none", "*.down": "int8"}}, 8, None, None),
    ],
)
def test_the_head_and_named_modules_get_what_is_asked(
    variant: str | None, options: dict[str, Any], head: int | None, up: int | None, down: int | None
) -> None:
    asked = build(variant=variant, options=tuple(sorted(options.items())))
    for quantizer in (asked, build(config=json.loads(json.dumps(asked.config())))):
        for name, bits in (("head", head), ("layers.0.mlp.up", up), ("layers.0.mlp.down", down)):
            reason = quantizer.refusal(name, 64, 96)
            if bits is None:
                assert reason == f"the plan keeps {name} as it is"
            else:
                assert reason is None
                assert quantizer.quantize(name, random(4, 64), None).bits == bits
        reason = quantizer.table_refusal("embed", 64, 96)
        if head is None:
            assert reason == "the plan keeps embed as it is"
        else:
            assert reason is None
            assert quantizer.quantize_table("embed", random(4, 64)).bits == head
    assert asked.config() == build(config=asked.config()).config()


def test_a_table_that_is_the_head_goes_by_both_names_and_the_first_pattern_decides() -> None:
    """`wte` is no head unless the core asks about it as a table."""
    plan = {"wt?": "int4", "head": "none"}
    quantizer = build(options=(("modules", plan),))
    assert quantizer.table_refusal("embed", 64, 96) == "the plan keeps embed as it is"
    assert quantizer.table_refusal("wte", 64, 96) is None
    assert quantizer.quantize_table("wte", random(4, 64)).bits == 4
    assert build(options=(("modules", {"head": "none"}),)).refusal("wte", 64, 96) is None


def test_a_layer_that_groups_do_not_divide_stays_and_says_why() -> None:
    assert build().refusal(LAYER, 80, 64) == "its 80 columns are no multiple of 32, the size of a group"


# What is refused.


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"variant": "int3"}, "variant 'int3' is unknown; there is int8, int8-offset, int4, int4-offset"),
        ({"options": (("bits", 4),)}, "option 'bits' is unknown; there is rounding, weighting, head, modules"),
        ({"options": (("rounding", "best"),)}, "rounding='best' is unknown; there is search, nearest"),
        ({"options": (("weighting", 1),)}, "weighting=1 is unknown; there is magnitude, even"),
        (
            {"options": (("head", "int2"),)},
            "head='int2' is unknown; there is same, none, int8, int8-offset, int4, int4-offset",
        ),
        ({"options": (("head", ["int8"]),)}, "head=['int8'] is unknown"),
        ({"options": (("modules", "*.down"),)}, "modules is a str, not a mapping of patterns to variants"),
        (
            {"options": (("modules", {"*": "int2"}),)},
            "modules has '*': 'int2'; a pattern names int8, int8-offset, int4",
        ),
        ({"dtype": "int8"}, "compute dtype int8 is not one of float32, float64, bfloat16, float16"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(request_: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedRequestError) as caught:
        build(**request_)
    assert caught.value.what == "the native quantizer cannot honour this request."
    assert caught.value.why.startswith(reason)
    assert 'quantizer="native:int4"' in caught.value.fix


def test_a_packed_checkpoint_takes_neither_variant_nor_options() -> None:
    with pytest.raises(UnsupportedRequestError) as caught:
        build(variant="int4", options=(("head", "int8"),), config=build().config())
    assert caught.value.reasons == (
        "variant 'int4' is asked for, but the weights are packed already",
        "option 'head' is given, but the weights are packed already",
    )
    assert "without a variant or options" in caught.value.fix


def test_a_checkpoint_of_a_later_version_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        build(config={**build().config(), "version": 2, "something": "new"})
    assert caught.value.what == "this checkpoint is packed in version 2 of the native form."
    assert caught.value.why == "this package reads version 1."
    assert caught.value.fix.startswith("Install a newer pluglm-quantizer-native")
    assert caught.value.key == "quantization_config.version"


@pytest.mark.parametrize(
    ("changed", "key", "reason"),
    [
        ({"group_size": 64}, "group_size", "group_size is 64, not 32"),
        ({"version": None}, "version", "version is None, not 1"),
        ({"variant": "int2"}, "variant", "variant is 'int2', not 'int8' or 'int8-offset' or 'int4' or 'int4-offset'"),
        ({"head": "same"}, "head", "head is 'same', not 'none' or 'int8'"),
        ({"modules": ["*"]}, "modules", "modules is a list, not a mapping"),
        ({"biased": "all"}, "biased", "biased is 'all', not a list of names"),
        ({"desc_act": True}, "desc_act", "'desc_act' is unknown"),
    ],
)
def test_a_damaged_config_is_refused(changed: Mapping[str, Any], key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(config={**build().config(), **changed})
    assert caught.value.what.startswith(
        "the quantization_config of this checkpoint is not one of this package: " + reason
    )
    assert caught.value.why == "what it says decides how the packed tensors are read."
    assert caught.value.fix == "Save the model again from its plain weights."
    assert caught.value.key == f"quantization_config.{key}"


@pytest.mark.parametrize(
    ("short", "wrong", "found"),
    [
        ("shape", torch.tensor([27, 64]), "shape is torch.int64 [2], not torch.int32 [2]"),
        ("shape", torch.tensor([0, 64], dtype=torch.int32), "shape is (0, 64), not positive and"),
        ("shape", torch.tensor([27, 60], dtype=torch.int32), "shape is (27, 60), not positive and"),
        (
            "shape",
            torch.tensor([33, 64], dtype=torch.int32),
            "codes is torch.uint8 [2, 8, 16, 4], not torch.uint8 [3, 8,",
        ),
        ("codes", torch.zeros(2, 8, 16, 4, dtype=torch.int8), "codes is torch.int8 [2, 8, 16, 4], not torch.uint8"),
        (
            "codes",
            torch.zeros(2, 16, 16, 2, dtype=torch.uint8),
            "codes is torch.uint8 [2, 16, 16, 2], not torch.uint8 [2, 8",
        ),
        ("scale", torch.zeros(2, 2, 16), "scale is torch.float32 [2, 2, 16], not torch.float16 [2, 2, 16]"),
        ("scale", torch.full((2, 2, 16), torch.inf).half(), "scale holds numbers that are not finite"),
        ("offset", torch.zeros(2, 16, 2).half(), "offset is torch.float16 [2, 16, 2], not torch.float16 [2, 2, 16]"),
        ("bias", torch.zeros(64), "bias is torch.float32 [64], not torch.float32 [27]"),
    ],
)
def test_packed_tensors_of_another_kind_are_refused(short: str, wrong: Tensor, found: str) -> None:
    quantizer = build(variant="int4-offset")
    tensors = quantizer.pack(quantizer.quantize(LAYER, random(27, 64), random(27)))
    with pytest.raises(CheckpointError) as caught:
        quantizer.unpack(LAYER, {**tensors, short: wrong})
    assert caught.value.what.startswith(f"the packed weight of {LAYER!r} does not fit: {found}")
    assert caught.value.fix == "Save the model again from its plain weights."
    assert caught.value.tensor == f"{LAYER}.{found.split()[0]}"


def test_a_packed_layer_of_another_size_than_the_models_is_refused() -> None:
    quantizer = build()
    tensors = quantizer.pack(quantizer.quantize(LAYER, random(27, 64), None))
    assert quantizer.refusal(LAYER, 64, 30) is None
    with pytest.raises(PluglmError, match=r"shape is \(27, 64\), and config.json says \(30, 64\)"):
        quantizer.unpack(LAYER, tensors)
