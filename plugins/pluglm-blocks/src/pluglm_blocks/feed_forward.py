"""Feed-forward parts: plain and gated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from pluglm.contracts import FeedForward
from pluglm_blocks.ops import ACTIVATIONS

if TYPE_CHECKING:
    from pluglm_blocks.context import BuildContext
    from pluglm_blocks.pass_state import PassState


class PlainFeedForward(nn.Module):
    """down(act(up(x))) (Vaswani et al. 2017, section 3.3). Parameters: up [F, C], down [C, F]."""

    def __init__(self, op: FeedForward, context: BuildContext) -> None:
        super().__init__()
        self.up = nn.Linear(op.hidden_size, op.intermediate_size, bias=op.bias, dtype=context.dtype)
        self.down = nn.Linear(op.intermediate_size, op.hidden_size, bias=op.bias, dtype=context.dtype)
        self.down_scale = op.down_scale
        self._act = ACTIVATIONS[op.activation]

    def forward(self, x: Tensor, state: PassState) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        y: Tensor = self.down(self._act(self.up(x)))
        return y if self.down_scale == 1.0 else y * self.down_scale


class GatedFeedForward(nn.Module):
    """down(act(gate_scale * gate(x)) * up(x)) (Shazeer 2020, section 2). Parameters: gate, up [F, C], down [C, F]."""

    def __init__(self, op: FeedForward, context: BuildContext) -> None:
        super().__init__()
        self.gate = nn.Linear(op.hidden_size, op.intermediate_size, bias=op.bias, dtype=context.dtype)
        self.up = nn.Linear(op.hidden_size, op.intermediate_size, bias=op.bias, dtype=context.dtype)
        self.down = nn.Linear(op.intermediate_size, op.hidden_size, bias=op.bias, dtype=context.dtype)
        self.gate_scale, self.down_scale = op.gate_scale, op.down_scale
        self._activation, self._act = op.activation, ACTIVATIONS[op.activation]
        self._kernel = context.kernels.get("gated_act")

    def forward(self, x: Tensor, state: PassState) -> Tensor:
        """[B, T, C] -> [B, T, C]."""
        gate = self.gate(x)  # [B, T, F]
        if self.gate_scale != 1.0:
            gate = gate * self.gate_scale
        if self._kernel is None:
            h = self._act(gate) * self.up(x)  # `ops.gated_act`, without its look-up by name
        else:
            h = self._kernel(gate, self.up(x), self._activation)
        y: Tensor = self.down(h)  # [B, T, C]
        return y if self.down_scale == 1.0 else y * self.down_scale


def refusals(op: FeedForward, context: BuildContext) -> list[str]:
    """Every reason why this part cannot be built; empty: it can."""
    reasons = []
    if op.hidden_size != context.program.embedding.hidden_size:
        reasons.append(f"its hidden_size is {op.hidden_size}, the model's {context.program.embedding.hidden_size}")
    if op.activation not in ACTIVATIONS:
        reasons.append(f"activation {op.activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if not op.gated and op.gate_scale != 1.0:
        reasons.append(f"a plain feed-forward has no gate to scale by {op.gate_scale}")
    return reasons


def build_feed_forward(op: FeedForward, context: BuildContext) -> nn.Module:
    """The module of one `FeedForward`."""
    return (GatedFeedForward if op.gated else PlainFeedForward)(op, context)
