"""Weights into a module and out of it: every tensor accounted for, nothing copied that can be mapped.

The module is built on the meta device. Each rule of the weight map is checked by name and shape before the first byte
is read; then tensors are mapped from the file straight into parameters, and linear layers that a quantizer takes are
replaced one by one, so that never more than one of them is held in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from pluglm.contracts.quantizer import Quantizer
from pluglm.contracts.text import Checkpoint
from pluglm.contracts.weights import WeightMap, WeightRule
from pluglm.errors import CheckpointError

SHOWN = 8


@dataclass(frozen=True)
class Assignment:
    """One rule with its checkpoint names as this file spells them. sources: empty if an optional rule has none."""

    rule: WeightRule
    sources: tuple[str, ...]


def assign(weights: WeightMap, checkpoint: Checkpoint, wanted: set[str], *, packed: set[str]) -> list[Assignment]:
    """Match rules and tensors, each way.

    Args:
        wanted: names of the module's parameters. packed: module names whose `.weight` comes packed (not by the rules).
    Raises: CheckpointError naming missing, surplus or unexplained tensors.
    """
    names = dict(checkpoint.tensors)
    prefix = _prefix(weights, names)
    found: list[Assignment] = []
    missing: list[str] = []
    used: set[str] = set()
    for rule in weights.rules:
        if all(_module_of(target) in packed for target in rule.targets):
            continue
        sources = tuple(_strip(name, weights.prefixes[0], prefix) for name in rule.sources)
        present = [name in names for name in sources]
        if all(present):
            used.update(sources)
            found.append(Assignment(rule, sources))
        elif rule.optional and not any(present):
            found.append(Assignment(rule, ()))
        else:
            missing += [name for name, there in zip(sources, present, strict=True) if not there]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of the tensors this model needs: {_some(missing)}.",
            why=f"it holds {len(names)} tensors, such as {_some(sorted(names)[:3])}.",
            fix="Check that config.json and the weights belong together and that every shard is there; "
            "missing weights are never filled in.",
            path=str(checkpoint.path), tensor=missing[0], missing=tuple(missing),
        )  # fmt: skip
    explained = [p for p in weights.ignored] + [f"{prefix}{p}" for p in weights.ignored]
    surplus = [
        name for name in names
        if name not in used and not any(fnmatchcase(name, p) for p in explained) and _packed_owner(name, packed, weights) is None
    ]  # fmt: skip
    if surplus:
        raise CheckpointError(
            f"{checkpoint.path} holds {len(surplus)} tensors that this model has no place for: {_some(surplus)}.",
            why="a weight that is left out changes every result.",
            fix="Check model_type and the sizes in config.json, or use the plugin that the model's authors name.",
            path=str(checkpoint.path), tensor=surplus[0], surplus=tuple(surplus),
        )
    given = {target for a in found if a.sources for target in a.rule.targets}
    given |= {name for name in wanted if _module_of(name) in packed}
    # An optional rule whose target is no parameter (a tied head) needs nothing.
    unfilled = sorted(wanted - given)
    if unfilled:
        raise CheckpointError(
            f"the weight map of this architecture leaves {len(unfilled)} parameters empty: {_some(unfilled)}.",
            why="no rule has them as a target, or the file lacks an optional tensor that this config needs.",
            fix="Report this to the authors of the architecture plugin, with the config.json.",
            path=str(checkpoint.path), tensor=unfilled[0],
        )
    return found


def load_weights(
    module: nn.Module, weights: WeightMap, checkpoint: Checkpoint, *,
    device: str, dtype: torch.dtype, quantizer: Quantizer | None = None, packed: bool = False,
    skip: tuple[str, ...] = (), track: Any = None,
) -> None:  # fmt: skip
    """Fill a module that was built on the meta device.

    Args:
        quantizer: replaces linear layers as they are read. packed: the checkpoint holds them packed already.
        skip: patterns of module names that stay in full precision.
        track: wraps the iteration to show progress.
    Raises: CheckpointError before any tensor is read, if names, shapes or dtypes do not fit.
    """
    replace = quantized_layers(module, quantizer, skip) if quantizer is not None else {}
    packed_names = set(replace) if packed else set()
    parameters = dict(module.named_parameters())
    assignments = assign(weights, checkpoint, set(parameters), packed=packed_names)
    for a in assignments:
        if a.sources:
            _check_shapes(a, checkpoint, parameters)
    if packed and quantizer is not None:
        for name in packed_names:
            module.set_submodule(name, quantizer.unpack(name, _packed_tensors(name, quantizer, weights, checkpoint)).to(device))
    held: dict[str, dict[str, Tensor]] = {}
    assignments.sort(key=lambda a: a.rule.tied_to is not None)  # what is compared comes after what it is compared with
    for a in track(assignments) if track is not None else assignments:
        if not a.sources:
            continue
        tensors = _read(a, checkpoint)
        for target, tensor in zip(a.rule.targets, tensors, strict=True):
            if target not in parameters:
                _check_tied(a.rule, target, tensor, module, checkpoint)
                continue
            tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            layer = _module_of(target)
            if layer in replace and not packed and quantizer is not None:
                held.setdefault(layer, {})[target.rpartition(".")[2]] = tensor
                if len(held[layer]) == 1 + (replace[layer].bias is not None):
                    parts = held.pop(layer)
                    module.set_submodule(layer, quantizer.quantize(layer, parts["weight"], parts.get("bias")))
            else:
                set_parameter(module, target, tensor)


def quantized_layers(module: nn.Module, quantizer: Quantizer, skip: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers that this quantizer replaces, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and not any(fnmatchcase(name, pattern) for pattern in skip)
        and quantizer.refusal(name, layer.in_features, layer.out_features) is None
    }


def quantize_module(module: nn.Module, quantizer: Quantizer, skip: tuple[str, ...] = ()) -> int:
    """Replace the linear layers of a loaded module, one at a time. Returns how many."""
    layers = quantized_layers(module, quantizer, skip)
    for name, layer in layers.items():
        bias: Tensor | None = getattr(layer, "bias", None)  # torch types it as always there
        module.set_submodule(name, quantizer.quantize(name, layer.weight.detach(), None if bias is None else bias.detach()))
    return len(layers)


def export_weights(
    module: nn.Module, weights: WeightMap, quantizer: Quantizer | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The module's tensors under their checkpoint names, one rule at a time: the inverse of `load_weights`."""
    parameters = dict(module.named_parameters())
    modules = dict(module.named_modules())
    for rule in weights.rules:
        present = [target in parameters for target in rule.targets]
        if all(present):
            tensors: Any = [parameters[target].detach() for target in rule.targets]
            tensors = rule.transform.invert(tensors) if rule.transform is not None else tensors
            yield from zip(rule.sources, tensors, strict=True)
        elif quantizer is not None and rule.targets[0].endswith(".weight"):
            for target in rule.targets:
                layer = modules.get(_module_of(target))
                if layer is not None and target not in parameters:
                    for short, tensor in quantizer.pack(layer).items():
                        yield f"{_packed_prefix(target, weights)}.{short}", tensor


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where the meta parameter `name` is, keeping the tensor's storage."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _read(a: Assignment, checkpoint: Checkpoint) -> Any:
    tensors = [checkpoint.tensor(name) for name in a.sources]
    return a.rule.transform.apply(tensors) if a.rule.transform is not None else tensors


