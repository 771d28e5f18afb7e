"""Matches the rules of a weight map with the tensors of a checkpoint: every name and shape, before a byte is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

from torch import Tensor

from pluglm.contracts.text import Checkpoint
from pluglm.contracts.weights import WeightMap, WeightRule
from pluglm.errors import CheckpointError

#: How many names a message lists.
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
    prefix = spelled_prefix(weights, names)
    found: list[Assignment] = []
    missing: list[str] = []
    used = set(chain.from_iterable(packed.values()))
    for rule in plain_rules(weights, packed):
        sources = tuple(respelled(name, weights.prefixes[0], prefix) for name in rule.sources)
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
            f"{checkpoint.path} lacks {len(missing)} of the tensors this model needs: {some(missing)}.",
            why=f"it holds {len(names)} tensors, such as {some(sorted(names)[:3])}.",
            fix="Check that config.json and the weights belong together and that every shard is there; "
            "missing weights are never filled in.",
            path=str(checkpoint.path), tensor=missing[0], missing=tuple(missing),
        )  # fmt: skip
    explained = list(weights.ignored) + [f"{prefix}{p}" for p in weights.ignored]
    surplus = [name for name in names if name not in used and not any(fnmatchcase(name, p) for p in explained)]
    if surplus:
        raise CheckpointError(
            f"{checkpoint.path} holds {len(surplus)} tensors that this model has no place for: {some(surplus)}.",
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
            f"this architecture's weight map fills {len(nowhere)} parameters that its module lacks: {some(nowhere)}.",
            why="these tensors would be left out in silence.",
            fix="Report this to the authors of the architecture plugin, with the config.json.",
            path=str(checkpoint.path), tensor=nowhere[0],
        )  # fmt: skip
    given |= {name for name in wanted if module_of(name) in packed}
    # An optional rule whose target is no parameter (a tied head) needs nothing.
    unfilled = sorted(wanted - given)
    if unfilled:
        raise CheckpointError(
            f"the weight map of this architecture leaves {len(unfilled)} parameters empty: {some(unfilled)}.",
            why="no rule has them as a target, or the file lacks an optional tensor that this config needs.",
            fix="Report this to the authors of the architecture plugin, with the config.json.",
            path=str(checkpoint.path),
            tensor=unfilled[0],
        )
    return found


def in_layout(weights: WeightMap, names: Collection[str]) -> WeightMap:
    """The map without the rules of other layouts than this file's: the one with most tensors here, else the first."""
    layouts = dict.fromkeys(rule.layout for rule in weights.rules if rule.layout is not None)
    if not layouts:
        return weights
    spelled = spelled_prefix(weights, names)

    def hits(layout: str) -> int:
        sources = chain.from_iterable(rule.sources for rule in weights.rules if rule.layout == layout)
        return sum(respelled(source, weights.prefixes[0], spelled) in names for source in sources)

    best = max(layouts, key=hits)
    return dataclasses.replace(weights, rules=tuple(r for r in weights.rules if r.layout in (None, best)))


def spelled_prefix(weights: WeightMap, names: Collection[str]) -> str:
    """Which spelling of the optional prefix this file uses: the one under which most rules find their sources."""
    first = weights.prefixes[0]

    def hits(prefix: str) -> int:
        return sum(respelled(source, first, prefix) in names for rule in weights.rules for source in rule.sources)

    return max(weights.prefixes, key=hits)


def respelled(name: str, written: str, spelled: str) -> str:
    """A name of the map with the prefix that this file uses."""
    return spelled + name[len(written) :] if name.startswith(written) else name


def plain_rules(weights: WeightMap, packed: Collection[str]) -> Iterator[WeightRule]:
    """The rules of what is not packed. Where a fused tensor is packed in part, the rest bears its module's names."""
    for rule in weights.rules:
        rest = [target for target in rule.targets if module_of(target) not in packed]
        if len(rest) == len(rule.targets):
            yield rule
        else:
            yield from (WeightRule((target,), (target,)) for target in rest)


def check_shapes(a: Assignment, checkpoint: Checkpoint, parameters: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless this rule gives what its targets need."""
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
        narrow = [info.dtype for info in infos if info.dtype.startswith("F8")]
        if target in parameters and narrow:
            raise _mismatch(checkpoint, name, f"it is stored as {narrow[0]}, which says nothing without its scales")


def _mismatch(checkpoint: Checkpoint, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {name!r} of {checkpoint.path} does not fit the model.", why=why + ".",
        fix="Check that config.json and the weights belong together; packed weights need their quantizer's "
        "quantization_config.",
        path=str(checkpoint.path), tensor=name,
    )  # fmt: skip


def module_of(parameter: str) -> str:
    """The module that owns a parameter, by name."""
    return parameter.rpartition(".")[0]


def some(names: list[str]) -> str:
    """The first few names, for a message."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(repr(name) for name in names[:SHOWN]) + more
