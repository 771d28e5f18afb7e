"""What is special to torchao: its types and options, where each runs, and what its layers offer and keep."""

from __future__ import annotations

import json
from typing import Any

import pluglm_quantizer_torchao
import pytest
import torch
from pluglm_quantizer_torchao import probe as probing
from pluglm_quantizer_torchao import storage
from pluglm_quantizer_torchao.forms import VARIANTS

from pluglm import CheckpointError, UnsupportedRequestError
from pluglm.contracts import GroupedLinear, QuantizerRequest

LAYER = "layers.0.mlp.up"
#: A type that runs on CPUs, with options, and the relative error that they allow.
RUNS: list[tuple[str, dict[str, Any], float]] = [
    ("int8", {}, 0.02), ("int8", {"group_size": "tensor"}, 0.03), ("int8", {"group_size": 64}, 0.02),
    ("int8-dynamic", {"inputs": "asymmetric"}, 0.03), ("int8-dynamic", {"reduce_range": True}, 0.05),
    ("int8-dynamic", {"group_size": "tensor"}, 0.05),
    ("int4", {"group_size": 32}, 0.13), ("int4", {"group_size": 64, "algorithm": "hqq"}, 0.13),
    ("intx", {"bits": 8, "group_size": "row"}, 0.02), ("intx", {"bits": 5, "mapping": "asymmetric"}, 0.06),
    ("intx", {"bits": 4, "algorithm": "hqq_scale_only"}, 0.15), ("intx", {"bits": 2, "mapping": "asymmetric"}, 0.6),
    ("intx-dynamic", {"bits": 6}, 0.06),
    ("float8", {"format": "e5m2"}, 0.1), ("float8", {"group_size": 32}, 0.05), ("nvfp4-weights", {}, 0.2),
]  # fmt: skip


def build(dtype: str = "float32", device: str = "cpu", **request: Any) -> Any:
    request["options"] = tuple(sorted(request.get("options", {}).items()))
    return pluglm_quantizer_torchao.pluglm_build_quantizer(request=QuantizerRequest(device, dtype, **request))


def refusal(dtype: str = "float32", **request: Any) -> tuple[str, ...]:
    with pytest.raises(UnsupportedRequestError) as caught:
        build(dtype, **request)
    assert caught.value.what == "the torchao quantizer cannot honour this request."
    assert '"torchao:int8"; its README lists' in str(caught.value.fix)
    assert caught.value.why == "; ".join(caught.value.reasons)
    return caught.value.reasons


def tensors(rows: int = 48, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) + 0.3  # a mean, so that asymmetric codes differ
    return weight, torch.randn(rows, generator=generator), torch.randn(2, 3, columns, generator=generator)


@pytest.mark.parametrize(("variant", "options", "limit"), RUNS, ids=lambda v: str(v))
def test_every_option_changes_the_layer_and_survives_its_config(
    variant: str, options: dict[str, Any], limit: float
) -> None:
    weight, bias, x = tensors()
    writer = build(variant=variant, options=options)
    module = writer.quantize(LAYER, weight.clone(), bias)
    want, y = torch.nn.functional.linear(x, weight, bias), module(x)
    assert float((y - want).abs().max() / want.abs().max()) < limit
    reader = build(config=json.loads(json.dumps(writer.config())))
    assert reader._settings.options == writer._settings.options and reader._settings.variant == variant
    assert torch.equal(reader.unpack(LAYER, writer.pack(module))(x), y)
    if options:
        assert not torch.equal(build(variant=variant).quantize(LAYER, weight.clone(), bias)(x), y)


