"""Devices and dtypes as transformers spells them, in the words that `pluglm.load` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pluglm.errors import InputError
from pluglm_hf.refusals import unsupported

AUTO = "auto"
#: Where the reference puts a model that nobody placed.
DEFAULT_DEVICE = "cpu"


def device_of(device_map: Any, *, argument: str = "device_map") -> str:
    """The one device that a `device_map` (or a `device`) means.

    Args:
        device_map: None; "auto" and "balanced…" mean the best device there is; a device, its number, or a mapping whose
            parts are all on one.
    Raises: UnsupportedRequestError for a model spread over devices; InputError for what names none.
    """
    if device_map is None:
        return DEFAULT_DEVICE
    if isinstance(device_map, Mapping):
        return _one_of(device_map, argument)
    if isinstance(device_map, str) and device_map in (AUTO, "balanced", "balanced_low_0", "sequential"):
        return AUTO
    return _device(device_map, argument)


def _one_of(device_map: Mapping[Any, Any], argument: str) -> str:
    devices = sorted({_device(value, argument) for value in device_map.values()})
    if len(devices) != 1:
        raise unsupported(
            argument, dict(device_map), f"it names {', '.join(devices) or 'no device'}; a model here is on one device.",
            'Pass device_map={"": "cuda:0"}, or a smaller dtype or a quantizer, so that one device holds it.',
        )  # fmt: skip
    return devices[0]


def _device(value: Any, argument: str) -> str:
    import torch

    if isinstance(value, bool) or not isinstance(value, str | int | torch.device):
        raise InputError(f"{argument}={value!r} names no device.", fix='Pass "cpu", "cuda:0" or "auto".',
                         argument=argument)  # fmt: skip
    if isinstance(value, int):
        return DEFAULT_DEVICE if value < 0 else f"cuda:{value}"
    if value == "disk":
        raise unsupported(argument, value, "weights are mapped from their files, so nothing has to be put aside.",
                          'Pass "cpu".')  # fmt: skip
    try:
        return str(torch.device(value))
    except RuntimeError as e:
        raise InputError(f"{argument}={value!r} names no device.", why=str(e).splitlines()[0],
                         fix='Pass "cpu", "cuda:0" or "auto".', argument=argument) from e  # fmt: skip


def dtype_of(dtype: Any, torch_dtype: Any) -> str:
    """The dtype's name. dtype: the name since version 5. torch_dtype: the older one. None: the checkpoint's own.

    Raises: InputError if both are there and differ, or for what is no floating-point dtype.
    """
    import torch

    names = []
    for argument, value in (("dtype", dtype), ("torch_dtype", torch_dtype)):
        if value is None:
            continue
        if isinstance(value, Mapping):
            raise unsupported(argument, dict(value), "a model here has one dtype.", "Pass that one.")
        name = str(value).removeprefix("torch.")
        found = getattr(torch, name, None) if name != AUTO else None
        if name != AUTO and not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise InputError(f"{argument}={value!r} is no floating-point dtype.",
                             fix='Pass torch.bfloat16, "bfloat16" or "auto".', argument=argument)  # fmt: skip
        names.append(name if found is None else str(found).removeprefix("torch."))
    if len(set(names)) > 1:
        raise InputError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} contradict each other.",
                         fix="Pass dtype alone; torch_dtype is its older name.", argument="torch_dtype")  # fmt: skip
    return names[0] if names else AUTO
