"""The reference's quantization settings, and the quantizer of pluglm that each of them means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pluglm.errors import InputError
from pluglm_hf.refusals import unknown, unsupported
from pluglm_hf.torchao_types import variant_of

#: Modules that stay as they are if nobody says more.
HEAD = ("lm_head",)
#: Names of modules in checkpoints of the reference -> here.
MODULES: Mapping[str, str] = {"lm_head": "head"}


@dataclass(frozen=True)
class Quantization:
    """What `pluglm.load` is told. quantizer: `name:variant`. options, skip: as there."""

    quantizer: str
    options: Mapping[str, Any]
    skip: tuple[str, ...]


def skipped(names: Sequence[str]) -> tuple[str, ...]:
    """Patterns of pluglm's module names. Raises UnsupportedRequestError for a name that means nothing here."""
    for name in names:
        if name not in MODULES:
            raise unsupported(
                "a module to skip", name, f"modules have names of their own here; known are {', '.join(MODULES)}.",
                "Use pluglm.load(quantizer=…, quantizer_skip=…) with patterns of `lm.model.module.named_modules()`.",
            )  # fmt: skip
    return tuple(MODULES[name] for name in names)


class _Config:
    """Arguments by name. A subclass says which there are, and what they mean here."""

    METHOD = ""
    ARGUMENTS: Mapping[str, Any] = {}

    def __init__(self, **arguments: Any) -> None:
        for name in arguments:
            if name not in self.ARGUMENTS:
                raise unknown(type(self).__name__, name, self.ARGUMENTS)
        self.__dict__.update({**self.ARGUMENTS, **arguments})

    def __repr__(self) -> str:
        said = {k: v for k, v in self.__dict__.items() if v != self.ARGUMENTS[k]}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in said.items())})"

    def to_dict(self) -> dict[str, Any]:
        """Its arguments, with the method's name."""
        return {"quant_method": self.METHOD, **self.__dict__}

    def quantization(self) -> Quantization:
        """The quantizer that it means. Raises UnsupportedRequestError for what cannot be honoured."""
        raise NotImplementedError

    def _refuse(self, names: Sequence[str], why: str, fix: str) -> None:
        for name in names:
            if self.__dict__[name] != self.ARGUMENTS[name]:
                raise unsupported(f"{type(self).__name__}({name})", self.__dict__[name], why, fix)


class BitsAndBytesConfig(_Config):
    """Settings of the package bitsandbytes: the quantizer `bitsandbytes`, in 8 or 4 bits."""

    METHOD = "bitsandbytes"
    ARGUMENTS: Mapping[str, Any] = {
        "load_in_8bit": False, "load_in_4bit": False, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None,
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "bnb_4bit_compute_dtype": None,
        "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_storage": None,
    }  # fmt: skip

    def quantization(self) -> Quantization:
        """`bitsandbytes:int8`, `bitsandbytes:nf4` or `bitsandbytes:fp4`."""
        values = self.__dict__
        if bool(values["load_in_8bit"]) == bool(values["load_in_4bit"]):
            raise InputError(
                f"load_in_8bit={values['load_in_8bit']!r} and load_in_4bit={values['load_in_4bit']!r} name no width.",
                fix="Set one of them to True.", argument="quantization_config",
            )  # fmt: skip
        self._refuse(("llm_int8_enable_fp32_cpu_offload",), "a model here is on one device.", "Leave it out.")
        self._refuse(("llm_int8_has_fp16_weight",), "it is for training.", "Leave it out.")
        self._refuse(("bnb_4bit_quant_storage",), "packed weights are stored as bytes.", "Leave it out.")
        skip = skipped(values["llm_int8_skip_modules"] or HEAD)
        if values["load_in_8bit"]:
            return Quantization("bitsandbytes:int8", {"threshold": values["llm_int8_threshold"]}, skip)
        if values["bnb_4bit_quant_type"] not in ("fp4", "nf4"):
            raise InputError(f"bnb_4bit_quant_type={values['bnb_4bit_quant_type']!r} makes no sense.",
                             fix='Pass "nf4" or "fp4".', argument="quantization_config")  # fmt: skip
        # The reference computes in float32 unless it is told otherwise.
        compute = str(values["bnb_4bit_compute_dtype"] or "float32").removeprefix("torch.")
        options: dict[str, Any] = {"compute_dtype": compute}
        if values["bnb_4bit_use_double_quant"]:
            options["double_quant"] = True
        return Quantization(f"bitsandbytes:{values['bnb_4bit_quant_type']}", options, skip)


