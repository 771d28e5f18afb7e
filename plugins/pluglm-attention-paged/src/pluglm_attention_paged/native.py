"""The compiled library, if there is one: `native.cpp` by ctypes. On the CPU, float32 and bfloat16, no gradients."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pluglm.contracts import DenseView, PagedView
from pluglm.errors import InputError, PluglmError
from pluglm_attention_paged.online import Extras

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts import AttentionSpec

DTYPES = ("float32", "bfloat16")
MISSING = (
    "this installation has no compiled library: install a C++ compiler (g++ or clang++), then reinstall with "
    "`PLUGLM_NATIVE=1 pip install --force-reinstall --no-deps --no-binary :all: pluglm-attention-paged`, or choose "
    '"paged:torch"'
)
_VERSION = 1
_POINTERS = ("q", "k", "v", "o", "table", "visible", "bias", "sinks", "slopes", "q_positions", "k_positions")
_NUMBERS = (
    "q_row", "q_head", "q_token", "k_page", "k_cell", "k_head", "v_page", "v_cell", "v_head", "table_row",
    "visible_row", "visible_token", "bias_row", "bias_head", "bias_token", "q_positions_row", "k_positions_row",
    "B", "H", "K", "T", "D", "Dv", "num_pages", "page_size", "start", "end",
)  # fmt: skip


class Call(ctypes.Structure):
    """Mirrors `Call` in native.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("threads", ctypes.c_int32),
        ("bfloat16", ctypes.c_int32),
    )  # fmt: skip


def misfits(device: str, dtype: str) -> list[str]:
    """Why the library computes nothing for this device and dtype; empty: it does."""
    reasons = []
    if device.partition(":")[0] != "cpu":
        reasons.append(f"the compiled library runs on the CPU, not on {device}")
    if dtype not in DTYPES:
        reasons.append(f"the compiled library computes {' and '.join(DTYPES)}, not {dtype}")
    return reasons


@functools.cache
def library() -> Library | None:
    """The library of this installation; None if it was built without, or lies there from another version."""
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
    path = Path(__file__).with_name(f"libpaged{suffix}")
    if not path.exists():
        return None
    loaded = ctypes.CDLL(str(path))
    return Library(loaded) if loaded.pluglm_paged_version() == _VERSION else None


class Library:
    """Calls `pluglm_paged_attend`. Uses up to `torch.get_num_threads()` threads; releases the interpreter lock."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self._attend = loaded.pluglm_paged_attend
        self._attend.argtypes = (ctypes.POINTER(Call),)
        self._attend.restype = ctypes.c_int32

    def attend(
        self, q: Tensor, view: PagedView | DenseView, spec: AttentionSpec, start: int, visible: Tensor | None,
        extras: Extras,
    ) -> Tensor:  # fmt: skip
        """As `online.attend`, in float32. Raises: InputError if the view does not fit the queries or itself."""
        k, v, table, length = _paged(view)  # [P, page, K, D], [P, page, K, Dv], [B, N]
        B, H, T, D = q.shape
        _check(q, k, v, table, length, spec)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        o = torch.empty((B, H, T, spec.v_head_dim), dtype=q.dtype)
        sinks, slopes = (None if x is None else x.float().contiguous() for x in (extras.sinks, extras.slopes))
        bias = None if extras.bias is None else extras.bias.float().expand(B, H, T, length)
        bias = bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()
        seen = None if visible is None else visible.expand(B, T, length)
        seen = seen if seen is None or seen.stride(-1) == 1 else seen.contiguous()
        at, cells = extras.q_positions, extras.k_positions
        at, cells = (None if x is None else x.expand(B, -1).contiguous() for x in (at, cells))

        def pointer(x: Tensor | None) -> int | None:
            return None if x is None else x.data_ptr()

        def strides(x: Tensor | None, *axes: int) -> tuple[int, ...]:
            return (0,) * len(axes) if x is None else tuple(x.stride(axis) for axis in axes)

        call = Call(
            *map(pointer, (q, k, v, o, table, seen, bias, sinks, slopes, at, cells)),
            *strides(q, 0, 1, 2), *strides(k, 0, 1, 2), *strides(v, 0, 1, 2), *strides(table, 0),
            *strides(seen, 0, 1), *strides(bias, 0, 1, 2), *strides(at, 0), *strides(cells, 0),
            B, H, spec.num_kv_heads, T, D, spec.v_head_dim, k.shape[0], k.shape[1], start, length,
            spec.scale, spec.softcap or 0.0, torch.get_num_threads(), q.dtype is torch.bfloat16,
        )  # fmt: skip
        failed = self._attend(ctypes.byref(call))
        if failed == 1:
            raise InputError(
                f"The block table names pages from {int(table.min())} to {int(table.max())} of {k.shape[0]}.",
                fix="Attend to the view of the pass under way; pages change hands afterwards.", argument="view",
            )  # fmt: skip
        if failed:
            raise PluglmError("Attention ran out of memory.", fix="Send fewer rows at a time.")
        return o


def _paged(view: PagedView | DenseView) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pages, table and length. A dense view is one page a row, as long as the row."""
    if isinstance(view, PagedView):
        table = view.block_table
        return view.k_pages, view.v_pages, table if table.stride(-1) == 1 else table.contiguous(), view.length
    k, v = view.k.transpose(1, 2), view.v.transpose(1, 2)
    return k, v, torch.arange(k.shape[0], dtype=torch.int32)[:, None], k.shape[1]


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: int, spec: AttentionSpec) -> None:
    """Raise InputError for tensors that the library would read past the end of."""
    B, H, _, D = q.shape
    K, size = spec.num_kv_heads, k.shape[1]
    fits = (
        (spec.num_heads, spec.head_dim) == (H, D)
        and k.shape[2:] == (K, D)
        and v.shape == (*k.shape[:2], K, spec.v_head_dim)
        and table.shape[0] == B
        and table.dtype is torch.int32
        and table.shape[1] * size >= length
        and q.dtype is k.dtype is v.dtype
        and str(q.dtype).removeprefix("torch.") in DTYPES
    )
    if not fits:
        raise InputError(
            "Queries, keys and the layer's spec do not fit together.",
            why=f"q is {list(q.shape)} {q.dtype}, k {list(k.shape)} {k.dtype}, v {list(v.shape)} {v.dtype}, the table "
            f"{list(table.shape)} {table.dtype} for {length} cells; the layer has {spec.num_heads} heads on {K}.",
            fix="Give the view that the cache handed out for this layer and pass, in the queries' dtype.",
            argument="view",
        )
