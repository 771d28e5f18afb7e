"""The kernels: what each can do, how it is called, and whether it is here.

An adapter takes the imported module, so that a test can hand it another one with the same functions. All kernels align
a causal mask to the last key of a sequence, and count a window from there (flash_attn 2.1 and later).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm_attention_flash.ragged import Pieces

HALF = ("bfloat16", "float16")
#: What positions alone settle, so that every kernel computes it.
COMMON = ("grouped-heads", "bidirectional", "chunk", "padding", "segments")


@dataclass(frozen=True, slots=True)
class How:
    """The arithmetic of one call.

    Attributes:
        scale: factor on q·k. causal: hide later keys, aligned to the last one.
        window: how many keys before its own a query sees; -1: all.
        softcap: 0.0: off. slopes: [H] float32 or None. sinks: [H] or None.
    """

    scale: float
    causal: bool
    window: int = -1
    softcap: float = 0.0
    slopes: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Kernel:
    """One implementation of FlashAttention.

    Attributes:
        variant: what users write after the colon.
        features: in the words of `pluglm.json`.
        batched: (q [B, T, H, D], k and v [B, S, K, D], How) -> [B, T, H, D]; strides are free but for the last.
        ragged: (q [N, H, D], k and v [M, K, D], Pieces, How) -> [N, H, D].
        dtypes: those it computes in.
        owner: the provider; together with the variant it says who refuses.
    """

    variant: str
    features: tuple[str, ...]
    batched: Callable[[Tensor, Tensor, Tensor, How], Tensor]
    ragged: Callable[[Tensor, Tensor, Tensor, Pieces, How], Tensor]
    dtypes: tuple[str, ...] = HALF
    owner: str = "flash"

    @property
    def label(self) -> str:
        """As users name it: "flash:2", or the provider's own name where it has no variants."""
        return f"{self.owner}:{self.variant}" if self.variant else self.owner


#: Looks for a kernel for a device: the kernel, or why there is none.
Finder = Callable[[str], Kernel | str]


def flash_attn_2(module: Any, dtypes: tuple[str, ...] = HALF) -> Kernel | str:
    """The functions of the package flash_attn (Dao 2023, "FlashAttention-2")."""
    if not {"softcap", "window_size", "alibi_slopes"} <= parameters(module.flash_attn_varlen_func):
        return f"flash_attn {getattr(module, '__version__', 'of unknown version')} is older than 2.6"

    def arguments(how: How) -> dict[str, Any]:
        return {
            "softmax_scale": how.scale, "causal": how.causal, "window_size": (how.window, 0 if how.causal else -1),
            "softcap": how.softcap, "alibi_slopes": how.slopes,
        }  # fmt: skip

    return _packaged("2", module, arguments, ("window", "softcap", "alibi"), dtypes)


def flash_attn_3(module: Any, dtypes: tuple[str, ...] = HALF) -> Kernel | str:
    """The functions of flash_attn_interface (Shah et al. 2024, "FlashAttention-3"). Some builds take sinks."""
    known = parameters(module.flash_attn_func) & parameters(module.flash_attn_varlen_func)
    if not {"window_size", "softcap"} <= known:
        return "flash_attn_interface is a build without window_size and softcap"
    sinks = "s_aux" in known

    def arguments(how: How) -> dict[str, Any]:
        return {
            "softmax_scale": how.scale, "causal": how.causal, "window_size": (how.window, 0 if how.causal else -1),
            "softcap": how.softcap, **({"s_aux": how.sinks} if sinks else {}),
        }  # fmt: skip

    return _packaged("3", module, arguments, ("window", "softcap", *(("sinks",) if sinks else ())), dtypes)


def torch_flash(dtypes: tuple[str, ...] = HALF) -> Kernel:
    """torch's scaled_dot_product_attention, held to its flash kernel: what that cannot do raises."""
    return Kernel("torch", COMMON, _torch_batched, _torch_ragged, dtypes)


