"""A mixture of feed-forward experts: a router chooses a few for each token, and only these are computed.

The experts' weights are stacked along a first dimension of E. Tokens are sorted by expert, so that each chosen expert
is one matrix product over its tokens; an expert that no token chose is not read. On an accelerator the sizes of the
groups come to the host once a layer, which a captured graph cannot hold.

Quantizers replace `nn.Linear` alone: the experts, the router and the shared expert's gate stay in the model's dtype.
The shared expert is an ordinary feed-forward and is quantized like one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pluglm.contracts import Experts, FeedForward
from pluglm_blocks import feed_forward
from pluglm_blocks.ops import ACTIVATIONS

if TYPE_CHECKING:
    from pluglm_blocks.context import BuildContext
    from pluglm_blocks.pass_state import PassState

SCORINGS = ("softmax", "softmax_topk", "sigmoid")


class Weights(nn.Module):
    """A weight [..., out, in] and, if `bias`, a bias [..., out]: no `nn.Linear`, so no quantizer takes it."""

    def __init__(self, *shape: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[:-1], dtype=dtype)) if bias else None

    def of(self, expert: int, x: Tensor) -> Tensor:
        """[n, in] -> [n, out] by one expert's matrix."""
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class Router(Weights):
    """Scores, choice and weights, all in float32. Parameters: weight [E, C], bias [E], correction_bias [E] float32.

    References differ in the product's dtype: DeepSeek-V3 takes it in float32, Mixtral, Qwen 3 and gpt-oss in the
    model's, and go to float32 for the softmax. Scores rounded to 16 bits tie, so here all of it is float32.
    """

    def __init__(self, op: Experts, context: BuildContext) -> None:
        super().__init__(op.num_experts, op.expert.hidden_size, bias=op.router_bias, dtype=context.dtype)
        self.correction_bias = nn.Parameter(torch.empty(op.num_experts)) if op.correction_bias else None
        self._op = op

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C] -> weights [N, k] float32 and the experts [N, k] they belong to, int64."""
        op = self._op
        logits = F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())  # [N, E]
        if op.scoring == "softmax_topk":
            top, experts = logits.topk(op.top_k, dim=-1)
            weights = top.softmax(-1)
        else:
            scores = logits.sigmoid() if op.scoring == "sigmoid" else logits.softmax(-1)
            experts = self._choices(scores).topk(op.top_k, dim=-1).indices
            weights = scores.gather(1, experts)  # the correction chooses, it does not weigh
        if op.normalise and op.scoring != "softmax_topk":  # which sums to one already
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
        return weights if op.scale == 1.0 else weights * op.scale, experts

    def _choices(self, scores: Tensor) -> Tensor:
        """What is compared for the choice: corrected scores, without the groups that lost. [N, E].

        A group's score is the sum of its two best corrected scores (DeepSeek-AI 2024, "DeepSeek-V3", section 2.1.2), or
        without a correction its best score ("DeepSeek-V2", section 2.2.2).
        """
        op = self._op
        if self.correction_bias is not None:
            scores = scores + self.correction_bias.float()
        if op.num_groups == 1:
            return scores
        grouped = scores.view(len(scores), op.num_groups, -1)  # [N, groups, E / groups]
        best = grouped.amax(-1) if self.correction_bias is None else grouped.topk(2, dim=-1).values.sum(-1)
        lost = torch.ones_like(best, dtype=torch.bool).scatter(1, best.topk(op.top_k_groups, dim=-1).indices, False)
        return grouped.masked_fill(lost[..., None], -torch.inf).flatten(-2)


class MixtureOfExperts(nn.Module):
    """sum(weight_e * expert_e(x) for the chosen e) (+ sigmoid(shared_gate(x)) * shared(x)).

    Parameters: router.…, gate and up [E, F, C], down [E, C, F], shared.…, shared_gate.weight [1, C].
    Source: Jiang et al. 2024, "Mixtral of Experts", section 2.1; the shared expert: Dai et al. 2024, "DeepSeekMoE",
    section 3.2, its gate: Qwen 2 MoE.
    """

    def __init__(self, op: Experts, context: BuildContext) -> None:
        super().__init__()
        expert, dtype = op.expert, context.dtype
        inner = (op.num_experts, expert.intermediate_size, expert.hidden_size)  # [E, F, C]
        outer = (op.num_experts, expert.hidden_size, expert.intermediate_size)  # [E, C, F]
        self.router = Router(op, context)
        self.gate = Weights(*inner, bias=expert.bias, dtype=dtype) if expert.gated else None
        self.up = Weights(*inner, bias=expert.bias, dtype=dtype)
        self.down = Weights(*outer, bias=expert.bias, dtype=dtype)
        self.shared = feed_forward.build_feed_forward(op.shared, context) if op.shared is not None else None
        self.shared_gate = Weights(1, expert.hidden_size, bias=False, dtype=dtype) if op.shared_gate else None
        self.gate_scale, self.down_scale = expert.gate_scale, expert.down_scale
        self.clamp, self.alpha = op.clamp, op.alpha
        self._activation, self._act = expert.activation, ACTIVATIONS[expert.activation]
        self._kernel = context.kernels.get("gated_act")

    def forward(self, x: Tensor, state: PassState) -> Tensor:
        """[B, T, C] -> [B, T, C]; the experts' results are added in float32 and rounded once."""
        rows = x.flatten(0, 1)  # [N, C]
        weights, experts = self.router(rows)  # [N, k] each
        y = torch.einsum("nk,nkc->nc", weights, self._chosen(rows, experts).float()).to(x.dtype).view_as(x)
        if self.shared is None:
            return y
        shared: Tensor = self.shared(x, state)  # [B, T, C]
        if self.shared_gate is not None:
            shared = F.linear(x, self.shared_gate.weight).sigmoid() * shared
        return y + shared

    def _chosen(self, x: Tensor, experts: Tensor) -> Tensor:
        """Each token by each of its experts: x [N, C], experts [N, k] -> [N, k, C]. One product an expert."""
        if len(x) == 1:  # decoding: nothing to sort
            return torch.stack([self._expert(e, x) for e in experts[0].tolist()], dim=1)  # [1, k, C]
        order = experts.flatten().argsort(stable=True)  # [N * k], the pairs of token and choice by expert
        sizes = experts.flatten().bincount(minlength=len(self.up.weight)).tolist()
        groups = torch.split(x[order // experts.shape[1]], sizes)  # E of [n, C]
        y = torch.cat([self._expert(e, group) for e, group in enumerate(groups) if len(group)])
        return y.new_empty(y.shape).index_copy_(0, order, y).view(*experts.shape, -1)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        """down(act(up(x))), or gated: [n, C] -> [n, C]."""
        up = self.up.of(e, x)  # [n, F]
        y = self.down.of(e, self._act(up) if self.gate is None else self._gated(self.gate.of(e, x), up))
        return y if self.down_scale == 1.0 else y * self.down_scale

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.gate_scale != 1.0:
            gate = gate * self.gate_scale
        if self.clamp is not None:
            return clamped_gate(gate, up, self.clamp, self.alpha)
        if self._kernel is not None:
            gated: Tensor = self._kernel(gate, up, self._activation)
            return gated
        return self._act(gate) * up


def clamped_gate(gate: Tensor, up: Tensor, limit: float, alpha: float) -> Tensor:
    """min(gate, limit) * sigmoid(alpha * min(gate, limit)) * (1 + up clamped to ±limit), element by element.

    Args:
        gate, up: [..., F].
    Returns: [..., F].
    Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", section 2.3; the numbers are the released model's.
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def refusals(op: Experts, context: BuildContext) -> list[str]:
    """Every reason why this part cannot be built; empty: it can."""
    E, expert, per_group = op.num_experts, op.expert, op.num_experts // max(op.num_groups, 1)
    reasons = [f"expert: {reason}" for reason in feed_forward.refusals(expert, context)]
    if op.shared is not None:
        reasons += [f"shared expert: {reason}" for reason in feed_forward.refusals(op.shared, context)]
    if op.scoring not in SCORINGS:
        reasons.append(f"scoring {op.scoring!r} is not one of {', '.join(SCORINGS)}")
    if not 1 <= op.top_k <= E:
        reasons.append(f"{op.top_k} experts cannot be chosen among {E}")
    if not op.normalise and op.scoring == "softmax_topk":
        reasons.append("a softmax over the chosen experts is normalised, it cannot be otherwise")
    if op.correction_bias and op.scoring == "softmax_topk":
        reasons.append("a correction_bias needs scores of all experts, softmax_topk has those of the chosen ones")
    if op.shared_gate and op.shared is None:
        reasons.append("shared_gate is for a shared expert, and there is none")
    return reasons + _clamp_refusals(op, expert) + _group_refusals(op, per_group)


def _clamp_refusals(op: Experts, expert: FeedForward) -> list[str]:
    if op.clamp is None:
        return [] if op.alpha == 1.0 else [f"alpha {op.alpha} belongs to a clamp, and there is none"]
    reasons = [] if op.clamp > 0 else [f"a clamp of {op.clamp} leaves nothing of the gate"]
    if not expert.gated or expert.activation != "silu":
        reasons.append("a clamp is defined for gated experts with silu (gate * sigmoid(alpha * gate))")
    return reasons


def _group_refusals(op: Experts, per_group: int) -> list[str]:
    if op.num_groups == 1:
        return [] if op.top_k_groups == 1 else [f"{op.top_k_groups} groups cannot be chosen among 1"]
    if op.num_groups < 1 or op.num_experts % op.num_groups:
        return [f"{op.num_experts} experts cannot be dealt into {op.num_groups} groups"]
    if not 1 <= op.top_k_groups <= op.num_groups:
        return [f"{op.top_k_groups} groups cannot be chosen among {op.num_groups}"]
    reasons = []
    if op.scoring == "softmax_topk":
        reasons.append("groups are chosen by scores of all experts, softmax_topk has those of the chosen ones")
    if op.correction_bias and per_group < 2:
        reasons.append("a group's score is the sum of its best two experts, and a group has one")
    if op.top_k > op.top_k_groups * per_group:
        reasons.append(f"{op.top_k} experts cannot be chosen from {op.top_k_groups} groups of {per_group}")
    return reasons


def build_experts(op: Experts, context: BuildContext) -> nn.Module:
    """The module of one `Experts`."""
    return MixtureOfExperts(op, context)
