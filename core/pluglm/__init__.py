"""pluglm: a microkernel for transformer language models. The core decides who does the work; plugins do it.

    import pluglm
    lm = pluglm.load("folder-or-org/repo")
    print(lm.generate("def read_csv(path):", max_new_tokens=64))

Importing this package imports neither torch nor any plugin; names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluglm.checkpoint import ConfigReader
    from pluglm.completions import Completion
    from pluglm.contracts import GenerationConfig, GenerationOutput
    from pluglm.errors import (
        CacheError,
        CheckpointError,
        ConfigError,
        ContextLengthError,
        GenerationError,
        GrammarError,
        IncompatiblePluginError,
        InputError,
        ManifestError,
        ModelError,
        ModelNotFoundError,
        PlanError,
        PluginConflictError,
        PluginDisabledError,
        PluginError,
        PluginNotFoundError,
        PluglmError,
        QuarantinedError,
        SaveError,
        UnsupportedRequestError,
    )
    from pluglm.hookspecs import hookimpl
    from pluglm.lm import LanguageModel
    from pluglm.loading import explain, load
    from pluglm.plan import Plan
    from pluglm.row_texts import Piece

__version__ = "0.1.0"

_HOMES = {
    "Completion": "pluglm.completions",
    "ConfigReader": "pluglm.checkpoint",
    "GenerationConfig": "pluglm.contracts",
    "GenerationOutput": "pluglm.contracts",
    "LanguageModel": "pluglm.lm",
    "Piece": "pluglm.row_texts",
    "Plan": "pluglm.plan",
    "explain": "pluglm.loading",
    "hookimpl": "pluglm.hookspecs",
    "load": "pluglm.loading",
    **dict.fromkeys(
        (
            "CacheError", "CheckpointError", "ConfigError", "ContextLengthError", "GenerationError",
            "GrammarError", "IncompatiblePluginError", "InputError", "ManifestError", "ModelError",
            "ModelNotFoundError", "PlanError", "PluginConflictError", "PluginDisabledError", "PluginError",
            "PluginNotFoundError", "PluglmError", "QuarantinedError", "SaveError", "UnsupportedRequestError",
        ),
        "pluglm.errors",
    ),
}  # fmt: skip

__all__ = [
    "CacheError", "CheckpointError", "Completion", "ConfigError", "ConfigReader", "ContextLengthError",
    "GenerationConfig", "GenerationError", "GenerationOutput", "GrammarError", "IncompatiblePluginError", "InputError",
    "LanguageModel", "ManifestError", "ModelError", "ModelNotFoundError", "Piece", "Plan", "PlanError",
    "PluginConflictError", "PluginDisabledError", "PluginError", "PluginNotFoundError", "PluglmError",
    "QuarantinedError", "SaveError", "UnsupportedRequestError", "__version__", "explain", "hookimpl", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pluglm' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