def find_2(device: str) -> Kernel | str:
    """flash_attn 2, from Ampere on."""
    found = lacks(device, 8) or _module("flash_attn")
    return found if isinstance(found, str) else flash_attn_2(found)


def find_3(device: str) -> Kernel | str:
    """flash_attn 3, which is made for Hopper alone."""
    found = lacks(device, 9, only=True) or _module("flash_attn_interface")
    return found if isinstance(found, str) else flash_attn_3(found)


def find_torch(device: str) -> Kernel | str:
    """torch's own, from Ampere on."""
    if reason := lacks(device, 8):
        return reason
    return torch_flash() if torch.backends.cuda.is_flash_attention_available() else "this torch was built without it"


#: Every variant, best first.
FINDERS: Mapping[str, Finder] = {"3": find_3, "2": find_2, "torch": find_torch}


def _packaged(
    variant: str, module: Any, arguments: Callable[[How], dict[str, Any]], features: tuple[str, ...],
    dtypes: tuple[str, ...],
) -> Kernel:  # fmt: skip
    """A kernel of the two functions that both packages have."""

    def batched(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
        return _first(module.flash_attn_func(q, k, v, **arguments(how)))

    def ragged(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, how: How) -> Tensor:
        longest = [max(lengths) for lengths in zip(*pieces.lengths, strict=True)]
        return _first(
            module.flash_attn_varlen_func(q, k, v, pieces.q_starts, pieces.k_starts, *longest, **arguments(how))
        )

    return Kernel(variant, (*COMMON, *features), batched, ragged, dtypes)


def _first(result: Any) -> Tensor:
    """The output. Early builds of flash_attn 3 return the log-sum-exp beside it."""
    o: Tensor = result[0] if isinstance(result, tuple) else result
    return o


def _torch_batched(q: Tensor, k: Tensor, v: Tensor, how: How) -> Tensor:
    """torch aligns its causal mask to the first key, so what is not square needs a detour.

    A few queries after many keys go one by one, each with the keys it sees; many are preceded by rows of zeros, whose
    results are dropped.
    """
    T, S = q.shape[1], k.shape[1]
    if not how.causal or T == 1 or T == S:
        return _torch_call(q, k, v, how.scale, causal=how.causal and T > 1)
    if T <= 16:
        seen = [S - T + t + 1 for t in range(T)]
        each = [_torch_call(q[:, t : t + 1], k[:, :n], v[:, :n], how.scale, causal=False) for t, n in enumerate(seen)]
        return torch.cat(each, dim=1)
    square = pad(q, (0, 0, 0, 0, S - T, 0))
    return _torch_call(square, k, v, how.scale, causal=True)[:, S - T :]


def _torch_ragged(q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, how: How) -> Tensor:
    q_sizes, k_sizes = ([lengths[i] for lengths in pieces.lengths] for i in (0, 1))
    parts = zip(torch.split(q, q_sizes), torch.split(k, k_sizes), torch.split(v, k_sizes), strict=True)
    return torch.cat([_torch_batched(a[None], b[None], c[None], how)[0] for a, b, c in parts])


def _torch_call(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        o = scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            is_causal=causal, scale=scale, enable_gqa=q.shape[2] != k.shape[2],
        )  # fmt: skip
    return o.transpose(1, 2)


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters)


def _module(name: str) -> Any:
    """The imported module, or why it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as e:  # a build for another torch fails to load its library
        return f"the package {name} cannot be imported: {e}"


def lacks(device: str, major: int, *, only: bool = False) -> str | None:
    """Why a device does not run kernels for a compute capability."""
    if torch.device(device).type != "cuda":
        return f"needs a CUDA device, have {device}"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    have = torch.cuda.get_device_capability(device)
    if have[0] < major or (only and have[0] != major):
        return f"needs compute capability {major}.x{'' if only else ' or later'}, {device} has {have[0]}.{have[1]}"
    return None
