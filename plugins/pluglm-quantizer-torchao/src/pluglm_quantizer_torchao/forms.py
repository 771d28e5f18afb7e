"""Which types of torchao there are: their options, what they need, and how near they come to the plain layer.

Source: torchao 0.18, `torchao.quantization.quant_api`, `torchao.prototype.quantization`,
`torchao.prototype.mx_formats`; the devices are those for which it has kernels, tried where a test says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pluglm_quantizer_torchao.library import axis_or_group, choice, granularity, mapping

Values = tuple[Any, ...]
FLOATS = ("float32", "bfloat16", "float16")
GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Option:
    """One option. field: its name in torchao's config. values: those that are taken, the default first.

    turned: makes torchao's value of ours.
    """

    field: str
    values: Values
    turned: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Form:
    """One way to keep weights.

    Attributes:
        config: `module:class` of torchao's config. fixed: arguments that are no option.
        options: by our name. packing: tells the forms of one variant apart; None: there is one.
        devices, dtypes: where it runs. capability: the least compute capability on CUDA. needs: another package.
        bits: of a code, or the name of the option that says it. rows, columns: sizes must be multiples of these.
        why_not: dtype -> what goes wrong in it, where torchao would compute all the same.
        rtol: the error of a layer of default options, relative to its largest output.
        rounds_input: its inputs are rounded too.
        kept: its tensors mean the same on every machine, so that they may be written to a file.
    """

    config: str
    options: Mapping[str, Option] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    packing: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = FLOATS
    capability: tuple[int, int] | None = None
    needs: str | None = None
    bits: int | str = 8
    rows: int = 1
    columns: int = 1
    rtol: float = 0.02
    rounds_input: bool = False
    kept: bool = True
    why_not: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """The name of torchao's config."""
        return self.config.partition(":")[2]


def _packing(name: str) -> dict[str, Any]:
    return {"int4_packing_format": lambda: choice("Int4PackingFormat")(name)}


def _int(bits: int) -> Any:
    import torch

    return getattr(torch, f"int{bits}")


def _float8(name: str) -> Any:
    import torch

    return getattr(torch, f"float8_{name}")


def _float4() -> Any:
    import torch

    return torch.float4_e2m1fn_x2


QUIET = {"set_inductor_config": False}  # else it changes settings of the whole process
API, INT4 = "quantization.quant_api:", "prototype.quantization.int4:"
UINTX, MX = "prototype.quantization.quant_api:", "prototype.mx_formats.inference_workflow:"
INPUTS = Option("act_mapping_type", ("symmetric", "asymmetric"), mapping)
HQQ = Option("int4_choose_qparams_algorithm", ("tinygemm", "hqq"), choice("Int4ChooseQParamsAlgorithm"))
INTX_ROUND = Option("intx_choose_qparams_algorithm", ("affine", "hqq_scale_only"),
                    choice("IntxChooseQParamsAlgorithm"))  # fmt: skip
WIDE = ("float32", "bfloat16")
OVERFLOWS = {"float16": "torchao adds up the codes before it scales them, and the sums leave the range of float16"}
SIGNS = ("symmetric", "asymmetric", "symmetric_no_clipping_err")
BITS = (4, 8, 7, 6, 5, 3, 2, 1)
UINTX_OPTIONS = {
    "bits": Option("bit_width", (4, 8)),
    "group_size": Option("group_size", (128, 32, 64, 256, 512, 1024, "row"), lambda v: None if v == "row" else v),
    "container": Option("packing_bitwidth", (None, 8, 16, 32)),
}


def _int4_group(first: int, *others: int) -> dict[str, Option]:
    return {"group_size": Option("group_size", (first, *others))}


def _intx(config: str, granularity_field: str, mapping_field: str, **more: Any) -> Form:
    options = {
        "bits": Option("weight_dtype", BITS, _int),
        "group_size": Option(granularity_field, (32, 16, 64, 128, 256, "row"), axis_or_group),
        "mapping": Option(mapping_field, SIGNS, mapping), "algorithm": INTX_ROUND,
    }  # fmt: skip
    return Form(API + config, options, **{"bits": "bits", "rtol": 0.15, **more})


def _opaque_intx(packing: str) -> Form:
    return _intx("Int8DynamicActivationIntxWeightConfig", "weight_granularity", "weight_mapping_type",
                 fixed={"intx_packing_format": lambda: choice("IntxPackingFormat")(packing)}, packing=packing,
                 devices=("cpu",), dtypes=WIDE, rounds_input=True, kept=False)  # fmt: skip


