"""The loss that the reference returns where labels are given: mean cross entropy, -100 left out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pluglm.errors import InputError

IGNORED = -100


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """[]. logits: [B, T, V]. labels: [B, T] of the same tokens. In float32."""
    if logits.shape[:2] != labels.shape:
        raise InputError(
            f"labels have shape {tuple(labels.shape)}, the logits {tuple(logits.shape[:2])}.",
            fix="Pass one label for each token, and leave logits_to_keep out.", argument="labels",
        )  # fmt: skip
    wide = logits.float().reshape(-1, logits.shape[-1])
    return F.cross_entropy(wide, labels.reshape(-1).to(logits.device), ignore_index=IGNORED)


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """[]: of each token by the logits before it. logits: [B, T, V]. labels: [B, T], as a rule the input itself."""
    if logits.shape[:2] != labels.shape:
        return token_loss(logits, labels)  # raises
    return token_loss(logits[:, :-1], labels[:, 1:])


def shifted_right(labels: Tensor, start: int | None, pad: int | None) -> Tensor:
    """[B, T] what a decoder is fed to predict `labels`: the start token, then all but the last one."""
    if start is None or pad is None:
        raise InputError("labels need a start token and a pad token.", why="they become the decoder's input.",
                         fix="Set them in generation_config.", argument="labels")  # fmt: skip
    shifted = labels.new_full(labels.shape, start)
    shifted[:, 1:] = labels[:, :-1]
    return shifted.masked_fill(shifted == IGNORED, pad)
