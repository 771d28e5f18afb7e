"""What this executor cannot compile: every reason, found while the model is planned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pluglm_blocks import Decoder
from torch import nn

from pluglm.contracts import Attention, ExecutorRequest, FeedForward
from pluglm.contracts.program import Op

BACKENDS = ("inductor", "aot_eager", "eager")
MODES = ("default", "max-autotune-no-cudagraphs")
#: Modes that record a CUDA graph: see the README.
CAPTURING = ("reduce-overhead", "max-autotune")
OPTIONS = ("backend", "cache_dir", "max_shapes", "mode")
_PLAIN = (nn.Linear, nn.Embedding, nn.ModuleList)


def refusals(request: ExecutorRequest) -> list[str]:
    """Every reason against this request; empty: it can be built."""
    reasons = list(_asked(request))
    backend = dict(request.options).get("backend", "inductor")
    if backend == "inductor" and (missing := no_compiler(request.device)) is not None:
        reasons.append(missing)
    program = request.description.program
    if program is None:
        return [*reasons, "the model has no program: its architecture brings a module of its own"]
    if not isinstance(request.module, Decoder):
        return [*reasons, f"the module is a {type(request.module).__name__}, not the one that the program means"]
    reasons += _replaced(request.module)
    return reasons + list(dict.fromkeys(reason for op in program.ops() for reason in _op(op)))


def no_compiler(device: str) -> str | None:
    """Why inductor cannot make code for a device, or None."""
    if device.partition(":")[0] == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return (
                "torch.compile needs a C++ compiler for CPUs and finds none: install g++ or clang++, or name one in "
                "the environment variable CXX"
            )
        return None
    from torch.utils._triton import has_triton

    return None if has_triton() else f"torch.compile needs triton on {device} and finds none: `pip install triton`"


def _asked(request: ExecutorRequest) -> Iterator[str]:
    if request.variant is not None:
        yield f"it has no variants, so not {request.variant!r}"
    options: dict[str, Any] = dict(request.options)
    for name, value in options.items():
        if name not in OPTIONS:
            yield f"it has no option {name!r}, only {', '.join(OPTIONS)}"
        elif name == "backend" and value not in BACKENDS:
            yield f"its option backend is one of {', '.join(BACKENDS)}, not {value!r}"
        elif name == "mode" and value in CAPTURING:
            yield (
                f"mode {value!r} records a CUDA graph of the whole pass, and the cache is appended to and attended to "
                f"between its pieces, with sizes that change; there are {' and '.join(MODES)}"
            )
        elif name == "mode" and value not in MODES:
            yield f"its option mode is one of {', '.join(MODES)}, not {value!r}"
        elif name == "mode" and options.get("backend", "inductor") != "inductor":
            yield f"only the backend inductor has modes, not {options['backend']!r}"
        elif name == "cache_dir" and (not isinstance(value, str) or not value):
            yield f"its option cache_dir is the name of a folder, not {value!r}"
        elif name == "cache_dir" and options.get("backend", "inductor") != "inductor":
            yield f"only the backend inductor keeps compiled code, not {options['backend']!r}"
        elif name == "max_shapes" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield f"its option max_shapes is a whole number from 1 on, not {value!r}"


def _replaced(module: nn.Module) -> Iterator[str]:
    """Layers of a quantizer or an adapter: what they call is theirs, and need not be known to torch.compile."""
    found: dict[str, list[str]] = {}
    for name, child in module.named_modules():
        if not type(child).__module__.startswith("pluglm_blocks.") and type(child) not in _PLAIN:
            found.setdefault(type(child).__qualname__, []).append(name)
    for kind, names in found.items():
        yield f"{len(names)} layers are {kind} (the first is {names[0]}): it compiles plain layers only"
    for name, parameter in module.named_parameters():
        if type(parameter) not in (nn.Parameter, torch.Tensor):
            yield f"{name} is a {type(parameter).__name__}: it compiles plain weights only"
            return


def _op(op: Op) -> Iterator[str]:
    if isinstance(op, FeedForward):
        return
    if not isinstance(op, Attention):
        yield f"it does not compile {op.op.replace('_', ' ')}"
        return
    if op.cross:
        yield "it does not compile cross-attention"
    if op.relative_buckets is not None or op.spec.bias:
        yield "it does not compile relative buckets: their size changes with every token"
