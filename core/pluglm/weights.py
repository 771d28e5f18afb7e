"""Weights into a module and out of it: every tensor accounted for, nothing copied that can be mapped.

The module is built on the meta device. Each rule of the weight map is checked by name and shape before the first byte
is read; then tensors are mapped from the file straight into parameters, and linear layers that a quantizer takes are
replaced one by one, so that never more than one of them is held in full precision.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pluglm.contracts.dtypes import torch_dtype
from pluglm.contracts.quantizer import Quantizer
from pluglm.contracts.text import Checkpoint
from pluglm.contracts.weights import WeightMap, WeightRule
from pluglm.errors import CheckpointError, PlanError

SHOWN = 8


@dataclass(frozen=True)
class Assignment:
    """One rule with its checkpoint names as this file spells them. sources: empty if an optional rule has none."""

    rule: WeightRule
    sources: tuple[str, ...]


def assign(
    weights: WeightMap, checkpoint: Checkpoint, wanted: set[str], *, packed: Mapping[str, Collection[str]]
) -> list[Assignment]:
    """Match rules and tensors, each way.

    Args:
        wanted: names of the module's parameters. packed: modules that come packed (not by the rules), each with the
            names of its tensors in the checkpoint.
    Raises: CheckpointError naming missing, surplus or unexplained tensors.
    """
    names = dict(checkpoint.tensors)
    prefix = _prefix(weights, names)
    found: list[Assignment] = []
    missing: list[str] = []
    used = set(chain.from_iterable(packed.values()))
    for rule in _plain_rules(weights, packed):
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
    explained = list(weights.ignored) + [f"{prefix}{p}" for p in weights.ignored]
    surplus = [name for name in names if name not in used and not any(fnmatchcase(name, p) for p in explained)]
    if surplus:
        raise CheckpointError(
            f"{checkpoint.path} holds {len(surplus)} tensors that this model has no place for: {_some(surplus)}.",
            why="a weight that is left out changes every result.",
            fix="Check model_type and the sizes in config.json, or use the plugin that the model's authors name.",
            path=str(checkpoint.path),
            tensor=surplus[0],
            surplus=tuple(surplus),
        )
    given = {target for a in found if a.sources for target in a.rule.targets}
    tied = {target for a in found if a.rule.tied_to is not None for target in a.rule.targets}
    if nowhere := sorted(given - wanted - tied):
        raise CheckpointError(
            f"this architecture's weight map fills {len(nowhere)} parameters that its module lacks: {_some(nowhere)}.",
            why="these tensors would be left out in silence.",
            fix="Report this to the authors of the architecture plugin, with the config.json.",
            path=str(checkpoint.path), tensor=nowhere[0],
        )  # fmt: skip
    given |= {name for name in wanted if _module_of(name) in packed}
    # An optional rule whose target is no parameter (a tied head) needs nothing.
    unfilled = sorted(wanted - given)
    if unfilled:
        raise CheckpointError(
            f"the weight map of this architecture leaves {len(unfilled)} parameters empty: {_some(unfilled)}.",
            why="no rule has them as a target, or the file lacks an optional tensor that this config needs.",
            fix="Report this to the authors of the architecture plugin, with the config.json.",
            path=str(checkpoint.path),
            tensor=unfilled[0],
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
    weights = _in_layout(weights, checkpoint.tensors)
    replace = quantized_layers(module, quantizer, skip) if quantizer is not None else {}
    stored: dict[str, dict[str, str]] = {}
    if packed and quantizer is not None:
        replace, stored = {}, _packed_layers(replace, quantizer, weights, checkpoint)
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
            _check_shapes(a, checkpoint, parameters)
    if quantizer is not None:
        for name, tensors in stored.items():
            part = quantizer.unpack(name, {short: checkpoint.tensor(full) for short, full in tensors.items()})
            module.set_submodule(name, part.to(device))
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
            module.set_submodule(layer, quantizer.quantize(layer, parts["weight"], parts.get("bias")))

    def fill(a: Assignment) -> None:  # a function, so that nothing of one layer is alive when the next is read
        for target, tensor in zip(a.rule.targets, _read(a, checkpoint), strict=True):
            if target in parameters:
                wanted = dtype if a.rule.dtype is None else torch_dtype(a.rule.dtype)
                put(target, tensor.to(device=device, dtype=wanted if tensor.is_floating_point() else None))
            else:
                _check_tied(a.rule, tensor, module, checkpoint)

    def turn(a: Assignment) -> int:
        if a.rule.tied_to is not None:
            return 2  # what is compared comes after what it is compared with
        # Biases first: they are small and wait for their weight, never the other way round.
        return 0 if all(_module_of(t) in replace and t.endswith(".bias") for t in a.rule.targets) else 1

    assignments.sort(key=turn)
    for a in track(assignments) if track is not None else assignments:
        if a.sources:
            fill(a)
    _check_filled(module, checkpoint)


def quantized_layers(module: nn.Module, quantizer: Quantizer, skip: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear layers that this quantizer replaces, by name. One that shares its weight with others is not."""
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and uses[id(layer.weight)] == 1
        and not any(fnmatchcase(name, pattern) for pattern in skip)
        and quantizer.refusal(name, layer.in_features, layer.out_features) is None
    }


