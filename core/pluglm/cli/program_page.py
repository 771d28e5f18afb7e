"""A DecoderProgram as text a person reads: the model on one page, equal layers folded."""

from __future__ import annotations

import dataclasses
from typing import Any

from pluglm.contracts.model import ModelDescription
from pluglm.contracts.program import Branch, DecoderProgram, Layer, Part


def program_page(description: ModelDescription) -> str:
    """The page for one model."""
    d = description
    head = f"{d.model_type}: {d.num_layers} layers, hidden {d.hidden_size}, vocabulary {d.vocab_size}"
    if description.program is None:
        return f"{head}\n  no program: the architecture brings a module of its own"
    p = description.program
    lines = [
        f"{head}, context {p.max_seq_len or 'unbounded'}, program {p.hash[:12]}",
        f"  embedding  {_fields(p.embedding)}",
    ]
    for first, last, layer in _runs(p):
        lines.append(
            f"  layer {first}" if first == last else f"  layers {first} to {last}, alike but for their cache slot"
        )
        for branch in layer.branches:
            lines += _branch(branch)
    lines.append(f"  final norm {_fields(p.final_norm) if p.final_norm else 'none'}")
    lines.append(f"  head       {_fields(p.head)}")
    return "\n".join(lines)


def _branch(branch: Branch) -> list[str]:
    scale = f" * {branch.scale:g}" if branch.scale != 1.0 else ""
    lines = [f"    x = x + {' + '.join(part.name for part in branch.parts)}{scale}"]
    for part in branch.parts:
        lines += _part(part)
    return lines


def _part(part: Part) -> list[str]:
    lines = []
    if part.norm_in is not None:
        lines.append(f"      {part.name}: norm in  {_fields(part.norm_in)}")
    lines.append(f"      {part.name}: {part.op.op}  {_fields(part.op, skip=('op', 'slot'))}")
    if part.norm_out is not None:
        lines.append(f"      {part.name}: norm out {_fields(part.norm_out)}")
    return lines


def _fields(value: Any, skip: tuple[str, ...] = ()) -> str:
    """Fields that differ from their defaults, nested dataclasses in parentheses."""
    shown = []
    for f in dataclasses.fields(value):
        item = getattr(value, f.name)
        if f.name in skip or item == f.default:
            continue
        text = (
            f"({_fields(item)})"
            if dataclasses.is_dataclass(item)
            else f"{item:g}"
            if isinstance(item, float)
            else f"{item}"
        )
        shown.append(f"{f.name}={text}")
    return " ".join(shown)


def _runs(program: DecoderProgram) -> list[tuple[int, int, Layer]]:
    """Runs of layers that differ only in their slots: (first, last, layer)."""
    runs: list[tuple[int, int, Layer]] = []
    for i, layer in enumerate(program.layers):
        if runs and _without_slots(runs[-1][2]) == _without_slots(layer):
            runs[-1] = (runs[-1][0], i, runs[-1][2])
        else:
            runs.append((i, i, layer))
    return runs


def _without_slots(layer: Layer) -> Layer:
    def part(p: Part) -> Part:
        op: Any = p.op
        return dataclasses.replace(p, op=dataclasses.replace(op, slot=0)) if hasattr(op, "slot") else p

    return Layer(tuple(dataclasses.replace(b, parts=tuple(map(part, b.parts))) for b in layer.branches))
