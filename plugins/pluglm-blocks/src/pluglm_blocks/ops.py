"""The plain reference of every op that a kernel plugin may replace, with the signatures of `KERNEL_OPS`.

They say what the result is; a kernel may only be faster. `rms_norm_cast_late` has no name in `KERNEL_OPS`: it rounds
at another place than `rms_norm` does, so no kernel ever stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) in float32, back to x's dtype, then times (offset + weight).

    Args:
        x: [..., C]. weight: [C]; None: ones. eps: added to the mean square. offset: added to the weight.
    Returns: [..., C] in x's dtype.
    Source: Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", section 3; rounded where Llama rounds.
    """
    normed = F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)
    if weight is None:
        return normed
    return normed * (weight + offset if offset else weight)


def rms_norm_cast_late(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """As `rms_norm`, but the product with (offset + weight) is taken in float32 too (Gemma, OLMo 2).

    Args: as in `rms_norm`.
    Returns: [..., C] in x's dtype, rounded once.
    """
    scale = None if weight is None else weight.float() + offset
    return F.rms_norm(x.float(), x.shape[-1:], scale, eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias, all of it in float32, rounded once.

    Args:
        x: [..., C]. weight, bias: [C], or None. eps: added to the (biased) variance.
    Returns: [..., C] in x's dtype.
    Source: Ba et al. 2016, "Layer Normalization", equation 4.
    """
    scale = None if weight is None else weight.float()
    shift = None if bias is None else bias.float()
    return F.layer_norm(x.float(), x.shape[-1:], scale, shift, eps).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of a head's first dimensions by their position's angles; the rest passes unchanged.

    Args:
        x: [B, H, T, D].
        cos, sin: [B or 1, T, dim/2] float32, dim <= D.
        interleaved: pair (0, 1), (2, 3) … (GPT-J) and not (0, dim/2), (1, dim/2 + 1) … (GPT-NeoX, Llama).
    Returns: [B, H, T, D] in x's dtype; the products are taken in float32.
    Source: Su et al. 2021, "RoFormer", section 3.4.2, equation 34.
    """
    half, dim = cos.shape[-1], 2 * cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]  # [B or 1, 1, T, dim/2]
    if interleaved:
        a, b = x[..., 0:dim:2], x[..., 1:dim:2]  # [B, H, T, dim/2] each
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)  # [B, H, T, dim]
    else:
        a, b = x[..., :half], x[..., half:dim]
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    rotated = rotated.to(x.dtype)
    return rotated if dim == x.shape[-1] else torch.cat((rotated, x[..., dim:]), dim=-1)


def gated_act(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up.

    Args:
        gate, up: [..., F]. activation: a name of `ACTIVATIONS`.
    Returns: [..., F].
    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 5.
    """
    return ACTIVATIONS[activation](gate) * up


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


#: Every name of `contracts.program.Activation`; each maps [...] to [...] element by element.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,  # Elfwing et al. 2018; "swish" in Ramachandran et al. 2017
    "gelu": cast("Callable[[Tensor], Tensor]", F.gelu),  # x·Φ(x), exact: Hendrycks & Gimpel 2016, section 2
    "gelu_tanh": _gelu_tanh,  # its approximation by tanh, the same section
    "relu": F.relu,
    "relu2": _relu2,  # So et al. 2021, "Primer", section 4.1
    "quick_gelu": _quick_gelu,  # its approximation by a sigmoid, the same section of Hendrycks & Gimpel
}