def quantize_module(module: nn.Module, quantizer: Quantizer, skip: tuple[str, ...] = ()) -> int:
    """Replace the linear layers of a loaded module, one at a time. Returns how many."""
    names = list(quantized_layers(module, quantizer, skip))  # names alone: each layer goes when its successor is there
    for name in names:
        layer = module.get_submodule(name)
        weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
        module.set_submodule(name, quantizer.quantize(name, weight, None if bias is None else bias.detach()))
        del layer, weight, bias
    return len(names)


def export_weights(
    module: nn.Module, weights: WeightMap, quantizer: Quantizer | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The module's tensors under their checkpoint names, one rule at a time: the inverse of `load_weights`."""
    weights = _in_layout(weights, ())
    parameters = {name: module.get_parameter(name) for name in _parameter_names(module, weights)}
    modules = dict(module.named_modules())
    places = _packed_places(weights)
    for rule in weights.rules:
        present = [target in parameters for target in rule.targets]
        if all(present):
            tensors: Any = [parameters[target].detach() for target in rule.targets]
            tensors = rule.transform.invert(tensors) if rule.transform is not None else tensors
            yield from zip(rule.sources, tensors, strict=True)
        elif quantizer is not None and rule.tied_to is None:
            for target in rule.targets:
                layer = modules.get(_module_of(target))
                if target in parameters:  # the rest of a fused tensor of which a part is packed: see _plain_rules
                    yield target, parameters[target].detach()
                elif target.endswith(".weight") and layer is not None and _is_packed(layer):
                    place = places.get(target, _module_of(target))
                    yield from ((f"{place}.{short}", tensor) for short, tensor in quantizer.pack(layer).items())


def set_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where the meta parameter `name` is, keeping the tensor's storage; a Parameter is put in itself."""
    owner, _, leaf = name.rpartition(".")
    value = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    module.get_submodule(owner)._parameters[leaf] = value


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
                checkpoint,
                name,
                f"it has shape {list(shape)}, config.json makes {target} {list(parameters[target].shape)}",
            )
        wrong = [info.dtype for info in infos if not info.dtype.startswith(("F", "BF"))]
        if target in parameters and parameters[target].is_floating_point() and wrong:
            raise _mismatch(checkpoint, name, f"it is stored as {wrong[0]}, a weight must be floating point")


def _mismatch(checkpoint: Checkpoint, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name!r} of {checkpoint.path} does not fit the model.", why=why + ".",
        fix="Check that config.json and the weights belong together; packed weights need their quantizer's "
        "quantization_config.",
        path=str(checkpoint.path), tensor=name,
    )  # fmt: skip


def _check_tied(rule: WeightRule, tensor: Tensor, module: nn.Module, checkpoint: Checkpoint) -> None:
    """A tensor that the model ties to another one must equal it, or the file means another model."""
    assert rule.tied_to is not None, "assign refuses any other target that is no parameter"
    other = module.get_parameter(rule.tied_to)
    if other.is_meta or not torch.equal(tensor.to(other.dtype), other.cpu()):
        raise CheckpointError(
            f"{checkpoint.path} holds {rule.sources[0]!r}, which differs from {rule.tied_to!r}.",
            why="config.json says that the two are one (tie_word_embeddings), so one of them would be lost.",
            fix="Set tie_word_embeddings to false in config.json if the file is right.",
            path=str(checkpoint.path),
            tensor=rule.sources[0],
        )


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _in_layout(weights: WeightMap, names: Collection[str]) -> WeightMap:
    """The map without the rules of other layouts than this file's: the one with most tensors here, else the first."""
    layouts = dict.fromkeys(rule.layout for rule in weights.rules if rule.layout is not None)
    if not layouts:
        return weights
    spelled = _prefix(weights, names)

    def hits(layout: str) -> int:
        sources = chain.from_iterable(rule.sources for rule in weights.rules if rule.layout == layout)
        return sum(_strip(source, weights.prefixes[0], spelled) in names for source in sources)

    best = max(layouts, key=hits)
    return dataclasses.replace(weights, rules=tuple(r for r in weights.rules if r.layout in (None, best)))


