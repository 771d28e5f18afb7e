"""Checkpoints of `pluglm-arch-mamba`, and the knobs of a state space."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from checkpoints import NO_TOKENS, VOCAB_SIZE, Variant
from rewriting import Knob, field, on
from torch import Tensor

from pluglm.contracts import DecoderProgram, Norm, StateSpace


def memory(key: str, noise: Tensor) -> Tensor | None:
    """Time steps and decays for which a head remembers some three to fifty tokens."""
    if key.endswith("dt_bias"):
        return noise - 3.0
    if key.endswith("A_log"):
        return 0.5 * noise
    return None


def older(config: dict[str, Any]) -> dict[str, Any]:
    """As Transformers 4 spells the limit of the time step, which is no JSON, and with what else it wrote."""
    low, _ = config["time_step_limit"]
    more = {"rms_norm": True, "norm_before_gate": True, "intermediate_size": config["expand"] * config["hidden_size"]}
    return {**config, "time_step_limit": [low, float("inf")], **more}


SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 3, "expand": 2, "num_heads": 6, "head_dim": 16,
    "state_size": 10, "n_groups": 2, "conv_kernel": 4, "chunk_size": 7, "layer_norm_epsilon": 1e-4, **NO_TOKENS,
}  # fmt: skip

VARIANTS: dict[str, Variant] = {
    "mamba2-biases": Variant("mamba2", {**SIZES, "use_bias": True, "n_groups": 3}, scale=memory, spell=older),
    "mamba2-tied": Variant(
        "mamba2",
        {
            **SIZES, "tie_word_embeddings": True, "use_conv_bias": False, "n_groups": 1, "conv_kernel": 3,
            "chunk_size": 256, "hidden_act": "gelu_pytorch_tanh", "residual_in_fp32": False,
        },
        scale=memory,
    ),
    "mamba2-limits": Variant(
        "mamba2", {**SIZES, "time_step_limit": [0.03, 0.2]}, scale=memory, cached_reference=False,
    ),
}  # fmt: skip


class Mamba2:
    """The reference as the tests call every other: its cache and its hidden states go by other names and places."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor, past_key_values: Any = None, **arguments: Any) -> SimpleNamespace:
        output = self._model(input_ids, cache_params=past_key_values, **arguments)
        states = output.hidden_states
        if states is not None:  # after each layer, then after the norm; what the others return is before each layer
            states = (self._model.backbone.embeddings(input_ids), *states[:-2], states[-1])
        return SimpleNamespace(logits=output.logits, past_key_values=output.cache_params, hidden_states=states)


ADAPTERS = {"mamba2": Mamba2}


def _limits(program: DecoderProgram, **changes: Any) -> DecoderProgram | None:
    return on(StateSpace, lambda op: op if op.dt_max is None else replace(op, **changes))(program)


def _norm(op: StateSpace, **changes: Any) -> StateSpace:
    return op if op.norm is None else replace(op, **changes)


def _other_norm(op: StateSpace) -> StateSpace:
    """None where there is one, and one without weights where there is none."""
    if op.norm is None:
        return replace(op, norm=Norm("rms", op.inner_size, 1e-4, weight=False))
    return replace(op, norm=None, norm_groups=1, norm_before_gate=False)


KNOBS: dict[str, Knob] = {
    "ssm.norm": on(StateSpace, _other_norm),
    "ssm.norm.eps": on(StateSpace, lambda op: op if op.norm is None else replace(op, norm=replace(op.norm, eps=0.05))),
    "ssm.norm_groups": on(StateSpace, lambda op: _norm(op, norm_groups=4 if op.norm_groups == 1 else 1)),
    "ssm.norm_before_gate": on(StateSpace, lambda op: _norm(op, norm_before_gate=not op.norm_before_gate)),
    "ssm.activation": on(StateSpace, lambda op: replace(op, activation="relu")),
    "ssm.conv_bias": field(StateSpace, "conv_bias", lambda _: False),
    "ssm.in_bias": field(StateSpace, "in_bias", lambda _: False),
    "ssm.out_bias": field(StateSpace, "out_bias", lambda _: False),
    "ssm.dt_min": lambda program: _limits(program, dt_min=0.0),
    "ssm.dt_max": lambda program: _limits(program, dt_max=None),
}  # fmt: skip

NOT_BROKEN = {
    **dict.fromkeys(
        (
            f"StateSpace.{name}"
            for name in ("inner_size", "num_heads", "head_dim", "num_groups", "state_size", "conv_kernel")
        ),
        "another size does not load, or is refused",
    ),
    "StateSpace.slot": "names a place", "StateSpace.op": "names a class", "StateSlot.states": "sizes of the cache",
    "StateSlot.kind": "names a class",
    "StateSpace.chunk_size": "how the work is cut up, which changes no result; test_state_space cuts it otherwise",
    "StateSpace.conv_bias": "one where there is none has weights of its own; where there is one, it is left out",
    "DecoderProgram.float32_residual": "float32 has nothing to keep",
}  # fmt: skip
