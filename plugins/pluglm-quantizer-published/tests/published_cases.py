"""One checkpoint of each kind: its quantization_config, and what packs a layer with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import published_packers as packers
import torch
from torch import Tensor

GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": False, "damp_percent": 0.01, "true_sequential": True}
AWQ = {"quant_method": "awq", "zero_point": True, "bits": 4, "modules_to_not_convert": None}


def gptq(bits: int, group_size: int, **how: Any) -> Any:
    def pack(rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        n = packers.numbers(
            rows, columns, bits, group_size, seed, shuffled=how.get("shuffled", False),
            symmetric=how.get("symmetric", False), least_zero=1,
        )  # fmt: skip
        return packers.gptq(n, bits, v2=how.get("v2", False), index=how.get("index", True)), n.dense()

    config = {**GPTQ, "bits": bits, "group_size": group_size, "desc_act": how.get("shuffled", False)}
    return config | ({"checkpoint_format": "gptq_v2"} if how.get("v2") else {}), pack


def awq(version: str, group_size: int) -> Any:
    def pack(rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        n = packers.numbers(rows, columns, 4, group_size, seed)
        words = {32: 4, 64: 2, -1: 1}[group_size]
        return packers.awq_gemm(n) if version == "gemm" else packers.awq_gemv(n, words), n.dense()

    return {**AWQ, "version": version, "group_size": group_size}, pack


def compressed(bits: int, group_size: int, **how: Any) -> Any:
    symmetric, ordered = how.get("symmetric", True), how.get("ordered", False)

    def pack(rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        n = packers.numbers(rows, columns, bits, group_size, seed, symmetric=symmetric, shuffled=ordered)
        return packers.pack_quantized(n, bits, symmetric=symmetric, index=ordered), n.dense()

    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False, **strategy}
    return scheme("pack-quantized", weights | ({"actorder": "group"} if ordered else {})), pack


def scheme(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "format": layout,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None,
    }  # fmt: skip


def int8_plain(strategy: str) -> Any:
    """naive-quantized: int8 under the name `weight`, scales by tensor, row or block; zero points by row."""

    def pack(rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        n = packers.numbers(rows, columns, 8, -1, seed)
        codes, zero = n.codes - 128, n.zero - 128
        if strategy == "channel":
            tensors = {"weight_scale": torch.from_numpy(n.scale), "weight_zero_point": as_int8(zero)}
            return {"weight": as_int8(codes), **tensors}, n.dense()
        shape = (1,) if strategy == "tensor" else (-(-rows // 40), -(-columns // 24))
        scale = np.random.default_rng(seed).uniform(0.001, 0.002, shape).astype(np.float32)
        o, i = np.indices(codes.shape)
        dense = codes * (scale[0] if strategy == "tensor" else scale[o // 40, i // 24])
        return {"weight": as_int8(codes), "weight_scale": torch.from_numpy(scale)}, torch.from_numpy(dense)

    weights = {"num_bits": 8, "type": "int", "symmetric": strategy != "channel", "strategy": strategy}
    block = {"block_structure": [40, 24]} if strategy == "block" else {}
    return scheme("naive-quantized", {**weights, **block}), pack


def as_int8(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int8))


CASES = {
    "gptq, 4 bits": gptq(4, 32),
    "gptq, 4 bits, symmetric": gptq(4, 16, symmetric=True),
    "gptq, 4 bits, columns in no order": gptq(4, 32, shuffled=True),
    "gptq, 3 bits, version 2": gptq(3, 32, v2=True),
    "gptq, 2 bits, no g_idx, a ragged group": gptq(2, 40, index=False),
    "gptq, 8 bits, one group": gptq(8, -1),
    "awq, gemm": awq("gemm", 32),
    "awq, gemv": awq("gemv", 32),
    "awq, gemv, one group": awq("gemv", -1),
    "compressed-tensors, 4 bits": compressed(4, 32),
    "compressed-tensors, 4 bits, zero points, columns in no order": compressed(4, 32, symmetric=False, ordered=True),
    "compressed-tensors, 3 bits, zero points": compressed(3, 32, symmetric=False),
    "compressed-tensors, 8 bits, by row": compressed(8, -1),
    "compressed-tensors, int8 by tensor": int8_plain("tensor"),
    "compressed-tensors, int8 by row, zero points": int8_plain("channel"),
    "compressed-tensors, int8 by block": int8_plain("block"),
}


def rounding(layout: str, weights: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """int8 or float8 weights and rounded inputs; a static scale is stored with each layer."""
    floats, strategy = weights["type"] == "float", weights["strategy"]

    def pack(rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(seed)
        shape = {"tensor": (1,), "channel": (rows, 1), "block": (-(-rows // 32), -(-columns // 32))}[strategy]
        scale = (torch.rand(shape) + 0.5) * (0.0005 if floats else 0.001)
        codes = torch.randn(rows, columns) * 100 if floats else torch.randint(-128, 128, (rows, columns))
        weight = codes.to(torch.float8_e4m3fn if floats else torch.int8)
        spread = (
            scale.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
            if strategy == "block"
            else scale
        )
        tensors = {"weight": weight, "weight_scale": scale}
        if not inputs["dynamic"]:
            tensors["input_scale"] = torch.tensor([0.011 + 0.001 * seed])
            if not inputs["symmetric"]:
                tensors["input_zero_point"] = torch.tensor([9 - seed], dtype=torch.int8)
        return tensors, weight.double() * spread.double()

    return scheme(layout, {"num_bits": 8, "symmetric": True, **weights}, {"num_bits": 8, **inputs}), pack


TOKEN = {"strategy": "token", "dynamic": True, "symmetric": True}
TENSOR = {"strategy": "tensor", "dynamic": False, "symmetric": True}
INT, FLOAT = {"type": "int"}, {"type": "float"}
ROUNDING = {
    "int8 by row, int8 tokens": rounding("int-quantized", INT | {"strategy": "channel"}, INT | TOKEN),
    "int8 by row, int8 tokens with zero points": rounding(
        "int-quantized", INT | {"strategy": "channel"}, INT | TOKEN | {"symmetric": False}
    ),
    "int8 by row, a stored scale and zero point": rounding(
        "int-quantized", INT | {"strategy": "channel"}, INT | TENSOR | {"symmetric": False}
    ),
    "float8 by row, float8 tokens": rounding("float-quantized", FLOAT | {"strategy": "channel"}, FLOAT | TOKEN),
    "float8 by tensor, a stored scale": rounding("float-quantized", FLOAT | {"strategy": "tensor"}, FLOAT | TENSOR),
    "float8 by block, float8 groups of 32": rounding(
        "float-quantized", FLOAT | {"strategy": "block", "block_structure": [32, 32]},
        FLOAT | TOKEN | {"strategy": "group", "group_size": 32},
    ),
}  # fmt: skip


def fp8(block: tuple[int, int] | None, *, scale_dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """Scales of e8m0 are whole powers of two."""

    def pack(rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(seed)
        weight = (torch.randn(rows, columns) * 100).to(torch.float8_e4m3fn)
        shape = () if block is None else (-(-rows // block[0]), -(-columns // block[1]))
        scale = (torch.rand(shape) + 0.5) * 0.0005
        if scale_dtype is not torch.float32:
            scale = torch.exp2(torch.log2(scale).round())
        spread = scale.double()
        if block is not None:
            spread = spread.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        stored = (torch.log2(scale) + 127).to(torch.uint8) if scale_dtype is torch.uint8 else scale.to(scale_dtype)
        tensors = {"weight": weight, "weight_scale_inv": stored}
        if more.get("activation_scheme") == "static":
            tensors["activation_scale"] = torch.tensor(0.013)
        return tensors, weight.double() * spread

    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    return {**config, "weight_block_size": block and list(block), **more}, pack


def auto_fp8() -> Any:
    """The names of AutoFP8, and no word on blocks."""
    _, pack = fp8(None, activation_scheme="static")

    def renamed(rows: int, columns: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        tensors, dense = pack(rows, columns, seed)
        names = {"weight_scale_inv": "weight_scale", "activation_scale": "input_scale"}
        return {names.get(short, short): tensor for short, tensor in tensors.items()}, dense

    return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, renamed


FP8 = {
    "fp8, ragged blocks": fp8((48, 40)),
    "fp8, powers of two": fp8((32, 32), scale_dtype=torch.float8_e8m0fnu, scale_fmt="ue8m0"),
    "fp8, powers of two as bytes": fp8((32, 32), scale_dtype=torch.uint8, scale_fmt="ue8m0"),
    "fp8, one scale, a stored one for inputs": fp8(None, activation_scheme="static"),
    "fp8, one scale, tokens": fp8(None),
    "fp8, a stored scale by AutoFP8": auto_fp8(),
}
ALL = CASES | ROUNDING | FP8