class HqqConfig(_Config):
    """Settings of half-quadratic quantization: the quantizer `hqq`."""

    METHOD = "hqq"
    ARGUMENTS: Mapping[str, Any] = {
        "nbits": 4, "group_size": 64, "view_as_float": False, "axis": 1, "dynamic_config": None,
        "skip_modules": list(HEAD),
    }  # fmt: skip

    def quantization(self) -> Quantization:
        """`hqq:intN` with its group size and axis."""
        self._refuse(("view_as_float",), "it is about how a training library shards bytes.", "Leave it out.")
        self._refuse(("dynamic_config",), "one setting holds for all layers here.", "Leave it out; use skip_modules.")
        values = self.__dict__
        if type(values["nbits"]) is not int or values["nbits"] not in (1, 2, 3, 4, 8):
            raise InputError(f"nbits={values['nbits']!r} makes no sense.", fix="Pass 1, 2, 3, 4 or 8.",
                             argument="quantization_config")  # fmt: skip
        options = {"group_size": values["group_size"], "axis": values["axis"]}
        return Quantization(f"hqq:int{values['nbits']}", options, skipped(values["skip_modules"] or ()))


class TorchAoConfig(_Config):
    """Settings of torchao: the quantizer `torchao`.

    Args:
        quant_type: a config object of torchao.quantization (`Int4WeightOnlyConfig(group_size=64)`), or one of the older
            texts "int8_weight_only", "int4_weight_only" and "int8_dynamic_activation_int8_weight".
        group_size: of "int4_weight_only".
    """

    METHOD = "torchao"
    ARGUMENTS: Mapping[str, Any] = {
        "quant_type": None, "modules_to_not_convert": None, "include_input_output_embeddings": False,
        "untie_embedding_weights": False, "group_size": None,
    }  # fmt: skip

    def __init__(self, quant_type: Any = None, **arguments: Any) -> None:
        super().__init__(quant_type=quant_type, **arguments)

    def quantization(self) -> Quantization:
        """`torchao:VARIANT` with its options, see `torchao_types`."""
        values = self.__dict__
        given = {} if values["group_size"] is None else {"group_size": values["group_size"]}
        variant, options = variant_of(values["quant_type"], given)
        why = "embeddings and the head stay in full precision."
        self._refuse(("include_input_output_embeddings", "untie_embedding_weights"), why, "Leave it out.")
        return Quantization(f"torchao:{variant}", options, skipped(values["modules_to_not_convert"] or ()))


_METHODS: Mapping[str, type[_Config]] = {
    "hqq": HqqConfig, "torchao": TorchAoConfig, "bitsandbytes": BitsAndBytesConfig,
}  # fmt: skip


def read_quantization(config: Any, *, in_4bit: Any = None, in_8bit: Any = None) -> Quantization | None:
    """What `quantization_config`, or the older `load_in_4bit` and `load_in_8bit`, mean; None: nothing is packed.

    Raises: InputError, UnsupportedRequestError.
    """
    if in_4bit or in_8bit:
        if config is not None:
            raise InputError("load_in_4bit or load_in_8bit is given beside quantization_config.",
                             fix="Leave one of them out.", argument="load_in_4bit")  # fmt: skip
        config = BitsAndBytesConfig(load_in_4bit=bool(in_4bit), load_in_8bit=bool(in_8bit))
    if isinstance(config, Mapping):
        method = config.get("quant_method")
        if not isinstance(method, str) or method not in _METHODS:
            raise InputError(
                f"quantization_config has quant_method {method!r}.", fix=f"It may be {', '.join(sorted(_METHODS))}.",
                argument="quantization_config",
            )  # fmt: skip
        config = _METHODS[method](**{k: v for k, v in config.items() if k != "quant_method"})
    if config is None:
        return None
    if not isinstance(config, _Config):
        raise InputError(
            f"quantization_config is a {type(config).__name__}.",
            fix=f"Pass a {' or '.join(c.__name__ for c in _METHODS.values())} of pluglm_hf.",
            argument="quantization_config",
        )  # fmt: skip
    return config.quantization()
