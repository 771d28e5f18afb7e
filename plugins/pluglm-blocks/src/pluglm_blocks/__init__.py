"""The readable torch modules that a `DecoderProgram` describes, and the plain reference of every kernel op.

`pluglm_blocks.reading` reads configs and imports no torch, so the modules are imported when one of them is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluglm_blocks.build import OPS, build_decoder
    from pluglm_blocks.context import BuildContext, OpKind
    from pluglm_blocks.decoder import Decoder
    from pluglm_blocks.rope import RotaryTable

__all__ = ["OPS", "BuildContext", "Decoder", "OpKind", "RotaryTable", "build_decoder"]

_HOMES = {
    "OPS": "build", "build_decoder": "build", "BuildContext": "context", "OpKind": "context", "Decoder": "decoder",
    "RotaryTable": "rope",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
