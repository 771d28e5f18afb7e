"""The arithmetic."""

import torch

from acme_attention import CALLS

FEATURES = {"grouped-heads"}


def refusals(spec):
    return [f"it does not know {name}" for name in spec.features if name not in FEATURES]


class GroupsAttention:
    name = "groups"
    views = ("dense",)

    def refusals(self, spec):
        return refusals(spec)

    def prepare(self, spec, q_positions, keys):
        q, k = q_positions[:, :, None], keys.positions[:, None, :]
        return (k >= 0) & (q >= 0) & (k <= q)  # [B or 1, T, S]

    def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
        CALLS["attend"] += 1
        k, v = view.dense()
        size = spec.num_heads // spec.num_kv_heads
        groups = []
        for j in range(spec.num_kv_heads):
            s = torch.einsum("bgtd,bsd->bgts", q[:, j * size : (j + 1) * size].float(), k[:, j].float()) * spec.scale
            s = s.masked_fill(~mask[:, None], -torch.inf)
            p = torch.softmax(s, dim=-1).nan_to_num(0.0)
            groups.append(torch.einsum("bgts,bsd->bgtd", p, v[:, j].float()))
        return torch.cat(groups, dim=1).to(q.dtype)
