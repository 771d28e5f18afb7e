"""What this CPU and this build of torch can do: found out by trying, once a process."""

from __future__ import annotations

import functools

import torch

#: Codes of activations run from 0 to this.
SEVEN_BITS, EIGHT_BITS = 127, 255


def missing() -> str | None:
    """Why this build of torch has not the products that are needed, or None."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this build of torch has no oneDNN"
    wanted = {"onednn": ("qlinear_prepack", "qlinear_pointwise"), "mkldnn": ("_reorder_linear_weight",)}
    absent = [
        f"{space}::{op}" for space, ops in wanted.items() for op in ops if not hasattr(getattr(torch.ops, space), op)
    ]
    return f"torch {torch.__version__} has no {' and no '.join(absent)}" if absent else None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 here (AVX-512 or AVX-NE-CONVERT on x86)."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=torch.bfloat16, device="cpu"))
    except RuntimeError:
        return False
    return True


@functools.cache
def highest_code() -> int:
    """255 if products of unsigned and signed bytes are exact for all codes, else 127.

    Without VNNI an x86 CPU adds pairs of such products in 16 bits, which saturate: 2·255·127 > 32767. oneDNN then gives
    wrong sums and says nothing; 2·127·127 fits. VNNI adds in 32 bits. Whether it is used also depends on the
    environment (ONEDNN_MAX_CPU_ISA), so the CPU's word is not enough: the worst case is tried as well.
    """
    return EIGHT_BITS if torch.cpu._is_vnni_supported() and is_exact(EIGHT_BITS) else SEVEN_BITS


def is_exact(code: int) -> bool:
    """Whether sums of code · ±127 come out right, for few and for many rows."""
    signs = torch.tensor([127, -127], dtype=torch.int8, device="cpu").repeat(24)
    weight = signs[:, None].expand(48, 64).contiguous()
    want = signs.float() * (64 * code)
    for rows in (1, 2, 7, 64):
        codes = torch.full((rows, 64), code, dtype=torch.uint8, device="cpu")
        if not torch.equal(multiply(codes, prepack(weight), torch.ones(48, device="cpu")), want.expand(rows, 48)):
            return False
    return True


def prepack(codes: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] as oneDNN reads it: an opaque tensor, of which nobody else can read a value."""
    packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


def multiply(codes: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale[o] · Σᵢ codes[r, i] · weight[o, i], [rows, out] float32.

    Args:
        codes: [rows, in] uint8, none above `highest_code()`. packed: of `prepack`. scale: [out] float32.
    """
    zeros = _zeros(scale.shape[0])
    y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


@functools.lru_cache(maxsize=64)
def _zeros(count: int) -> torch.Tensor:
    """Zero points of the weights. Not an inference tensor, whoever asks first."""
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.int64, device="cpu")
