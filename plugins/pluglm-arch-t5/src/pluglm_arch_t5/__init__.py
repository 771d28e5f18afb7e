"""T5 for pluglm: an encoder-decoder with a module of its own, which no `DecoderProgram` can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pluglm.hookspecs import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import EncoderDecoderModule, ModelDescription, ModelParts


@hookimpl
def pluglm_describe_model(config: Mapping[str, Any]) -> ModelDescription:
    """Read a config.json of model type t5. Imports no torch."""
    from pluglm_arch_t5.describe import describe

    return describe(config)


@hookimpl
def pluglm_build_model(config: Mapping[str, Any], parts: ModelParts) -> EncoderDecoderModule:
    """Build the module. Raises UnsupportedRequestError for float16, in which T5's residual stream overflows."""
    from pluglm_arch_t5.config import read_config
    from pluglm_arch_t5.t5 import build  # imports torch

    return build(read_config(config)[0], parts)
