"""Attention backends made of kernels that `pluglm vendor --kernel` sealed into a package."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import as_file, files
from typing import Any

import torch

from pluglm.contracts import AttentionRequest
from pluglm.errors import PluginError
from pluglm.sealed import Form, Sealed, read_sealed
from pluglm.vendored_kernel import FUNCTIONS, METADATA, PLACE, RECORD, is_kernel_file, package_folder
from pluglm_attention_flash.flash import FlashAttention, build
from pluglm_attention_flash.importing import import_sealed
from pluglm_attention_flash.kernels import HALF, Kernel, flash_attn_2, flash_attn_3, lacks, parameters

KERNEL = Form(
    "kernel", RECORD, PLACE, is_kernel_file, lambda names: package_folder(names) is not None,
    keeps=lambda name: name.endswith((".py", "/" + METADATA)),
)  # fmt: skip


def sealed_attention(package: str, request: AttentionRequest) -> FlashAttention:
    """The backend of a vendored kernel with the functions of flash_attn.

    The device is asked first, so that nothing is run where it could not be used; then every file is compared with its
    recorded digest; then the package is imported, under a name of its own.

    Args:
        package: the import package that `pluglm vendor --kernel` made ("pluglm_kernel_flash_attn2").
    Raises: UnsupportedRequestError with every reason if the device or the kernel cannot honour `request`; PluginError
        if a file is not as it was vendored, the import fails (its cause is kept), or a function is not there.
    """
    name = package.removeprefix("pluglm_kernel_").replace("_", "-")

    def find(device: str) -> Kernel | str:
        return lacks(device, 8) or open_kernel(package, device=device)

    return build(request, {"": find}, owner=name)


def open_kernel(package: str, *, device: str = "cpu", dtypes: tuple[str, ...] = HALF) -> Kernel | str:
    """Compare, import and look at a vendored kernel, on whatever device.

    Args:
        device: its compute capability is compared with those that the build says it was compiled for.
        dtypes: those that it computes in.
    Returns: the kernel, or why it cannot be used.
    Raises: PluginError as `sealed_attention`.
    """
    sealed = read_sealed(package, KERNEL)
    folder = package_folder(sealed.table)
    assert folder is not None  # the form says so
    compiled = _architectures(sealed)
    if compiled and (missing := compiled_for(compiled, device)) is not None:
        return missing
    owner = package.replace("_", "-")
    with as_file(files(package).joinpath(PLACE)) as place:
        try:
            module = import_sealed(sealed, place, folder)
        except Exception as error:  # a kernel may fail in any way: a library of another torch, a missing package
            raise PluginError(
                f"the kernel of {owner} cannot be imported.", why=f"{type(error).__name__}: {error}",
                fix="Install what it imports. If torch was changed since it was vendored, vendor it again, for the "
                f"torch that is here ({torch.__version__}).",
                plugin=owner,
            ) from error  # fmt: skip
    absent = [name for name in FUNCTIONS if not callable(getattr(module, name, None))]
    if absent:
        raise PluginError(
            f"the kernel of {owner} has no function {' and no function '.join(absent)}.",
            why="attention is computed by the two functions that flash_attn has.",
            fix="Vendor a kernel of attention with these functions.", plugin=owner,
        )  # fmt: skip
    return _adapted(module, dtypes)


def _adapted(module: Any, dtypes: tuple[str, ...]) -> Kernel | str:
    """The adapter that fits the functions' parameters: those of flash_attn 2 take ALiBi, those of 3 may take sinks."""
    try:
        known = [parameters(getattr(module, name)) for name in FUNCTIONS]
    except (TypeError, ValueError) as error:  # a compiled function may have no signature
        return f"the parameters of its functions cannot be read: {error}"
    wanted = {"softmax_scale", "causal", "window_size", "softcap"}
    missing = sorted(wanted - (known[0] & known[1]))
    if missing:
        return f"its functions do not take {', '.join(missing)}"
    return (flash_attn_2 if "alibi_slopes" in known[0] & known[1] else flash_attn_3)(module, dtypes)


def _architectures(sealed: Sealed) -> tuple[str, ...]:
    """Compute capabilities that metadata.json names for CUDA ("8.0", "9.0a", "9.0+PTX"); () if it names none."""
    text = next((data for name, data in sealed.files.items() if name.endswith("/" + METADATA)), None)
    try:
        said = json.loads(text) if text is not None else {}
    except ValueError:
        return ()  # it was shown to whoever agreed; what it does not say is not known
    backend = said.get("backend") if isinstance(said, Mapping) else None
    if not isinstance(backend, Mapping) or backend.get("type") != "cuda" or not isinstance(backend.get("archs"), list):
        return ()
    return tuple(arch for arch in backend["archs"] if isinstance(arch, str))


def compiled_for(architectures: tuple[str, ...], device: str) -> str | None:
    """Why code compiled for some compute capabilities does not run on a device; None if it does.

    Code for 8.6 runs on 8.6 and 8.9, code for "9.0a" on 9.0 alone, and "+PTX" is compiled anew for whatever is later.
    Source: CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    if torch.device(device).type != "cuda":
        return None
    have = torch.cuda.get_device_capability(device)
    for text in architectures:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", text)
        if match is None:
            return None  # a spelling that is not known here says nothing
        made = (int(match[1]), int(match[2]))
        if made == have or (not match[3] and made < have and (made[0] == have[0] or match[4])):
            return None
        if match[3] == "f" and made[0] == have[0] and made < have:
            return None
    return f"it was compiled for compute capability {', '.join(architectures)}, and {device} has {have[0]}.{have[1]}"
