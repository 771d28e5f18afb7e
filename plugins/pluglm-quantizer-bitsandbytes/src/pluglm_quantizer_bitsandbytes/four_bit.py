"""Weights as 4-bit codes of a table, scaled by the largest value of each block; the scales may be packed in their turn.

Blocks run along the flattened weight. Double quantization keeps each scale as one of 256 values of another table, in
blocks of 256 scales, around their mean.

Source: Dettmers et al. 2023, "QLoRA", section 3; `Linear4bit` and `QuantState` of bitsandbytes 0.50 for the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pluglm import CheckpointError
from pluglm_quantizer_bitsandbytes.library import functional
from pluglm_quantizer_bitsandbytes.settings import BLOCK_SIZES, Settings

#: Scales to a block of double quantization: the one size that bitsandbytes multiplies with.
NESTED_BLOCK = 256
_STORAGE = {torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64}


def tensor_names(kind: str, double_quant: bool) -> tuple[str, ...]:
    """Short names of a layer's tensors, without its bias."""
    nested = ("weight.nested_absmax", "weight.nested_quant_map") if double_quant else ()
    return ("weight", "weight.absmax", "weight.quant_map", *nested, f"weight.quant_state.bitsandbytes__{kind}")


class FourBitLinear(nn.Module):
    """A linear layer of 4-bit codes. [..., in] -> [..., out].

    Buffers:
        codes: uint8 [out * in / 2, 1], the first of two codes in the high half of a byte.
        absmax: float32 [blocks], or uint8 with double quantization. nested_absmax: float32 [blocks / 256];
        nested_map: float32 [256]; nested_offset: float32 []; None without double quantization.
        shift: [out] or None, the bias.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    nested_offset: Tensor | None
    shift: Tensor | None

    def __init__(
        self, state: Any, codes: Tensor, bias: Tensor | None, compute: torch.dtype,
    ) -> None:  # fmt: skip
        """state: a `QuantState` of bitsandbytes."""
        super().__init__()
        self.kind, self.block_size, self.size = state.quant_type, state.blocksize, tuple(state.shape)
        self.packed_from, self.compute = state.dtype, compute
        nested = state.state2
        held = {
            "codes": codes, "absmax": state.absmax, "nested_absmax": nested and nested.absmax,
            "nested_map": nested and nested.code, "nested_offset": state.offset, "shift": bias,
        }  # fmt: skip
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in]; the result has its dtype, the product is computed in `compute`."""
        bias = self.shift
        if bias is not None and bias.dtype != self.compute:
            bias = bias.to(self.compute)
        absmax, packed = (self.absmax, None) if self.nested_absmax is None else (self.nested_absmax, self.absmax)
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            x.to(self.compute), self.codes, self.size, absmax, self.block_size, self.kind, bias=bias,
            absmax_8bit=packed, absmax_code=self.nested_map, absmax_offset=self.nested_offset,
        )  # fmt: skip
        return y.to(x.dtype)

    def state(self) -> Any:
        """The `QuantState` that it was made of."""
        nested, library = None, functional()
        if self.nested_absmax is not None:
            nested = library.QuantState(
                self.nested_absmax, code=self.nested_map, blocksize=NESTED_BLOCK, dtype=torch.float32
            )
        table = library.get_4bit_type(self.kind, device=self.absmax.device)
        return library.QuantState(
            self.absmax, torch.Size(self.size), table, self.block_size, self.kind, self.packed_from,
            self.nested_offset, nested,
        )  # fmt: skip


def quantize(weight: Tensor, bias: Tensor | None, settings: Settings) -> FourBitLinear:
    """weight: [out, in], bias: [out] or None."""
    codes, state = functional().quantize_4bit(
        weight.contiguous(), blocksize=settings.block_size, compress_statistics=settings.double_quant,
        quant_type=settings.kind,
    )  # fmt: skip
    return FourBitLinear(state, codes, bias, getattr(torch, settings.compute))


def pack(layer: FourBitLinear) -> dict[str, Tensor]:
    """The tensors that bitsandbytes writes for this layer."""
    tensors = {"weight": layer.codes} | {f"weight.{k}": v for k, v in layer.state().as_dict(packed=True).items()}
    return tensors if layer.shift is None else {**tensors, "bias": layer.shift}


