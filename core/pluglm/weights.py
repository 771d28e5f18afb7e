"""Weights into a module and out of it: every tensor accounted for, nothing copied that can be mapped.

The module is built on the meta device. Each rule of the weight map is checked by name and shape before the first byte
is read; then tensors are mapped from the file straight into parameters, and layers that a quantizer takes are replaced
one by one, so that never more than one of them is held in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pluglm.contracts.dtypes import torch_dtype
from pluglm.contracts.quantizer import Quantizer, UnpackingQuantizer
from pluglm.contracts.text import Checkpoint
from pluglm.contracts.weights import WeightMap, WeightRule
from pluglm.errors import CheckpointError, PlanError
from pluglm.weight_packing import (
    is_packed,
    packed_layers,
    packed_places,
    quantized,
    quantized_layers,
    replace_layer,
    unpacked,
)
from pluglm.weight_rules import Assignment, assign, check_shapes, in_layout, module_of, some


def load_weights(
    module: nn.Module, weights: WeightMap, checkpoint: Checkpoint, *,
    device: str, dtype: torch.dtype, quantizer: Quantizer | None = None, packed: bool = False,
    skip: tuple[str, ...] = (), track: Any = None,
) -> None:  # fmt: skip
    """Fill a module that was built on the meta device.

    Args:
        quantizer: replaces layers as they are read. packed: the checkpoint holds them packed already.
        skip: patterns of module names that stay in full precision.
        track: wraps the iteration to show progress.
    Raises: CheckpointError before any tensor is read, if names, shapes or dtypes do not fit.
    """
    if packed and isinstance(quantizer, UnpackingQuantizer):
        checkpoint, quantizer, packed = quantizer.unpacked(checkpoint), None, False
    weights = in_layout(weights, checkpoint.tensors)
    layers = quantized_layers(module, quantizer, skip) if quantizer is not None else {}
    replace = {} if packed else layers
    stored: dict[str, dict[str, str]] = {}
    if packed and quantizer is not None:
        stored = packed_layers(layers, quantizer, weights, checkpoint)
        if not stored:
            raise CheckpointError(
                f"{checkpoint.path} holds no packed layer.",
                why=f"its quantization_config says that {quantizer.name} packed the weights.",
                fix="Take quantization_config out of config.json if the weights are plain, or save the model again.",
                path=str(checkpoint.path), tensor=None,
            )  # fmt: skip
    elif quantizer is not None and not replace:
        raise PlanError(
            f"{quantizer.name} took none of the linear layers.", fix="Look at quantizer_skip and at its README."
        )
    shared = _parameter_names(module, weights)
    parameters = {name: module.get_parameter(name) for name in shared}
    assignments = assign(weights, checkpoint, set(parameters), packed={n: s.values() for n, s in stored.items()})
    for a in assignments:
        if a.sources:
            check_shapes(a, checkpoint, parameters)
    if quantizer is not None:
        for name, tensors in stored.items():
            held_as = {short: checkpoint.tensor(full) for short, full in tensors.items()}
            replace_layer(module, name, unpacked(quantizer, layers[name], name, held_as).to(device))
    held: dict[str, dict[str, Tensor]] = {}

    def put(target: str, tensor: Tensor) -> None:
        layer, _, leaf = target.rpartition(".")
        if layer not in replace or quantizer is None:
            value = nn.Parameter(tensor, requires_grad=False)
            for name in shared[target]:
                set_parameter(module, name, value)
            return
        parts = held.setdefault(layer, {})
        parts[leaf] = tensor
        if len(parts) == 1 + (getattr(replace[layer], "bias", None) is not None):
            del held[layer]
            weight, bias = parts["weight"], parts.get("bias")
            replace_layer(module, layer, quantized(quantizer, replace[layer], layer, weight, bias))

    def fill(a: Assignment) -> None:  # a function, so that nothing of one layer is alive when the next is read
        for target, tensor in zip(a.rule.targets, _read(a, checkpoint), strict=True):
            if target in parameters:
                wanted = dtype if a.rule.dtype is None else torch_dtype(a.rule.dtype)
                put(target, tensor.to(device=device, dtype=wanted if tensor.is_floating_point() else None))
            else:
                _check_tied(a.rule, tensor, module, checkpoint, assignments, dtype)

    def turn(a: Assignment) -> int:
        if a.rule.tied_to is not None:
            return 2  # what is compared comes after what it is compared with
        # Biases first: they are small and wait for their weight, never the other way round.
        return 0 if all(module_of(t) in replace and t.endswith(".bias") for t in a.rule.targets) else 1

    assignments.sort(key=turn)
    for a in track(assignments) if track is not None else assignments:
        if a.sources:
            fill(a)
    _check_filled(module, checkpoint)


def export_weights(
    module: nn.Module, weights: WeightMap, quantizer: Quantizer | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The module's tensors under their checkpoint names, one rule at a time: the inverse of `load_weights`."""
    weights = in_layout(weights, ())
    parameters = {name: module.get_parameter(name) for name in _parameter_names(module, weights)}
    modules = dict(module.named_modules())
    places = packed_places(weights)
    for rule in weights.rules:
        present = [target in parameters for target in rule.targets]
        if all(present):
            tensors: Any = [parameters[target].detach() for target in rule.targets]
            tensors = rule.transform.invert(tensors) if rule.transform is not None else tensors
            yield from zip(rule.sources, tensors, strict=True)
        elif quantizer is not None and rule.tied_to is None:
            for target in rule.targets:
                layer = modules.get(module_of(target))
                if target in parameters:  # the rest of a fused tensor of which a part is packed: see plain_rules
                    yield target, parameters[target].detach()
                elif target.endswith(".weight") and layer is not None and is_packed(layer):
                    place = places.get(target, module_of(target))
                    yield from ((f"{place}.{short}", tensor) for short, tensor in quantizer.pack(layer).items())


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where the meta parameter `name` is, keeping the tensor's storage; a Parameter is put in itself."""
    owner, _, leaf = name.rpartition(".")
    value = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    module.get_submodule(owner)._parameters[leaf] = value


