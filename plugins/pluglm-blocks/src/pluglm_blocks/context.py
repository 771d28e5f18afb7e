"""What the parts of one decoder are given while they are built, and what each kind of op must provide for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pluglm.contracts import DecoderProgram, ModelParts
from pluglm.contracts.program import Op
from pluglm_blocks.pass_state import PassPlan


@dataclass(frozen=True)
class OpKind:
    """How one kind of op is checked and built.

    Attributes:
        refusals: (op, context) -> every reason why it cannot be built.
        build: (op, context) -> a module whose forward(x [B, T, C], state: PassState) returns [B, T, C].
    """

    refusals: Callable[[Any, BuildContext], list[str]]
    build: Callable[[Any, BuildContext], nn.Module]


@dataclass(frozen=True)
class BuildContext:
    """What the parts of one decoder need while they are built. dtype: of the parameters."""

    program: DecoderProgram
    parts: ModelParts
    plan: PassPlan
    dtype: torch.dtype
    ops: Mapping[str, OpKind]

    @property
    def kernels(self) -> Mapping[str, Callable[..., Any]]:
        """Op name -> callable, for the ops that a kernel plugin was chosen for."""
        return self.parts.kernels

    def build(self, op: Op) -> nn.Module:
        """The module of one op."""
        return self.ops[op.op].build(op, self)
