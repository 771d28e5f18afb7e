"""What a request asks for, from the user's words or from a checkpoint's config; what cannot be honoured is refused.

Source: `BitsAndBytesConfig` of Transformers 5.23 for the keys of a config and their defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pluglm import ConfigError, UnsupportedRequestError
from pluglm.contracts import QuantizerRequest

#: What users write after the colon; the first is the default.
VARIANTS = ("nf4", "fp4", "int8")
#: Weights to a block that share one scale.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = ("float32", "bfloat16", "float16")
#: Variant -> the options it has.
_FOUR = ("block_size", "compute_dtype", "double_quant")
OPTIONS: Mapping[str, tuple[str, ...]] = {"nf4": _FOUR, "fp4": _FOUR, "int8": ("threshold",)}
#: Keys of a config -> what they are if the config does not say.
KEYS: Mapping[str, Any] = {
    "load_in_8bit": False, "load_in_4bit": False, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
    "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip
#: What newer files say twice.
_REPEATED = ("_load_in_8bit", "_load_in_4bit")
_STORAGE = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Settings:
    """How layers are packed, or are packed already.

    Attributes:
        kind: nf4, fp4 or int8. dtype: of what is not packed, biases among it.
        compute: the dtype in which 4-bit layers compute; outputs have the dtype of their inputs all the same.
        block_size: weights to a scale, 4 bits only. double_quant: the scales are packed too, 4 bits only.
        threshold: inputs as large as this are multiplied in full precision, int8 only; 0: none are.
        published: the weights come packed. skip: names of modules, as the file that was read spells them.
    """

    kind: str
    dtype: str
    compute: str
    block_size: int = 64
    double_quant: bool = False
    threshold: float = 6.0
    published: bool = False
    skip: tuple[str, ...] | None = None

    def config(self) -> dict[str, Any]:
        """The `quantization_config` that Transformers and this package read back."""
        four = self.kind != "int8"
        return {
            "quant_method": "bitsandbytes", **KEYS, "load_in_4bit": four, "load_in_8bit": not four,
            "llm_int8_threshold": self.threshold, "llm_int8_skip_modules": None if self.skip is None else [*self.skip],
            "bnb_4bit_compute_dtype": self.compute, "bnb_4bit_quant_type": self.kind if four else "fp4",
            "bnb_4bit_use_double_quant": self.double_quant,
        }  # fmt: skip


def read(request: QuantizerRequest) -> Settings:
    """The settings of a request.

    Raises: UnsupportedRequestError with every reason; ConfigError for a config that cannot be read.
    """
    kind = request.variant or VARIANTS[0]
    reasons = []
    if request.config is not None:
        reasons += [f"option {name!r} is given for weights that are packed already" for name, _ in request.options]
        if request.variant is not None:
            reasons.append(f"variant {request.variant!r} is given for weights that are packed already")
    elif request.variant is not None and request.variant not in VARIANTS:
        reasons.append(f"variant {request.variant!r} is unknown; there are {', '.join(VARIANTS)}")
        known = {name for names in OPTIONS.values() for name in names}
        reasons += [f"option {name!r} is unknown" for name, _ in request.options if name not in known]
    else:
        reasons += [reason for name, value in request.options if (reason := _misfit(kind, name, value))]
    if request.dtype not in DTYPES:
        reasons.append(f"compute dtype {request.dtype} has no product in bitsandbytes; {', '.join(DTYPES)} have")
    if request.device.partition(":")[0] not in ("cpu", "cuda"):
        reasons.append(f"device {request.device} was not tried; cpu and cuda are")
    if reasons:
        raise UnsupportedRequestError(
            "the bitsandbytes quantizer cannot honour this request.", why="; ".join(reasons),
            fix='Write quantizer="bitsandbytes:nf4", ":fp4" or ":int8"; its README lists the options of each.',
            reasons=tuple(reasons),
        )  # fmt: skip
    if request.config is not None:
        return _published(request.config, request.dtype)
    options = dict(request.options)
    compute = options.pop("compute_dtype", request.dtype)
    if "threshold" in options:  # Transformers wants a float
        options["threshold"] = float(options["threshold"])
    return dataclasses.replace(Settings(kind, request.dtype, compute), **options)


def _misfit(kind: str, name: str, value: Any) -> str | None:
    """Why an option cannot be taken, or None."""
    if name not in OPTIONS[kind]:
        there = [other for other, names in OPTIONS.items() if name in names]
        return f"option {name!r} is {'for ' + ' and '.join(there) if there else 'unknown'}, {kind} has none such"
    if name == "block_size" and (type(value) is not int or value not in BLOCK_SIZES):
        return f"block_size={value!r} makes no sense; it may be {', '.join(map(str, BLOCK_SIZES))}"
    if name == "compute_dtype" and value not in DTYPES:
        return f"compute_dtype={value!r} makes no sense; it may be {', '.join(DTYPES)}"
    if name == "double_quant" and type(value) is not bool:
        return f"double_quant={value!r} makes no sense; it may be True or False"
    if name == "threshold" and not _is_threshold(value):
        return f"threshold={value!r} makes no sense; it may be any number from 0"
    return None


def _is_threshold(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def _published(config: Mapping[str, Any], dtype: str) -> Settings:
    """The settings of a `quantization_config`."""
    for name in config:
        if name not in (*KEYS, *_REPEATED, "quant_method"):
            raise _unreadable(name, config[name], "this package does not know what it means.")
    values = {**KEYS, **{name: value for name, value in config.items() if name in KEYS}}
    for name in ("load_in_8bit", "load_in_4bit"):
        if config.get(f"_{name}", values[name]) != values[name]:
            raise _unreadable(name, values[name], f"_{name} says {config[f'_{name}']!r}.")
    if bool(values["load_in_8bit"]) == bool(values["load_in_4bit"]):
        raise _unreadable("load_in_4bit", values["load_in_4bit"], "one of load_in_4bit and load_in_8bit must be true.")
    allowed: dict[str, tuple[Any, ...]] = {
        "bnb_4bit_compute_dtype": DTYPES, "bnb_4bit_quant_type": ("nf4", "fp4"), "bnb_4bit_quant_storage": _STORAGE,
        "bnb_4bit_use_double_quant": (True, False), "llm_int8_has_fp16_weight": (False,),
    }  # fmt: skip
    for name, choices in allowed.items():
        if values[name] not in choices:
            raise _unreadable(name, values[name], f"it may be {', '.join(map(str, choices))}.")
    if not _is_threshold(values["llm_int8_threshold"]):
        raise _unreadable("llm_int8_threshold", values["llm_int8_threshold"], "it may be any number from 0.")
    skip = values["llm_int8_skip_modules"]
    if skip is not None and not (isinstance(skip, list) and all(isinstance(name, str) for name in skip)):
        raise _unreadable("llm_int8_skip_modules", skip, "it may be a list of names.")
    # Which modules were skipped, and which had been left on the CPU, shows in the file: they are plain there.
    return Settings(
        values["bnb_4bit_quant_type"] if values["load_in_4bit"] else "int8", dtype, values["bnb_4bit_compute_dtype"],
        double_quant=values["bnb_4bit_use_double_quant"], threshold=float(values["llm_int8_threshold"]), published=True,
        skip=None if skip is None else tuple(skip),
    )  # fmt: skip


def _unreadable(key: str, value: Any, why: str) -> ConfigError:
    return ConfigError(
        f"quantization_config has {key}={value!r}, with which these weights cannot be read.", why=why,
        fix="Correct config.json, or load the plain weights and pack them with quantizer='bitsandbytes:nf4'.",
        key=f"quantization_config.{key}",
    )  # fmt: skip