def _read(a: Assignment, checkpoint: Checkpoint) -> Any:
    tensors = [checkpoint.tensor(name) for name in a.sources]
    return a.rule.transform.apply(tensors) if a.rule.transform is not None else tensors


def _check_tied(
    rule: WeightRule, tensor: Tensor, module: nn.Module, checkpoint: Checkpoint, assignments: list[Assignment],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """A tensor that the model ties to another one must equal it, or the file means another model."""
    assert rule.tied_to is not None, "assign refuses any other target that is no parameter"
    why = "config.json says that the two are one (tie_word_embeddings), so one of them would be lost."
    other: Tensor | None = dict(module.named_parameters()).get(rule.tied_to)
    if other is None:  # packed by now: the file has what it was made of, unless the file itself is packed
        source = next((a for a in assignments if rule.tied_to in a.rule.targets and a.sources), None)
        if source is None:
            raise CheckpointError(
                f"{checkpoint.path} holds {rule.sources[0]!r} beside {rule.tied_to!r} in packed form.",
                why=why, fix="Save the model again from its plain weights.",
                path=str(checkpoint.path), tensor=rule.sources[0],
            )  # fmt: skip
        read: Tensor = _read(source, checkpoint)[source.rule.targets.index(rule.tied_to)]
        other = read.to(dtype)
    if other.is_meta or not torch.equal(tensor.to(other.dtype), other.cpu()):
        raise CheckpointError(
            f"{checkpoint.path} holds {rule.sources[0]!r}, which differs from {rule.tied_to!r}.",
            why=why,
            fix="Set tie_word_embeddings to false in config.json if the file is right.",
            path=str(checkpoint.path),
            tensor=rule.sources[0],
        )


def _parameter_names(module: nn.Module, weights: WeightMap) -> dict[str, list[str]]:
    """All names of each parameter, under the one that a rule fills (modules may share parameters)."""
    filled = {target for rule in weights.rules if rule.tied_to is None for target in rule.targets}
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {min(group, key=lambda name: name not in filled): group for group in groups.values()}


def _check_filled(module: nn.Module, checkpoint: Checkpoint) -> None:
    left = [name for name, t in chain(module.named_parameters(), module.named_buffers()) if t.is_meta]
    if left:
        raise CheckpointError(
            f"{len(left)} tensors of the model have no values after loading: {some(left)}.",
            why="modules are built without storage; a buffer must be computed when it is first used, or be mapped.",
            fix="Report this to the authors of the architecture or quantizer plugin.",
            path=str(checkpoint.path), tensor=left[0],
        )  # fmt: skip