def _prefix(weights: WeightMap, names: Collection[str]) -> str:
    """Which spelling of the optional prefix this file uses: the one under which most rules find their sources."""
    first = weights.prefixes[0]

    def hits(prefix: str) -> int:
        return sum(_strip(source, first, prefix) in names for rule in weights.rules for source in rule.sources)

    return max(weights.prefixes, key=hits)


def _strip(name: str, written: str, spelled: str) -> str:
    return spelled + name[len(written) :] if name.startswith(written) else name


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
            f"{len(left)} tensors of the model have no values after loading: {_some(left)}.",
            why="modules are built without storage; a buffer must be computed when it is first used, or be mapped.",
            fix="Report this to the authors of the architecture or quantizer plugin.",
            path=str(checkpoint.path), tensor=left[0],
        )  # fmt: skip


def _plain_rules(weights: WeightMap, packed: Collection[str]) -> Iterator[WeightRule]:
    """The rules of what is not packed. Where a fused tensor is packed in part, the rest bears its module's names."""
    for rule in weights.rules:
        rest = [target for target in rule.targets if _module_of(target) not in packed]
        if len(rest) == len(rule.targets):
            yield rule
        else:
            yield from (WeightRule((target,), (target,)) for target in rest)


def _packed_places(weights: WeightMap) -> dict[str, str]:
    """Weight -> where its layer's packed tensors live: beside the tensor they replace. Not here: under its own name."""
    simple = (rule for rule in weights.rules if len(rule.targets) == len(rule.sources) == 1 and rule.transform is None)
    return {rule.targets[0]: _module_of(rule.sources[0]) for rule in simple}


def _is_packed(layer: nn.Module) -> bool:
    """Is this module a quantizer's? It then holds tensors, but no weight or bias of its own (`Quantizer.quantize`)."""
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    return not own & {"weight", "bias"} and any(True for _ in chain(layer.parameters(), layer.buffers()))


def _packed_layers(
    layers: Collection[str], quantizer: Quantizer, weights: WeightMap, checkpoint: Checkpoint
) -> dict[str, dict[str, str]]:
    """The layers that the checkpoint holds packed, each with short -> whole names of its tensors.

    A layer stays plain if the file has its plain weight and no packed tensor of it: it was skipped in packing.
    Raises: CheckpointError if packed tensors are missing.
    """
    names = checkpoint.tensors
    written, prefix = weights.prefixes[0], _prefix(weights, names)
    plain = {target: rule.sources for rule in weights.rules for target in rule.targets}
    places = _packed_places(weights)
    found = {}
    for layer in layers:
        place = places.get(f"{layer}.weight", layer)
        tensors = {
            short: _strip(f"{place}.{short}", written, prefix) if f"{layer}.weight" in places else f"{place}.{short}"
            for short in quantizer.tensor_names(layer)
        }
        both = {f"{layer}.weight", f"{layer}.bias"}
        weight = {_strip(source, written, prefix) for source in plain.get(f"{layer}.weight", ())}
        bias = {_strip(source, written, prefix) for source in plain.get(f"{layer}.bias", ())}
        is_plain = (bool(weight) and weight <= names.keys()) or f"{layer}.weight" in names
        if is_plain and not any(full in names for full in set(tensors.values()) - weight - bias - both):
            continue
        missing = [full for full in tensors.values() if full not in names]
        if missing:
            raise CheckpointError(
                f"{checkpoint.path} lacks packed tensors of {layer}: {_some(missing)}.",
                why=f"its quantization_config says that {quantizer.name} packed this layer.",
                fix="Save the model again, or load the unpacked weights and quantize them.",
                path=str(checkpoint.path), tensor=missing[0],
            )  # fmt: skip
        found[layer] = tensors
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