def unpack(name: str, tensors: Mapping[str, Tensor], settings: Settings, size: tuple[int, int] | None) -> FourBitLinear:
    """The layer of these tensors.

    Args:
        size: (out, in) of the layer, None if nobody knows.
    Raises: CheckpointError unless they fit each other and the layer.
    """
    codes, facts = tensors["weight"], _facts(name, tensors, settings)
    if size is not None and facts["shape"] != [*size]:
        raise _damaged(name, _blob(settings), f"shape is {facts['shape']}, the layer is {[*size]}")
    _check(name, tensors, facts, settings)
    stats = {short.removeprefix("weight."): t for short, t in tensors.items() if short not in ("weight", "bias")}
    stats.pop(_blob(settings).removeprefix("weight."))
    state = functional().QuantState.from_dict({**stats, **facts}, device=codes.device)
    bias = tensors.get("bias")
    return FourBitLinear(
        state, codes.contiguous().view(torch.uint8).reshape(-1, 1),
        None if bias is None else bias.to(getattr(torch, settings.dtype)), getattr(torch, settings.compute),
    )  # fmt: skip


def _blob(settings: Settings) -> str:
    return f"weight.quant_state.bitsandbytes__{settings.kind}"


def _facts(name: str, tensors: Mapping[str, Tensor], settings: Settings) -> dict[str, Any]:
    """What the file says of a layer beside its tensors: JSON, as bytes."""
    blob = tensors[_blob(settings)]
    if blob.dtype != torch.uint8 or blob.ndim != 1:
        raise _damaged(name, _blob(settings), f"it is {blob.dtype} {list(blob.shape)}, not bytes of JSON")
    try:
        facts = json.loads(bytes(blob.tolist()))
    except ValueError as error:
        raise _damaged(name, _blob(settings), f"it is no JSON: {error}") from error
    if not isinstance(facts, dict):
        raise _damaged(name, _blob(settings), "it is no table of JSON")
    wanted: dict[str, Any] = {
        "quant_type": lambda v: v == settings.kind, "blocksize": lambda v: type(v) is int and v in BLOCK_SIZES,
        "dtype": lambda v: v in ("float32", "bfloat16", "float16"),
        "shape": lambda v: isinstance(v, list) and len(v) == 2 and all(type(n) is int and n > 0 for n in v),
    }  # fmt: skip
    if settings.double_quant:
        wanted |= {
            "nested_blocksize": lambda v: v == NESTED_BLOCK, "nested_dtype": lambda v: v == "float32",
            "nested_offset": lambda v: type(v) in (int, float) and abs(v) < float("inf"),
        }  # fmt: skip
    for key, fits in wanted.items():
        if not fits(facts.get(key)):
            raise _damaged(name, _blob(settings), f"{key} is {facts.get(key)!r}")
    if unknown := sorted(facts.keys() - wanted.keys()):
        raise _damaged(name, _blob(settings), f"{unknown[0]} is unknown")
    return facts


def _check(name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], settings: Settings) -> None:
    """Raises CheckpointError unless shapes, dtypes and tables are those that bitsandbytes writes."""
    rows, columns = facts["shape"]
    blocks = -(-rows * columns // facts["blocksize"])
    codes = tensors["weight"]
    if codes.dtype not in _STORAGE or codes.nbytes != (rows * columns + 1) // 2:
        found, wanted = f"{codes.dtype} {list(codes.shape)}", f"{(rows * columns + 1) // 2} bytes"
        raise _damaged(name, "weight", f"it is {found}, not {wanted} for {rows} x {columns} codes")
    scales = torch.uint8 if settings.double_quant else torch.float32
    shapes = {
        "weight.absmax": (scales, (blocks,)), "weight.quant_map": (torch.float32, (16,)),
        "weight.nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),)),
        "weight.nested_quant_map": (torch.float32, (256,)),
    }  # fmt: skip
    for short, (dtype, shape) in shapes.items():
        t = tensors.get(short)
        if t is not None and (t.dtype != dtype or tuple(t.shape) != shape):
            raise _damaged(name, short, f"it is {t.dtype} {list(t.shape)}, not {dtype} {list(shape)}")
    bias = tensors.get("bias")
    if bias is not None and (not bias.is_floating_point() or tuple(bias.shape) != (rows,)):
        raise _damaged(name, "bias", f"it is {bias.dtype} {list(bias.shape)}, not floating point [{rows}]")
    tables = {"weight.quant_map": functional().get_4bit_type(settings.kind, device="cpu")}
    if settings.double_quant:
        tables["weight.nested_quant_map"] = functional().create_dynamic_map()
    for short, table in tables.items():
        # Kernels have these tables built in and read none: a file with other values would mean another weight.
        if not torch.allclose(tensors[short].cpu(), table, rtol=0.0, atol=1e-4):
            raise _damaged(name, short, f"its values are not those of {settings.kind}")


def _damaged(name: str, short: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the packed weight of {name!r} cannot be read: {short}: {found}.",
        why="quantization_config says bitsandbytes, and that library would compute something else, or nothing.",
        fix="Get the file again, or save the model again from its plain weights.", tensor=f"{name}.{short}",
    )  # fmt: skip