@pytest.mark.parametrize(
    ("variant", "options"), [(v, o) for v, o, _ in RUNS if v in ("int8", "int4", "intx")], ids=lambda v: str(v)
)
def test_what_executors_are_offered_is_the_weight(variant: str, options: dict[str, Any]) -> None:
    weight, bias, x = tensors()
    module = build(variant=variant, options=options).quantize(LAYER, weight.clone(), bias)
    assert isinstance(module, GroupedLinear)
    offered = module.grouped()
    assert offered.bits == {"int8": 8, "int4": 4}.get(variant, options.get("bits"))
    group = options.get("group_size", 32 if variant == "intx" else 128)
    assert offered.group_size == (group if isinstance(group, int) else 128)
    assert (offered.offset is None) == (variant != "int4" and "mapping" not in options)
    got = torch.nn.functional.linear(x, offered.dense(), module.grouped_bias())
    torch.testing.assert_close(got, module(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", ["int8-dynamic", "intx-dynamic", "float8", "nvfp4-weights"])
def test_layers_that_round_their_input_or_are_not_affine_offer_nothing(variant: str) -> None:
    weight, _, _ = tensors()
    assert not isinstance(build(variant=variant).quantize(LAYER, weight, None), GroupedLinear)


def test_each_weight_is_off_by_half_a_step_at_most() -> None:
    torch.manual_seed(1)
    weight = torch.randn(30, 50) * torch.logspace(-3, 1, 30)[:, None]
    module = build().quantize(LAYER, weight, None)
    error = (module(torch.eye(50)).T - weight).abs()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool((error <= 0.51 * step).all())


def test_the_settings_of_the_process_stay_as_they_are() -> None:
    import torch._inductor.config as inductor

    before = inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()
    build(variant="float8").quantize(LAYER, tensors()[0], None)
    assert (inductor.coordinate_descent_tuning, torch.get_float32_matmul_precision()) == before


# What is refused


@pytest.mark.parametrize("variant", ["int3", "fp8", "INT8", "int4_weight_only"])
def test_other_variants_are_refused_with_the_list(variant: str) -> None:
    (reason,) = refusal(variant=variant)
    assert reason == f"variant {variant!r} is unknown; there are {', '.join(VARIANTS)}"


@pytest.mark.parametrize(
    ("variant", "options", "found"),
    [
        ("int8", {"bits": 4}, "option 'bits' is unknown to int8; there are group_size, packing, head"),
        ("int4", {"group_size": 48}, "group_size=48 makes no sense; it may be 128, 64, 32"),
        ("int4", {"group_size": True}, "group_size=True makes no sense; it may be 128, 64, 32"),
        ("int4", {"packing": "tight"}, ("packing='tight' makes no sense; it may be 'opaque', "
                                        "'tile_packed_to_4d', 'plain', 'preshuffled'")),
        ("int8", {"packing": "plain"}, "packing='plain' makes no sense; there is one way to keep these weights"),
        ("int8-dynamic", {"reduce_range": 1}, "reduce_range=1 makes no sense; it may be False, True"),
        ("intx", {"head": "yes"}, "head='yes' makes no sense; it may be False, True"),
    ],
)  # fmt: skip
def test_unknown_options_and_values_are_refused_with_what_there_is(
    variant: str, options: dict[str, Any], found: str
) -> None:
    assert refusal(variant=variant, options=options) == (found,)


def test_every_reason_is_given_at_once() -> None:
    reasons = refusal("float64", variant="int4", options={"group": 32, "head": None})
    assert [reason.split()[0] for reason in reasons] == ["head=None", "option", "compute"]


@pytest.mark.parametrize("variant", ["int8", "int8-dynamic"])
def test_float16_is_refused_where_sums_of_codes_leave_its_range(variant: str) -> None:
    (reason,) = refusal("float16", variant=variant)
    assert reason.startswith(f"compute dtype float16 is not among those of {variant}: float32, bfloat16 (torchao adds")
    # That is so: without the refusal the layer overflows.
    layer = storage.quantized(build(variant=variant)._config, torch.ones(8, 1024).half(), None)
    assert not bool(layer(torch.ones(1, 1024).half()).isfinite().all())


@pytest.mark.parametrize(
    ("variant", "options", "found"),
    [
        ("int4", {"packing": "tile_packed_to_4d"}, "int4 with packing='tile_packed_to_4d' runs on cuda, not on cpu"),
        ("int4", {"packing": "plain"}, "runs on cuda, not on cpu: torchao 0.18 has no kernel for it there"),
        ("mxfp8", {}, "mxfp8 runs on cuda, not on cpu"),
        ("uintx", {}, "uintx runs on cuda, not on cpu"),
    ],
)
def test_a_type_of_another_device_is_refused(variant: str, options: dict[str, Any], found: str) -> None:
    (reason,) = refusal("bfloat16", variant=variant, options=options)
    assert found in reason


def _kernel(name: str) -> bool:
    import torchao.ops  # noqa: F401 - declares the names

    return "CPU" in torch._C._dispatch_dump(f"torchao::{name}")


@pytest.mark.parametrize(
    ("variant", "options", "kernel"),
    [
        ("da8w4", {}, "da8w4_linear_cpu"),
        ("float8-dynamic", {}, "float8_linear_prepack_cpu"),
        ("intx-dynamic", {"packing": "opaque_torchao_auto"}, None),
        ("intx-dynamic", {"packing": "opaque_aten_kleidiai"}, None),
    ],
)
def test_a_type_without_its_kernel_is_refused_with_what_was_tried(
    variant: str, options: dict[str, Any], kernel: str | None
) -> None:
    if (kernel is not None and _kernel(kernel)) or (kernel is None and torch.backends.kleidiai.is_available()):
        pytest.skip("this machine has the kernel")
    (reason,) = refusal(variant=variant, options=options)
    assert reason.startswith(f"{variant} does not run here: a layer of [64, 1024] was packed and multiplied in float32 "
                             "on cpu, and torchao raised ")  # fmt: skip
    assert kernel is None or kernel in reason


def test_a_type_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "_known", {})
    right = probing.quantized

    def wrong(config: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        return right(config, weight * 1.5, bias)

    monkeypatch.setattr(probing, "quantized", wrong)
    (reason,) = refusal(variant="intx")
    assert "intx computes something else here" in reason and "was off by 0.4" in reason


@pytest.mark.parametrize("mapping", ["symmetric", "symmetric_no_clipping_err"])
def test_one_symmetric_bit_is_refused_for_it_is_noise(mapping: str) -> None:
    (reason,) = refusal(variant="intx", options={"bits": 1, "mapping": mapping})
    assert reason.startswith("intx computes something else here") and reason.endswith(("off by 1", "off by nan"))
    assert build(variant="intx", options={"bits": 1, "mapping": "asymmetric"}).bits == pytest.approx(9.25)


def test_a_type_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    build(variant="int4")
    monkeypatch.setattr(probing, "_tried", lambda settings: pytest.fail("tried again"))
    build(variant="int4")


def test_options_that_torchao_takes_apart_only_are_refused() -> None:
    from pluglm_quantizer_torchao.quantizer import make

    request = QuantizerRequest("cuda", "bfloat16", variant="uintx", options=(("bits", 8), ("group_size", 64)))
    with pytest.raises(UnsupportedRequestError) as caught:
        make(request)
    assert "uintx needs" in caught.value.why or "no such options together" in caught.value.why


# Which layers are taken


@pytest.mark.parametrize(
    ("variant", "options", "size", "reason"),
    [
        ("int4", {}, (64, 192), "its 192 columns are no multiple of 128"),
        ("int4", {"group_size": 64}, (40, 192), "its 40 rows are no multiple of 16"),
        ("int8", {"group_size": 32}, (40, 50), "its 50 columns are no multiple of 32"),
        ("nvfp4-weights", {}, (40, 64), "its 40 rows are no multiple of 16"),
        ("int8", {}, (5, 7), None), ("intx", {}, (5, 64), None), ("float8", {"group_size": "tensor"}, (5, 7), None),
    ],
)  # fmt: skip
def test_layers_that_a_type_does_not_fit_stay(
    variant: str, options: dict[str, Any], size: tuple[int, int], reason: str | None
) -> None:
    assert build(variant=variant, options=options).refusal(LAYER, size[1], size[0]) == reason


def test_the_head_stays_unless_it_is_asked_for() -> None:
    assert build().refusal("head", 20, 12) == "the head stays in full precision"
    assert build(options={"head": True}).refusal("head", 20, 12) is None
    assert build().refusal("layers.0.head", 20, 12) is None


# Packed tensors


@pytest.mark.parametrize(("saved", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize("variant", ["int8", "int4", "intx", "float8"])
def test_weights_that_were_packed_in_one_dtype_run_in_the_other(variant: str, saved: str, wanted: str) -> None:
    weight, bias, x = tensors()
    first, second = getattr(torch, saved), getattr(torch, wanted)
    writer, reader = build(saved, variant=variant), None
    packed = writer.pack(writer.quantize(LAYER, weight.to(first), bias.to(first)))
    reader = build(wanted, config=writer.config())
    y = reader.unpack(LAYER, packed)(x.to(second))
    assert y.dtype is second
    torch.testing.assert_close(y.float(), writer.unpack(LAYER, packed)(x.to(first)).float(), rtol=2e-2, atol=0.3)


@pytest.mark.parametrize(
    ("variant", "name", "wrong", "found"),
    [
        ("int8", "qdata", torch.zeros(48, 128), "torch.float32 [48, 128], not torch.int8 [48, 128]"),
        ("int8", "qdata", torch.zeros(48, dtype=torch.int8), "torch.int8 [48], not torch.int8 of 2 dimensions"),
        ("int8", "scale", torch.zeros(47, 1), "torch.float32 [47, 1], not torch.float32 [48, 1]"),
        ("int8", "scale", torch.full((48, 1), float("nan")), "not finite"),
        ("int4", "codes", torch.zeros(48, 64), "torch.float32 [48, 64], not torch.uint8 [48, 64]"),
        ("int4", "scale_and_zero", torch.zeros(1, 48, 3), "torch.float32 [1, 48, 3], not torch.float32 [1, 48, 2]"),
        ("float8", "scale", torch.zeros(48, 2), "torch.float32 [48, 2], not torch.float32 [48, 1]"),
    ],
)
def test_packed_tensors_of_another_kind_are_refused(variant: str, name: str, wrong: torch.Tensor, found: str) -> None:
    weight, bias, _ = tensors()
    writer = build(variant=variant)
    packed = writer.pack(writer.quantize(LAYER, weight, bias))
    reader = build(config=writer.config())
    with pytest.raises(CheckpointError) as caught:
        reader.unpack(LAYER, {**packed, f"_weight_{name}": wrong})
    assert caught.value.what == f"the packed weight of {LAYER!r} does not fit: _weight_{name} is {found}."
    assert "quantization_config says torchao's" in str(caught.value.why) and caught.value.fix
    assert caught.value.tensor == f"{LAYER}._weight_{name}"


def test_a_layer_of_another_size_than_the_model_says_is_refused() -> None:
    weight, _, _ = tensors()
    writer = build()
    packed, reader = writer.pack(writer.quantize(LAYER, weight, None)), build(config=writer.config())
    assert reader.refusal(LAYER, 64, 48) is None
    with pytest.raises(CheckpointError, match=r"_weight_qdata is torch.int8 \[48, 128\], not torch.int8 \[48, 64\]"):
        reader.unpack(LAYER, packed)


def test_a_bias_of_another_length_is_refused() -> None:
    weight, bias, _ = tensors()
    writer = build()
    packed = writer.pack(writer.quantize(LAYER, weight, bias))
    with pytest.raises(CheckpointError, match=r"bias is torch.float32 \[20\], not torch.float32 \[48\]"):
        build(config=writer.config()).unpack(LAYER, {**packed, "bias": torch.zeros(20)})


def test_calibrated_scales_are_refused_for_they_would_be_lost() -> None:
    weight, _, _ = tensors()
    writer = build()
    names = frozenset(writer.pack(writer.quantize(LAYER, weight, None)))
    with pytest.raises(CheckpointError) as caught:
        build(config=writer.config()).stored_names(LAYER, "a.b", names | {"_weight_act_pre_scale"})
    assert "_weight_act_pre_scale of a.b" in str(caught.value.what) and "AWQ" in str(caught.value.why)


def test_what_the_file_has_decides_which_layers_are_packed() -> None:
    reader = build(config=build().config())
    assert reader.stored_names(LAYER, "a", frozenset({"weight", "bias"})) == ()
    assert reader.stored_names("head", "lm_head", frozenset()) == ()
    names = {"_weight_qdata", "_weight_scale"}
    assert set(reader.stored_names(LAYER, "a", frozenset(names))) == names, "older files have no zero points"
    assert set(reader.stored_names(LAYER, "a", frozenset({"_weight_qdata", "bias"}))) == {*names, "bias"}
    module = reader.unpack(
        "b", {"_weight_qdata": torch.ones(5, 6, dtype=torch.int8), "_weight_scale": torch.ones(5, 1)}
    )
    assert torch.equal(module(torch.ones(2, 6)), torch.full((2, 5), 6.0))


@pytest.mark.parametrize("size", [(16, 64), (48, 96), (112, 32)])
def test_the_codes_of_int4_are_found_in_whatever_way_this_cpu_packs_them(size: tuple[int, int]) -> None:
    codes = torch.randint(0, 16, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = storage._int4_packed(codes)
    assert torch.equal(storage.int4_codes(packed), codes)


@pytest.mark.parametrize("turned", ["columns", "all"])
def test_a_cpu_that_packs_in_no_blocks_of_rows_is_refused(monkeypatch: pytest.MonkeyPatch, turned: str) -> None:
    def packed(codes: torch.Tensor) -> torch.Tensor:
        if turned == "all" or codes.shape[1] > 2:
            codes = codes.flip(0, 1) if turned == "all" else codes.flip(1)
        return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)

    monkeypatch.setattr(storage, "_int4_packed", packed)
    with pytest.raises(UnsupportedRequestError, match="int4 weights of this CPU cannot be kept") as caught:
        storage.int4_codes(torch.arange(128, dtype=torch.uint8).view(16, 8))
    assert "torchao:intx" in str(caught.value.fix)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("variant", "packing"),
    [(name, form.packing) for name, forms in VARIANTS.items() for form in forms if "cuda" in form.devices],
)
def test_a_type_on_a_gpu_is_near_the_plain_layer_and_keeps_its_bits(variant: str, packing: str | None) -> None:
    options = {} if packing is None else {"packing": packing}
    try:
        writer = build("bfloat16", "cuda", variant=variant, options=options)
    except UnsupportedRequestError as e:
        pytest.skip(e.why)
    weight, bias, x = (t.to("cuda", torch.bfloat16) for t in tensors(256, 1024))
    module = writer.quantize(LAYER, weight.clone(), bias)
    want, y = torch.nn.functional.linear(x.double(), weight.double(), bias.double()), module(x)
    form = next(form for form in VARIANTS[variant] if form.packing == packing)
    assert float((y - want).abs().max() / want.abs().max()) < form.rtol
    if not form.kept:
        with pytest.raises(UnsupportedRequestError, match="elsewhere a file of them would give noise"):
            writer.pack(module)
        return
    reader = build("bfloat16", "cuda", config=writer.config())
    reader.refusal(LAYER, 1024, 256)
    assert torch.equal(reader.unpack(LAYER, writer.pack(module)).to("cuda")(x), y)
