"""What this executor cannot represent: every reason, found before a weight is packed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pluglm_blocks import Decoder
from torch import nn

from pluglm.contracts import Attention, ExecutorRequest, Experts, FeedForward
from pluglm.contracts.program import PROGRAM_VERSION, Op
from pluglm_executor_cpu import native
from pluglm_executor_cpu.packed_layers import packed_modules

OPTIONS = ("threads", "isa", "activations")
#: How rows of x meet packed weights.
ACTIVATIONS = ("float32", "int8")


def refusals(request: ExecutorRequest) -> list[str]:
    """Every reason against this request; empty: it can be built, if the caches can be written in place."""
    reasons = list(_asked(request))
    library = native.library()
    if library is None:
        reasons.append(native.MISSING)
    device = request.device.partition(":")[0]
    if device != "cpu":
        reasons.append(f"it runs on the CPU, not on {request.device}")
    if request.dtype not in native.DTYPES:
        reasons.append(f"it computes {' and '.join(native.DTYPES)} weights, not {request.dtype}")
    program = request.description.program
    if program is None:
        return [*reasons, "the model has no program: its architecture brings a module of its own"]
    if program.version != PROGRAM_VERSION:
        return [*reasons, f"the program has version {program.version}, it reads version {PROGRAM_VERSION}"]
    if not isinstance(request.module, Decoder):
        reasons.append(f"the module is a {type(request.module).__name__}, not the one that the program means")
    else:
        packed = packed_modules(request.module, program)
        reasons += _weights(request.module, request.dtype, tuple(packed))
        if not packed and ("activations", "int8") in request.options:
            reasons.append("activations='int8' is for packed weights, and the model has none")
    if not any(isinstance(op, Attention) for op in program.ops()):
        reasons.append("the model has no attention that keeps keys and values")
    found: dict[str, None] = {}
    for op in program.ops():
        for reason in _op(op):
            found.setdefault(reason)
    return reasons + list(found)


def _asked(request: ExecutorRequest) -> Iterator[str]:
    if request.variant is not None:
        yield f"it has no variants, so not {request.variant!r}"
    library = native.library()
    for name, value in request.options:
        if name not in OPTIONS:
            yield f"it has no option {name!r}, only {', '.join(OPTIONS)}"
        elif name == "threads" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield f"its option threads is a whole number from 1 on, not {value!r}"
        elif name == "isa" and value not in native.ISAS:
            yield f"its option isa is one of {', '.join(native.ISAS)}, not {value!r}"
        elif name == "activations" and value not in ACTIVATIONS:
            yield f"its option activations is one of {', '.join(ACTIVATIONS)}, not {value!r}"
        elif name == "isa" and library is not None and value not in library.isas:
            yield f"this machine has no {value}, only {', '.join(library.isas)}"


def _weights(module: nn.Module, dtype: str, packed: tuple[str, ...]) -> Iterator[str]:
    """Other layers that a quantizer or an adapter has replaced compute something else than their weight says."""
    replaced: dict[str, list[str]] = {}
    within = tuple(f"{name}." for name in packed)
    for name, child in module.named_modules():
        plain = type(child).__module__.startswith("pluglm_blocks.") or type(child) in _PLAIN
        if plain or name in packed or name.startswith(within):
            continue
        replaced.setdefault(type(child).__qualname__, []).append(name)
    for kind, names in replaced.items():
        yield (
            f"{len(names)} layers are {kind} (the first is {names[0]}): it multiplies plain weights, and packed ones "
            "that a linear layer's successor shows as a GroupedLinear or BlockedLinear does, the token table's as a "
            "BlockedEmbedding"
        )
    for name, parameter in module.named_parameters():
        if name.startswith(within):
            continue
        own = type(parameter) in (nn.Parameter, torch.Tensor) and parameter.layout is torch.strided
        wanted = "float32" if name.endswith(".router.correction_bias") else dtype  # whatever the model's dtype
        if not own or str(parameter.dtype).removeprefix("torch.") != wanted or parameter.device.type != "cpu":
            yield f"{name} is {_described(parameter)}, not a plain {wanted} tensor on the CPU"
            return


_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList)


def _described(parameter: Any) -> str:
    return f"a {type(parameter).__name__} of {str(parameter.dtype).removeprefix('torch.')} on {parameter.device}"


def _op(op: Op) -> Iterator[str]:
    if isinstance(op, FeedForward):
        if op.activation not in native.ACTIVATIONS:
            yield f"it has no activation {op.activation!r}"
        return
    if isinstance(op, Experts):
        yield from _op(op.expert)
        if op.shared is not None:
            yield from _op(op.shared)
        if op.scoring not in native.SCORINGS:
            yield f"it has no scoring {op.scoring!r}"
        if op.num_experts > native.MOST_EXPERTS:
            yield f"it has room for {native.MOST_EXPERTS} experts, not for {op.num_experts}"
        return
    if not isinstance(op, Attention):
        yield f"it does not compute {op.op.replace('_', ' ')}"
        return
    if op.cross:
        yield "it does not compute cross-attention"
    if op.relative_buckets is not None or op.spec.bias:
        yield "it does not compute relative buckets (learned biases by distance)"
    if op.query_temperature is not None:
        yield "it does not compute query temperatures"
    if op.spec.mask.prefix:
        yield "it does not compute prefix masks"
