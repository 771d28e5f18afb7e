"""torchao's config objects, and the variant and options of the quantizer `torchao` that each of them means.

Nothing of torchao is imported: an object is read by the name of its class and its fields, as torchao 0.18 has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pluglm.errors import InputError
from pluglm_hf.refusals import unsupported

#: Texts of older releases of the reference, which refuses them by now -> the class that each meant.
TEXTS: Mapping[str, str] = {
    "int8_weight_only": "Int8WeightOnlyConfig", "int4_weight_only": "Int4WeightOnlyConfig",
    "int8_dynamic_activation_int8_weight": "Int8DynamicActivationInt8WeightConfig",
}  # fmt: skip
#: Class -> variant, and its fields -> our options. What is not named here must be as torchao has it by default.
TYPES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "Int8WeightOnlyConfig": ("int8", {"granularity": "group_size"}),
    "Int8DynamicActivationInt8WeightConfig": (
        "int8-dynamic", {"granularity": "group_size", "act_mapping_type": "inputs", "reduce_range": "reduce_range"},
    ),
    "Int4WeightOnlyConfig": ("int4", {"group_size": "group_size", "int4_choose_qparams_algorithm": "algorithm"}),
    "Float8WeightOnlyConfig": ("float8", {"granularity": "group_size", "weight_dtype": "format"}),
    "Float8DynamicActivationFloat8WeightConfig": ("float8-dynamic", {"granularity": "group_size"}),
    "IntxWeightOnlyConfig": (
        "intx", {"weight_dtype": "bits", "granularity": "group_size", "mapping_type": "mapping",
                 "intx_choose_qparams_algorithm": "algorithm"},
    ),
    "Int8DynamicActivationIntxWeightConfig": (
        "intx-dynamic", {"weight_dtype": "bits", "weight_granularity": "group_size", "weight_mapping_type": "mapping",
                         "intx_choose_qparams_algorithm": "algorithm"},
    ),
}  # fmt: skip
#: Fields that change no number.
_IGNORED = ("set_inductor_config",)


def variant_of(kind: Any, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The variant and options that `TorchAoConfig(kind, **arguments)` means.

    Args:
        kind: one of torchao's config objects, or an older text. arguments: of a text; an object has its own.
    Raises: InputError for what is neither, UnsupportedRequestError for a type or field that cannot be honoured.
    """
    if isinstance(kind, str):
        if kind not in TEXTS:
            raise unsupported("TorchAoConfig(quant_type)", kind, f"of texts, {', '.join(TEXTS)} are known.",
                              "Pass a config object of torchao.quantization.")  # fmt: skip
        allowed = {"group_size"} if kind == "int4_weight_only" else set()
        for name in set(arguments) - allowed:
            raise unsupported(f"TorchAoConfig({name})", arguments[name], f"{kind} has no such setting here.",
                              "Leave it out, or pass a config object of torchao.quantization.")  # fmt: skip
        return TYPES[TEXTS[kind]][0], dict(arguments)
    if arguments:
        raise InputError(f"TorchAoConfig has no argument {min(arguments)!r}.", why="a config object holds all of them.",
                         fix=f"Give it to {type(kind).__name__}.", argument=min(arguments))  # fmt: skip
    if not dataclasses.is_dataclass(kind) or isinstance(kind, type):
        raise InputError(f"TorchAoConfig(quant_type={kind!r}) names no type.",
                         fix=f"Pass an object of torchao.quantization, such as {', '.join(TYPES)}.",
                         argument="quant_type")  # fmt: skip
    name = type(kind).__name__
    if name not in TYPES:
        raise unsupported("TorchAoConfig(quant_type)", name, f"these types are known: {', '.join(TYPES)}.",
                          'Use pluglm.load(quantizer="torchao:…"), whose README lists more.')  # fmt: skip
    variant, options = TYPES[name]
    usual, given = type(kind)(), {}
    for field in dataclasses.fields(kind):
        value = getattr(kind, field.name)
        if field.name in options:
            given[options[field.name]] = _said(f"{name}({field.name})", value)
        elif field.name not in _IGNORED and value != getattr(usual, field.name):
            raise unsupported(f"{name}({field.name})", value, "the quantizer torchao keeps torchao's default for it.",
                              "Leave it out.")  # fmt: skip
    return variant, given


def _said(field: str, value: Any) -> Any:
    """A field's value in the words of the quantizer's options."""
    if isinstance(value, list | tuple) and value and all(item == value[0] for item in value):
        value = value[0]  # of inputs and weights, one for both
    kind, text = type(value).__name__, str(value).removeprefix("torch.")
    if kind in ("PerRow", "PerAxis") and getattr(value, "dim", -1) == -1 and getattr(value, "axis", 0) == 0:
        return "row"
    if kind == "PerTensor":
        return "tensor"
    if kind == "PerGroup":
        return value.group_size
    if kind == "dtype":
        return text.removeprefix("float8_") if text.startswith("float8_") else int(text.removeprefix("int"))
    if isinstance(value, bool | int | str):
        return value.value if hasattr(value, "value") else value
    if kind == "MappingType":
        return value.name.lower()
    raise unsupported(field, value, "the quantizer torchao has no word for it.", "Leave it out.")
