"""How each layer is to be packed, from the user's words or from a checkpoint's config; the rest is refused.

Source: `HqqConfig` of Transformers 5.23 and `hqq_base_quant_config` of hqq 0.2.8 for the shape of a config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pluglm import ConfigError, UnsupportedRequestError
from pluglm.contracts import QuantizerRequest

BITS = (1, 2, 3, 4, 8)
#: What users write after the colon.
VARIANTS = tuple(f"int{bits}" for bits in BITS)
DTYPES = ("float32", "bfloat16", "float16")
INSTALL = 'DISABLE_CUDA=1 pip install "pluglm-quantizer-hqq[hqq]"'
#: What every config says of a layer, and what it must be, where there is but one choice.
_PARAMETERS = {"nbits", "channel_wise", "group_size", "optimize", "round_zero", "axis", "view_as_float"}
_FIXED = {"scale_quant_params": (None,), "zero_quant_params": (None,), "offload_meta": (False, None)}


@dataclass(frozen=True)
class Grid:
    """How one layer is packed.

    Attributes:
        bits: 1, 2, 3, 4 or 8. group_size: weights that share a scale and a zero; a multiple of 8, or None: one row of
            the weight (axis 1), or one column (axis 0).
        axis: 1: groups are neighbours in the flattened weight; 0: they are as far apart as groups are many.
    """

    bits: int = 4
    group_size: int | None = 64
    axis: int = 1

    def misfit(self) -> str | None:
        """Why no layer can be packed so, or None."""
        if type(self.bits) is not int or self.bits not in BITS:
            return f"bits={self.bits!r} makes no sense; it may be {', '.join(map(str, BITS))}"
        size = self.group_size
        if size is not None and (type(size) is not int or size < 8 or size % 8):
            return f"group_size={size!r} makes no sense; it may be a multiple of 8, or None for whole rows or columns"
        if type(self.axis) is not int or self.axis not in (0, 1):
            return f"axis={self.axis!r} makes no sense; it may be 0 or 1"
        return None

    def size(self, out_features: int, in_features: int) -> int:
        """Weights to a group of this layer."""
        return self.group_size or (in_features if self.axis == 1 else out_features)


@dataclass(frozen=True)
class Settings:
    """How layers are packed, or are packed already.

    Attributes:
        grid: of all layers but those that `modules` names; `modules`: pattern of module names and their grid, the first
            that matches counts. dtype: of scales, zeros and biases, in which layers compute.
        published: the weights come packed; each layer's tensors say how. skip: as the file that was read spells them.
    """

    grid: Grid
    dtype: str
    modules: tuple[tuple[str, Grid], ...] = ()
    published: bool = False
    skip: tuple[str, ...] = ("lm_head",)

    def of(self, name: str) -> Grid:
        """The grid of a module."""
        return next((grid for pattern, grid in self.modules if fnmatchcase(name, pattern)), self.grid)

    def config(self) -> dict[str, Any]:
        """The `quantization_config` beside packed weights, as Transformers and hqq write it."""
        grid = self.grid
        parameters = {
            "nbits": grid.bits, "channel_wise": True, "group_size": grid.group_size, "optimize": True,
            "round_zero": grid.bits == 4, "axis": grid.axis, "view_as_float": False,
        }  # fmt: skip
        fixed = {"scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}
        return {
            "quant_method": "hqq", "quant_config": {"weight_quant_params": parameters, **fixed},
            "skip_modules": [*self.skip],
        }  # fmt: skip


def read(request: QuantizerRequest) -> Settings:
    """The settings of a request.

    Raises: UnsupportedRequestError with every reason; ConfigError for a config that cannot be read.
    """
    reasons, options = [], dict(request.options)
    grid = Grid()
    modules: tuple[tuple[str, Grid], ...] = ()
    if request.config is not None:
        reasons += [f"option {name!r} is given for weights that are packed already" for name in options]
        if request.variant is not None:
            reasons.append(f"variant {request.variant!r} is given for weights that are packed already")
    else:
        reasons += [
            f"option {name!r} is unknown; there are group_size, axis, modules"
            for name in options if name not in ("group_size", "axis", "modules")
        ]  # fmt: skip
        if request.variant is not None and request.variant not in VARIANTS:
            reasons.append(f"variant {request.variant!r} is unknown; there are {', '.join(VARIANTS)}")
        elif request.variant is not None:
            grid = Grid(bits=int(request.variant.removeprefix("int")))
        grid = dataclasses.replace(grid, **{name: options[name] for name in ("group_size", "axis") if name in options})
        reasons += [reason] if (reason := grid.misfit()) else []
        modules, misfits = _modules(options.get("modules", {}), grid)
        reasons += misfits
    if request.dtype not in DTYPES:
        reasons.append(f"compute dtype {request.dtype} is none of this package's; {', '.join(DTYPES)} are")
    if request.device.partition(":")[0] not in ("cpu", "cuda"):
        reasons.append(f"device {request.device} was not tried; cpu and cuda are")
    fix = 'Write quantizer="hqq" or "hqq:int4", ":int8", …; its README lists the options.'
    if request.config is None and not reasons and (reason := missing()):
        reasons, fix = [reason], f"Run {INSTALL}, or load a model that is packed already."
    if reasons:
        raise UnsupportedRequestError(
            "the hqq quantizer cannot honour this request.", why="; ".join(reasons), fix=fix, reasons=tuple(reasons)
        )
    if request.config is not None:
        return _published(request.config, request.dtype)
    return Settings(grid, request.dtype, modules)


def missing() -> str | None:
    """Why weights cannot be packed, or None."""
    try:
        import hqq.core.optimize  # noqa: F401 - needs torch and numpy only, not the rest of what hqq depends on
    except ImportError as error:
        return f"packing needs the package hqq ({error})"
    return None


def _modules(given: Any, grid: Grid) -> tuple[tuple[tuple[str, Grid], ...], list[str]]:
    """Grids by pattern, and what is wrong with them."""
    if not isinstance(given, Mapping):
        return (), [f"modules={given!r} makes no sense; it may be a table of patterns and their settings"]
    found, reasons = [], []
    for pattern, settings in given.items():
        if not isinstance(settings, Mapping) or settings.keys() - {"bits", "group_size", "axis"}:
            reasons.append(f"modules[{pattern!r}]={settings!r} makes no sense; it may set bits, group_size and axis")
            continue
        own = dataclasses.replace(grid, **settings)
        if reason := own.misfit():
            reasons.append(f"modules[{pattern!r}]: {reason}")
        found.append((str(pattern), own))
    return tuple(found), reasons


def _published(config: Mapping[str, Any], dtype: str) -> Settings:
    """The settings of a `quantization_config`. With one entry a kind of layer, the first stands for all in reports."""
    for key in config.keys() - {"quant_method", "quant_config", "skip_modules"}:
        raise _unreadable(key, config[key], "this package does not know what it means.")
    given = config.get("quant_config")
    if not isinstance(given, Mapping) or not given:
        raise _unreadable("quant_config", given, "it may be a table of settings.")
    single = "weight_quant_params" in given
    entries = {"quant_config": given} if single else {f"quant_config.{tag}": entry for tag, entry in given.items()}
    grids = [_grid(key, entry) for key, entry in entries.items() if entry is not None]
    skip = config.get("skip_modules", ["lm_head"])
    if not isinstance(skip, list) or not all(isinstance(name, str) for name in skip):
        raise _unreadable("skip_modules", skip, "it may be a list of names.")
    return Settings(grids[0] if grids else Grid(), dtype, published=True, skip=tuple(skip))


def _grid(key: str, entry: Any) -> Grid:
    """What one entry of a config says."""
    parameters = entry.get("weight_quant_params") if isinstance(entry, Mapping) else None
    if not isinstance(parameters, Mapping):
        raise _unreadable(key, entry, "it may be a table with weight_quant_params.")
    for name in sorted(entry.keys() - {"weight_quant_params"}):
        if entry[name] not in _FIXED.get(name, ()):
            raise _unreadable(f"{key}.{name}", entry[name], "scales and zeros that are packed in turn are not read.")
    for name in sorted(parameters.keys() - _PARAMETERS):
        raise _unreadable(f"{key}.{name}", parameters[name], "this package does not know what it means.")
    if parameters.get("channel_wise", True) is not True:
        raise _unreadable(
            f"{key}.channel_wise", parameters["channel_wise"], "one scale for a whole weight is not read."
        )
    grid = Grid(parameters.get("nbits", 4), parameters.get("group_size", 64), parameters.get("axis", 1))
    if reason := grid.misfit():
        raise _unreadable(f"{key}.weight_quant_params", dict(parameters), f"{reason}.")
    return grid


def _unreadable(key: str, value: Any, why: str) -> ConfigError:
    return ConfigError(
        f"quantization_config has {key}={value!r}, with which these weights cannot be read.", why=why,
        fix="Correct config.json, or load the plain weights and pack them with quantizer='hqq'.",
        key=f"quantization_config.{key}",
    )  # fmt: skip
