"""Mixtures of experts in Llama's form for pluglm: mixtral and qwen3_moe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pluglm.hookspecs import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import ModelDescription, ModelModule, ModelParts


@hookimpl
def pluglm_describe_model(config: Mapping[str, Any]) -> ModelDescription:
    """Read a config.json of one of the model types above. Imports no torch."""
    from pluglm_blocks.reading import describe

    from pluglm_arch_mixtral.families import FAMILIES

    return describe(config, FAMILIES, package="pluglm-arch-mixtral")


@hookimpl
def pluglm_build_model(parts: ModelParts) -> ModelModule:
    """Build the module that the description's program says; the config has been read by then."""
    from pluglm_blocks import build_decoder

    program = parts.description.program
    assert program is not None, "every description of this package has a program"
    return build_decoder(program, parts)
