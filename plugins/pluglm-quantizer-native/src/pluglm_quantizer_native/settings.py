"""What a user or a packed checkpoint asks for, checked once: which layer gets which kind of weight, rounded how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, get_args

from pluglm import ConfigError, UnsupportedRequestError
from pluglm.contracts import QuantizerRequest
from pluglm.contracts.packed import BLOCK_GROUP
from pluglm_quantizer_native.rounding import Rounding, Weighting

#: Of the packed form. A later one is refused.
VERSION = 1
NONE = "none"
HEAD = "head"
DTYPES = ("float32", "float64", "bfloat16", "float16")
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
FIX = 'Write quantizer="native:int4" and for example options={"quantizer": {"rounding": "search", "head": "int8"}}.'


@dataclass(frozen=True)
class Variant:
    """A kind of weight. bits: of a code. has_offset: scale and offset for each group, else a scale alone."""

    bits: int
    has_offset: bool

    @property
    def bits_per_weight(self) -> float:
        """Scales and offsets of 16 bits for each 32 weights included."""
        return self.bits + (32 if self.has_offset else 16) / BLOCK_GROUP


VARIANTS = {
    "int8": Variant(8, has_offset=False), "int8-offset": Variant(8, has_offset=True),
    "int4": Variant(4, has_offset=False), "int4-offset": Variant(4, has_offset=True),
}  # fmt: skip
DEFAULT = "int8"


@dataclass(frozen=True)
class Settings:
    """What is done with each linear layer.

    Attributes:
        variant: a name of `VARIANTS`, for all layers of which nothing else is said.
        head: the same or "none", for the layer called `head`, and for the token table that is the head.
        modules: (pattern, variant or "none"); the first pattern that fits a layer's name decides, before `head`.
        rounding, weighting: see `pluglm_quantizer_native.rounding.rounded`.
        biased: layers that have a bias, as a packed checkpoint lists them.
    """

    variant: str
    head: str
    modules: tuple[tuple[str, str], ...] = ()
    rounding: Rounding = "search"
    weighting: Weighting = "magnitude"
    biased: frozenset[str] = frozenset()

    def variant_of(self, *names: str) -> str:
        """The variant of one layer, or "none". names: all that it goes by; a table that is the head has two."""
        for pattern, variant in self.modules:
            if any(fnmatchcase(name, pattern) for name in names):
                return variant
        return self.head if HEAD in names else self.variant

    def to_config(self, biased: set[str]) -> dict[str, Any]:
        """The `quantization_config` that `read` understands."""
        return {
            "quant_method": "native", "version": VERSION, "group_size": BLOCK_GROUP, "variant": self.variant,
            "head": self.head, "modules": dict(self.modules), "rounding": self.rounding, "weighting": self.weighting,
            "biased": sorted(biased),
        }  # fmt: skip


def read(request: QuantizerRequest) -> Settings:
    """The settings of a request.

    Raises: UnsupportedRequestError with every reason, for a variant, an option or a dtype that is not honoured;
        ConfigError for a packed checkpoint of a later version, or whose config is damaged.
    """
    reasons, config = [], request.config
    if request.dtype not in DTYPES:
        reasons.append(f"compute dtype {request.dtype} is not one of {', '.join(DTYPES)}")
    if config is not None:
        if request.variant is not None:
            reasons.append(f"variant {request.variant!r} is asked for, but the weights are packed already")
        reasons += [f"option {name!r} is given, but the weights are packed already" for name, _ in request.options]
        _refuse(reasons, fix="Load the checkpoint as it is, without a variant or options, or start from plain weights.")
        return _from_config(config)
    options = dict(request.options)
    if request.variant not in (None, *VARIANTS):
        reasons.append(f"variant {request.variant!r} is unknown; there is {', '.join(VARIANTS)}")
    reasons += _wrong(options)
    _refuse(reasons, fix=FIX)
    variant = request.variant or DEFAULT
    head = options.get("head", variant if VARIANTS[variant].bits == 8 else "int8")
    return Settings(
        variant, variant if head == "same" else head, tuple(options.get("modules", {}).items()),
        options.get("rounding", "search"), options.get("weighting", "magnitude"),
    )  # fmt: skip


def _refuse(reasons: list[str], fix: str) -> None:
    if reasons:
        raise UnsupportedRequestError(
            "the native quantizer cannot honour this request.", why="; ".join(reasons), fix=fix, reasons=tuple(reasons)
        )


def _wrong(options: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the options: a reason each."""
    choices = {"rounding": ROUNDINGS, "weighting": WEIGHTINGS, "head": ("same", NONE, *VARIANTS)}
    for name, value in options.items():
        if name == "modules":
            yield from _wrong_modules(value)
        elif name not in choices:
            yield f"option {name!r} is unknown; there is {', '.join([*choices, 'modules'])}"
        elif value not in choices[name]:
            yield f"{name}={value!r} is unknown; there is {', '.join(choices[name])}"


def _wrong_modules(modules: object) -> Iterator[str]:
    if not isinstance(modules, Mapping):
        yield f"modules is a {type(modules).__name__}, not a mapping of patterns to variants"
        return
    for pattern, variant in modules.items():
        if not isinstance(pattern, str) or variant not in (NONE, *VARIANTS):
            yield f"modules has {pattern!r}: {variant!r}; a pattern names {', '.join(VARIANTS)} or {NONE}"


def _from_config(config: Mapping[str, Any]) -> Settings:
    """What `Settings.to_config` wrote."""
    known = Settings(DEFAULT, DEFAULT).to_config(set())
    version = config.get("version")
    if type(version) is int and version > VERSION:
        raise ConfigError(
            f"this checkpoint is packed in version {version} of the native form.",
            why=f"this package reads version {VERSION}.",
            fix="Install a newer pluglm-quantizer-native, or pack the plain weights again with this one.",
            key="quantization_config.version",
        )
    for key in sorted(known.keys() | config.keys()):
        reason = f"{key!r} is unknown" if key not in known else _wrong_value(key, config.get(key))
        if reason is not None:
            raise ConfigError(
                f"the quantization_config of this checkpoint is not one of this package: {reason}.",
                why="what it says decides how the packed tensors are read.",
                fix="Save the model again from its plain weights.", key=f"quantization_config.{key}",
            )  # fmt: skip
    return Settings(
        config["variant"], config["head"], tuple(config["modules"].items()), config["rounding"], config["weighting"],
        frozenset(config["biased"]),
    )  # fmt: skip


def _wrong_value(key: str, value: Any) -> str | None:
    """Why a value of the config cannot be honoured, or None."""
    allowed: dict[str, tuple[Any, ...]] = {
        "quant_method": ("native",), "version": (VERSION,), "group_size": (BLOCK_GROUP,), "variant": tuple(VARIANTS),
        "head": (NONE, *VARIANTS), "rounding": ROUNDINGS, "weighting": WEIGHTINGS,
    }  # fmt: skip
    if key == "modules":
        return next(_wrong_modules(value), None)
    if key == "biased":
        listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
        return None if listed else f"{key} is {value!r}, not a list of names"
    return None if value in allowed[key] else f"{key} is {value!r}, not {' or '.join(map(repr, allowed[key]))}"
