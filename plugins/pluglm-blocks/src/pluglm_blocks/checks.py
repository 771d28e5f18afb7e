"""What a program must hold to before it is built: every reason against it, each with its place.

The checks of a single op stand beside the op; here is what concerns the program as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pluglm.contracts import Attention, Branch, LatentAttention, Norm, Part, SharedSlot, Slot, StateSpace
from pluglm.contracts import Layer as LayerProgram
from pluglm.contracts.program import PROGRAM_VERSION
from pluglm_blocks import norm as norms
from pluglm_blocks.layer import Layer

if TYPE_CHECKING:
    from pluglm_blocks.context import BuildContext


def program_refusals(context: BuildContext) -> list[str]:
    """Every reason why this program cannot be built with these parts; empty: it can."""
    program = context.program
    if program.version != PROGRAM_VERSION:
        return [f"the program has version {program.version}, these blocks build version {PROGRAM_VERSION}"]
    if reasons := [f"slot {i}: {reason}" for i, reason in _slots(program.slots)]:
        return reasons  # the checks below follow shared slots to their sources
    reasons = [f"embedding: {reason}" for reason in _embedding(context)]
    written: set[int] = set()
    for i, layer in enumerate(program.layers):
        reasons += [f"layers.{i}: {reason}" for reason in _layer(layer)]
        for branch in layer.branches:
            for part in branch.parts:
                reasons += [f"layers.{i}.{part.name}: {reason}" for reason in _part(part, branch, context, written)]
    if program.final_norm is not None:
        reasons += [f"norm: {reason}" for reason in _norm(program.final_norm, context)]
    if (backend := context.parts.attention) is not None:
        for spec in program.attention_specs():
            reasons += [f"attention backend {backend.name}: {reason}" for reason in backend.refusals(spec)]
    return reasons


def _embedding(context: BuildContext) -> Iterator[str]:
    embedding, limit = context.program.embedding, context.program.max_seq_len
    if embedding.norm is not None:
        yield from _norm(embedding.norm, context)
    rows = embedding.learned_positions
    if rows is not None and limit is not None and rows < limit + embedding.position_offset:
        yield f"{rows} learned positions are too few for {limit} tokens with an offset of {embedding.position_offset}"


def _layer(layer: LayerProgram) -> Iterator[str]:
    parts = [part for branch in layer.branches for part in branch.parts]
    taken: set[str] = set()
    for part in parts:
        names = {part.name}
        names |= {f"{part.name}_norm_in"} if part.norm_in is not None else set()
        names |= {f"{part.name}_norm_out"} if part.norm_out is not None else set()
        if not part.name.isidentifier() or part.name.startswith("_") or hasattr(Layer, part.name):
            yield f"{part.name!r} cannot be the name of a part"
        if names & taken:
            yield f"two parts give parameters the place {sorted(names & taken)[0]!r}"
        taken |= names
    if not layer.branches or any(not branch.parts for branch in layer.branches):
        yield "a branch without parts (or a layer without branches) adds nothing"


def _part(part: Part, branch: Branch, context: BuildContext, written: set[int]) -> Iterator[str]:
    for norm in (part.norm_in, part.norm_out):
        if norm is not None:
            yield from _norm(norm, context)
    if part.share_norm_in and (part is branch.parts[0] or part.norm_in is not None):
        yield "share_norm_in is for a later part of a branch, without a norm_in of its own"
    kind = context.ops.get(part.op.op)
    if kind is None:
        yield f"op {part.op.op!r} is not one of {', '.join(context.ops)}"
        return
    if isinstance(part.op, Attention | LatentAttention | StateSpace):
        if not 0 <= part.op.slot < len(context.program.slots):
            yield f"slot {part.op.slot} is not one of the program's {len(context.program.slots)}"
            return
        yield from _slot(part.op.slot, context, written)
    yield from kind.refusals(part.op, context)


def _slot(slot: int, context: BuildContext, written: set[int]) -> Iterator[str]:
    """A slot is written once a pass; a shared one is read after its source was written."""
    source = context.plan.source(slot)
    if source != slot and source not in written:
        yield f"slot {slot} shares slot {source}, which no earlier layer writes"
    if source == slot and slot in written:
        yield f"slot {slot} is written by an earlier layer already"
    if source == slot:
        written.add(slot)


def _slots(slots: Sequence[Slot]) -> Iterator[tuple[int, str]]:
    for i, slot in enumerate(slots):
        if not isinstance(slot, SharedSlot):
            continue
        if not 0 <= slot.source < len(slots) or isinstance(slots[slot.source], SharedSlot):
            yield i, f"shares slot {slot.source}, which holds nothing"


def _norm(norm: Norm, context: BuildContext) -> Iterator[str]:
    yield from norms.refusals(norm)
    if norm.size != context.program.embedding.hidden_size:
        yield f"a norm of size {norm.size} cannot take vectors of size {context.program.embedding.hidden_size}"
