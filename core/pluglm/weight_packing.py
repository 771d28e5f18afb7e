"""Which layers and tables a quantizer packs, and where a checkpoint keeps what it has packed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from itertools import chain

from torch import Tensor, nn

from pluglm.contracts.packed import TableReader
from pluglm.contracts.quantizer import PublishedQuantizer, Quantizer, TableQuantizer
from pluglm.contracts.text import Checkpoint
from pluglm.contracts.weights import WeightMap
from pluglm.errors import CheckpointError
from pluglm.weight_rules import module_of, respelled, some, spelled_prefix


def quantized_layers(
    module: nn.Module, quantizer: Quantizer, skip: tuple[str, ...]
) -> dict[str, nn.Linear | nn.Embedding]:
    """What this quantizer replaces, by name: linear layers, and tables of tied heads if it is a `TableQuantizer`.

    A layer that shares its weight with others is not replaced. A pattern that fits the head keeps its table, too.
    """
    uses = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))

    def kept(*names: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in names for pattern in skip)

    found: dict[str, nn.Linear | nn.Embedding] = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and uses[id(layer.weight)] == 1
        and not kept(name)
        and quantizer.refusal(name, layer.in_features, layer.out_features) is None
    }
    if not isinstance(quantizer, TableQuantizer):
        return found
    for name, table in module.named_modules():
        heads = _readers(module, table)
        if not isinstance(table, nn.Embedding) or not heads or uses[id(table.weight)] > 1 or kept(name, *heads):
            continue
        if quantizer.table_refusal(name, table.embedding_dim, table.num_embeddings) is None:
            found[name] = table
    return found


def _readers(module: nn.Module, table: nn.Module) -> dict[str, TableReader]:
    """The modules that read a table which is not their own, by name. Of what is no table: none."""
    named = module.named_modules() if isinstance(table, nn.Embedding) else ()
    reads = ((name, part) for name, part in named if getattr(part, "table", None) is table)  # few: the next is slow
    return {name: part for name, part in reads if isinstance(part, TableReader)}


def quantize_module(module: nn.Module, quantizer: Quantizer, skip: tuple[str, ...] = ()) -> int:
    """Replace the linear layers of a loaded module, one at a time, and tables. Returns how many."""
    names = list(quantized_layers(module, quantizer, skip))  # names alone: each layer goes when its successor is there
    for name in names:
        layer = module.get_submodule(name)
        weight, bias = layer.get_parameter("weight").detach(), getattr(layer, "bias", None)
        replace_layer(module, name, quantized(quantizer, layer, name, weight, None if bias is None else bias.detach()))
        del layer, weight, bias
    return len(names)


def quantized(quantizer: Quantizer, layer: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """What the quantizer makes of one of `quantized_layers`."""
    if not isinstance(layer, nn.Embedding):
        return quantizer.quantize(name, weight, bias)
    assert isinstance(quantizer, TableQuantizer)
    return quantizer.quantize_table(name, weight)


def unpacked(quantizer: Quantizer, layer: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """What the quantizer reads of one of `packed_layers`."""
    if not isinstance(layer, nn.Embedding):
        return quantizer.unpack(name, tensors)
    assert isinstance(quantizer, TableQuantizer)
    return quantizer.unpack_table(name, tensors)


def replace_layer(module: nn.Module, name: str, successor: nn.Module) -> None:
    """Put a quantizer's module in a layer's place; those who read a table from there are told."""
    readers = _readers(module, module.get_submodule(name))
    module.set_submodule(name, successor)
    for reader in readers.values():
        reader.take_table(successor)


def packed_places(weights: WeightMap) -> dict[str, str]:
    """Weight -> where its layer's packed tensors live: beside the tensor they replace. Not here: under its own name."""
    simple = (rule for rule in weights.rules if len(rule.targets) == len(rule.sources) == 1 and rule.transform is None)
    return {rule.targets[0]: module_of(rule.sources[0]) for rule in simple}


def is_packed(layer: nn.Module) -> bool:
    """Is this module a quantizer's? It then holds tensors, but no weight or bias of its own (`Quantizer.quantize`)."""
    own = {name for name, _ in layer.named_parameters(recurse=False)}
    return not own & {"weight", "bias"} and any(True for _ in chain(layer.parameters(), layer.buffers()))


def packed_layers(
    layers: Mapping[str, nn.Linear | nn.Embedding], quantizer: Quantizer, weights: WeightMap, checkpoint: Checkpoint
) -> dict[str, dict[str, str]]:
    """The layers that the checkpoint holds packed, each with short -> whole names of its tensors.

    A layer stays plain if the file has its plain weight and no packed tensor of it: it was skipped in packing.
    Raises: CheckpointError if packed tensors are missing.
    """
    names = checkpoint.tensors
    written, prefix = weights.prefixes[0], spelled_prefix(weights, names)
    plain = {target: rule.sources for rule in weights.rules for target in rule.targets}
    places = packed_places(weights)
    held: dict[str, set[str]] = defaultdict(set)
    for name in names:
        at, dot, _ = name.partition(".weight.")  # what belongs to a weight lies under its name: q.weight.absmax
        at = at if dot else module_of(name)
        held[at].add(name[len(at) + 1 :])
    asked = quantizer if isinstance(quantizer, PublishedQuantizer) else None
    found = {}
    for layer, plain_layer in layers.items():
        place = layer
        if f"{layer}.weight" in places:
            place = module_of(respelled(f"{places[f'{layer}.weight']}.weight", written, prefix))
        if asked is not None:
            sources = () if f"{layer}.weight" in places else plain.get(f"{layer}.weight", ())
            _check_whole(layer, {module_of(respelled(s, written, prefix)) for s in sources}, held, checkpoint)
            shorts = asked.stored_names(layer, place, frozenset(held.get(place, ())))
            if not shorts:
                continue
            if getattr(plain_layer, "bias", None) is not None and "bias" not in shorts:
                shorts += ("bias",)  # which the file lacks: said below
        else:
            shorts = quantizer.tensor_names(layer)
        tensors = {short: f"{place}.{short}" for short in shorts}
        both = {f"{layer}.weight", f"{layer}.bias"}
        weight = {respelled(source, written, prefix) for source in plain.get(f"{layer}.weight", ())}
        bias = {respelled(source, written, prefix) for source in plain.get(f"{layer}.bias", ())}
        is_plain = (bool(weight) and weight <= names.keys()) or f"{layer}.weight" in names
        if is_plain and not any(full in names for full in set(tensors.values()) - weight - bias - both):
            continue
        missing = [full for full in tensors.values() if full not in names]
        if missing:
            raise CheckpointError(
                f"{checkpoint.path} lacks packed tensors of {layer}: {some(missing)}.",
                why=f"its quantization_config says that {quantizer.name} packed this layer.",
                fix="Save the model again, or load the unpacked weights and quantize them.",
                path=str(checkpoint.path), tensor=missing[0],
            )  # fmt: skip
        found[layer] = tensors
    return found


def _check_whole(layer: str, modules: Collection[str], held: Mapping[str, set[str]], checkpoint: Checkpoint) -> None:
    """Packed tensors are read whole: raise CheckpointError if this layer would be a part of some, or turned."""
    for module in sorted(modules):
        if packed := sorted(held.get(module, set()) - {"weight", "bias"}):
            raise CheckpointError(
                f"{checkpoint.path} holds {module} packed, from which {layer} would have to be taken.",
                why="this model splits or turns that weight while it is read, and packed tensors are only read whole.",
                fix="Use an unpacked copy of the model.",
                path=str(checkpoint.path), tensor=f"{module}.{packed[0]}",
            )  # fmt: skip
