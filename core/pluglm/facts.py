"""Facts about the machine and the checkpoint that decide device and dtype."""

from __future__ import annotations

from pluglm.contracts.text import Checkpoint
from pluglm.errors import ConfigError, InputError

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16", "float64")
_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def choose_device(wanted: str) -> tuple[str, tuple[str, ...]]:
    """The torch device string, and notes on the choice. Raises InputError for one that is unknown or not there."""
    import torch

    if wanted == AUTO:
        return ("cuda:0", ("device: auto chose the first GPU",)) if torch.cuda.is_available() else ("cpu", ())
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as e:
        raise InputError(
            f"device={wanted!r} is not a device.", why=str(e).splitlines()[0],
            fix='Write "auto", "cpu", "cuda" or "cuda:1".', argument="device",
        ) from e  # fmt: skip
    if device.type not in ("cpu", "cuda"):
        raise InputError(
            f"device={wanted!r} is of a type that no part here is tested on.",
            fix='Write "auto", "cpu" or "cuda".',
            argument="device",
        )
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(
                f"device={wanted!r} is not there.", why=f"torch {torch.__version__} sees {count} CUDA devices.",
                fix='Use device="cpu", or install a CUDA build of torch and a driver.', argument="device",
            )  # fmt: skip
        return f"cuda:{device.index or 0}", ()
    return "cpu", ()


def choose_dtype(wanted: str, checkpoint: Checkpoint, device: str) -> tuple[str, tuple[str, ...]]:
    """The dtype name to run in, and notes on the choice. Raises InputError or ConfigError for a name that is none."""
    wanted = str(wanted).removeprefix("torch.")
    if wanted != AUTO:
        if wanted not in DTYPES:
            raise InputError(
                f"dtype={wanted!r} is not a dtype to run in.",
                fix=f'Write "auto" or one of {", ".join(DTYPES)}.',
                argument="dtype",
            )
        return wanted, ()
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtypes = (info.dtype for info in checkpoint.tensors.values())
    stored = next((_SAFETENSORS[dtype] for dtype in dtypes if dtype in _SAFETENSORS), None)
    name = str(said).removeprefix("torch.") if said is not None and said != AUTO else stored or "float32"
    if name not in DTYPES:
        raise ConfigError(
            f"config.json says dtype {said!r}.", why=f"a model runs in one of {', '.join(DTYPES)}.",
            fix='Pass dtype="bfloat16" or another of these.', key="dtype", path=str(checkpoint.path),
        )  # fmt: skip
    if name == "float16" and device == "cpu":
        return "float32", ("dtype: auto chose float32, since CPUs multiply float16 on a slow reference path",)
    return name, ()