#: What users write after the colon -> its forms; on each device the first that has it is the default.
VARIANTS: Mapping[str, tuple[Form, ...]] = {
    "int8": (
        Form(API + "Int8WeightOnlyConfig", {"group_size": Option("granularity", ("row", "tensor", 16, *GROUPS),
             granularity)}, QUIET, dtypes=WIDE, why_not=OVERFLOWS),
    ),
    "int8-dynamic": (
        Form(API + "Int8DynamicActivationInt8WeightConfig", {
            "group_size": Option("granularity", ("row", "tensor"), granularity), "inputs": INPUTS,
            "reduce_range": Option("reduce_range", (False, True)),
        }, QUIET, dtypes=WIDE, why_not=OVERFLOWS, rounds_input=True, rtol=0.04),
    ),
    "int4": (
        Form(INT4 + "PrototypeInt4WeightOnlyConfig", {**_int4_group(128, 64, 32), "algorithm": HQQ}, QUIET, "opaque",
             devices=("cpu",), bits=4, rows=16, rtol=0.15),
        Form(API + "Int4WeightOnlyConfig", {**_int4_group(128, 64, 32, 256), "algorithm": HQQ,
             "ntile": Option("int4_tile_packed_ntile", (8, 16))}, QUIET | _packing("tile_packed_to_4d"),
             "tile_packed_to_4d", ("cuda",), ("bfloat16",), (8, 0), bits=4, rtol=0.15),
        Form(API + "Int4WeightOnlyConfig", _int4_group(128, 64, 32, 256), QUIET | _packing("plain"), "plain",
             ("cuda",), ("bfloat16",), (9, 0), "mslk", 4, rtol=0.15),
        Form(API + "Int4WeightOnlyConfig", _int4_group(128, 64, 32, 256), QUIET | _packing("preshuffled"),
             "preshuffled", ("cuda",), ("bfloat16",), (9, 0), "mslk", 4, rtol=0.15, kept=False),
    ),
    "da8w4": (
        Form(INT4 + "Int8DynamicActivationInt4WeightConfig", {**_int4_group(32, 64, 128),
             "inputs": Option("act_mapping_type", ("asymmetric", "symmetric"), mapping)}, QUIET, devices=("cpu",),
             bits=4, rows=32, columns=2, rtol=0.15, rounds_input=True, kept=False),
    ),
    "intx": (_intx("IntxWeightOnlyConfig", "granularity", "mapping_type"),),
    "intx-dynamic": (
        _intx("Int8DynamicActivationIntxWeightConfig", "weight_granularity", "weight_mapping_type",
              packing="unpacked_to_int8", rounds_input=True),
        *(_opaque_intx(f"opaque_{name}") for name in
          ("torchao_auto", "torchao_lowbit", "torchao_kleidiai", "aten_kleidiai")),
    ),
    "uintx": (
        Form(UINTX + "UIntxWeightOnlyConfig", UINTX_OPTIONS, QUIET, None, ("cuda",), ("float16", "bfloat16"), (8, 0),
             "gemlite", "bits", rtol=0.15, kept=False),
    ),
    "uintx-dynamic": (
        Form(UINTX + "Int8DynamicActivationUIntxWeightConfig", UINTX_OPTIONS, QUIET, None, ("cuda",),
             ("float16", "bfloat16"), (8, 0), "gemlite", "bits", rtol=0.15, rounds_input=True, kept=False),
    ),
    "float8": (
        Form(API + "Float8WeightOnlyConfig", {
            "group_size": Option("granularity", ("row", "tensor", 16, *GROUPS), granularity),
            "format": Option("weight_dtype", ("e4m3fn", "e5m2"), _float8),
        }, QUIET, bits=4, rtol=0.06),
    ),
    "float8-dynamic": (
        Form(API + "Float8DynamicActivationFloat8WeightConfig",
             {"group_size": Option("granularity", ("row", "tensor", "block"), granularity)}, QUIET, "plain", ("cuda",),
             ("bfloat16",), (8, 9), bits=4, rows=16, columns=16, rtol=0.1, rounds_input=True),
        Form("prototype.float8_opaque_tensor:Float8DynamicActivationFloat8WeightOpaqueTensorConfig",
             {"group_size": Option("granularity", ("row", "tensor"), granularity)}, QUIET, "opaque", ("cpu",),
             bits=4, rows=32, rtol=0.1, rounds_input=True, kept=False),
    ),
    "float8-int4": tuple(
        Form(API + "Float8DynamicActivationInt4WeightConfig", {}, {"int4_packing_format": name}, name, ("cuda",),
             ("bfloat16",), (9, 0), "mslk", 4, columns=128, rtol=0.2, rounds_input=True, kept=name == "plain")
        for name in ("plain", "preshuffled")
    ),
    "mxfp8": (
        Form(MX + "MXDynamicActivationMXWeightConfig", {}, {}, None, ("cuda",), ("bfloat16",), (10, 0), bits=4,
             rows=16, columns=32, rtol=0.1, rounds_input=True),
    ),
    "mxfp4": (
        Form(MX + "MXDynamicActivationMXWeightConfig", {}, {"activation_dtype": _float4, "weight_dtype": _float4},
             None, ("cuda",), ("bfloat16",), (10, 0), bits=3, rows=16, columns=32, rtol=0.4, rounds_input=True),
    ),
    "nvfp4": (
        Form(MX + "NVFP4DynamicActivationNVFP4WeightConfig", {"triton": Option("use_triton_kernel", (False, True))}, {},
             None, ("cuda",), ("bfloat16",), (10, 0), bits=3, rows=16, columns=16, rtol=0.3, rounds_input=True),
    ),
    "nvfp4-weights": (
        Form(MX + "NVFP4WeightOnlyConfig", dtypes=WIDE, bits=3, rows=16, columns=16, rtol=0.3),
    ),
}  # fmt: skip


def default_form(variant: str, device: str) -> Form:
    """The form that a variant has on a device; the first of all where none runs there."""
    forms = VARIANTS[variant]
    return next((form for form in forms if device in form.devices), forms[0])