def _check_shapes(a: Assignment, checkpoint: Checkpoint, parameters: Mapping[str, Tensor]) -> None:
    infos = [checkpoint.tensors[name] for name in a.sources]
    shapes = [tuple(info.shape) for info in infos]
    name = a.sources[0]
    try:
        results = list(a.rule.transform.shapes(shapes)) if a.rule.transform is not None else shapes
    except ValueError as e:
        raise _mismatch(checkpoint, name, f"{shapes} does not fit this model: {e}") from e
    for target, shape in zip(a.rule.targets, results, strict=True):
        if target in parameters and tuple(parameters[target].shape) != tuple(shape):
            raise _mismatch(
                checkpoint, name,
                f"it has shape {list(shape)}, config.json makes {target} {list(parameters[target].shape)}",
            )
        if target in parameters and parameters[target].is_floating_point() and not infos[0].dtype.startswith(("F", "BF")):
            raise _mismatch(checkpoint, name, f"it is stored as {infos[0].dtype}, a weight must be floating point")


def _mismatch(checkpoint: Checkpoint, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name!r} of {checkpoint.path} does not fit the model.", why=why + ".",
        fix="Check that config.json and the weights belong together; packed weights need their quantizer's "
        "quantization_config.",
        path=str(checkpoint.path), tensor=name,
    )  # fmt: skip


def _check_tied(rule: WeightRule, target: str, tensor: Tensor, module: nn.Module, checkpoint: Checkpoint) -> None:
    """A tensor that the model ties to another one must equal it, or the file means another model."""
    if rule.tied_to is None:
        return
    other = module.get_parameter(rule.tied_to)
    if other.is_meta or not torch.equal(tensor.to(other.dtype), other.cpu()):
        raise CheckpointError(
            f"{checkpoint.path} holds {rule.sources[0]!r}, which differs from {rule.tied_to!r}.",
            why="config.json says that the two are one (tie_word_embeddings), so one of them would be lost.",
            fix="Set tie_word_embeddings to false in config.json if the file is right.",
            path=str(checkpoint.path), tensor=rule.sources[0],
        )


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _prefix(weights: WeightMap, names: Mapping[str, Any]) -> str:
    """Which spelling of the optional prefix this file uses: the one under which most rules find their sources."""
    first = weights.prefixes[0]

    def hits(prefix: str) -> int:
        return sum(_strip(source, first, prefix) in names for rule in weights.rules for source in rule.sources)

    return max(weights.prefixes, key=hits)


def _strip(name: str, written: str, spelled: str) -> str:
    return spelled + name[len(written) :] if name.startswith(written) else name


def _packed_prefix(target: str, weights: WeightMap) -> str:
    """Where a packed layer's tensors live in the checkpoint: beside the weight they replace, or under its own name."""
    for rule in weights.rules:
        if rule.targets == (target,) and rule.transform is None:
            return _module_of(rule.sources[0])
    return _module_of(target)


def _packed_tensors(name: str, quantizer: Quantizer, weights: WeightMap, checkpoint: Checkpoint) -> dict[str, Tensor]:
    prefix = _packed_prefix(f"{name}.weight", weights)
    wanted = {short: f"{prefix}.{short}" for short in quantizer.tensor_names(name)}
    missing = [full for full in wanted.values() if full not in checkpoint.tensors]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks packed tensors of {name}: {_some(missing)}.",
            why=f"its quantization_config says that {quantizer.name} packed this layer.",
            fix="Save the model again, or load the unpacked weights and quantize them.",
            path=str(checkpoint.path), tensor=missing[0],
        )
    return {short: checkpoint.tensor(full) for short, full in wanted.items()}


def _packed_owner(name: str, packed: set[str], weights: WeightMap) -> str | None:
    for layer in packed:
        if name.startswith(_packed_prefix(f"{layer}.weight", weights) + "."):
            return layer
    return None


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
