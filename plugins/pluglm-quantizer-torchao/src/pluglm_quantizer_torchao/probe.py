"""Whether a type runs here: a small layer is packed and multiplied, once a process."""

from __future__ import annotations

from typing import Any

import torch

from pluglm_quantizer_torchao.settings import Settings
from pluglm_quantizer_torchao.storage import flattened, quantized

ROWS, COLUMNS = 64, 1024
_known: dict[tuple[Any, ...], tuple[str | None, float]] = {}


def probe(settings: Settings) -> tuple[str | None, float]:
    """Why layers of these settings do not run here, or None; and how many bits a weight takes, scales included.

    An answer is kept, so that each load after the first costs nothing.
    """
    if settings.key not in _known:
        _known[settings.key] = _tried(settings)
    return _known[settings.key]


def _tried(settings: Settings) -> tuple[str | None, float]:
    """Any exception is an answer: kernels that are absent raise whatever their authors chose."""
    dtype = getattr(torch, settings.dtype)
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(ROWS, COLUMNS, generator=generator), torch.randn(3, COLUMNS, generator=generator)
    weight[0], x[0] = 1.0, 1.0  # all codes at their largest: products of bytes that overflow show here
    what = f"a layer of [{ROWS}, {COLUMNS}] was packed and multiplied in {settings.dtype} on {settings.device}"
    try:
        with torch.no_grad():
            weight, x = (t.to(device=settings.device, dtype=dtype) for t in (weight, x))
            linear = quantized(settings.config(), weight.clone(), None)
            y = linear(x)
    except Exception as e:  # noqa: BLE001 - any of them means that this type does not run
        text = str(e).split(". ")[0].split("\n")[0]
        return f"{settings.variant} does not run here: {what}, and torchao raised {type(e).__name__}: {text}", 0.0
    want = x.double() @ weight.double().T
    error = float((y.double() - want).norm() / want.norm())
    limit = min(0.9, max(0.06, 4.0 * 2.0**-settings.bits))  # 1 is noise
    if not error <= limit:
        return f"{settings.variant} computes something else here: {what}, and was off by {error:.2g}", 0.0
    held = flattened(linear.weight) if settings.form.kept else _tensors(linear.weight)
    return None, 8 * sum(t.nbytes for t in held.values()) / (ROWS * COLUMNS)


def _tensors(weight: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}
