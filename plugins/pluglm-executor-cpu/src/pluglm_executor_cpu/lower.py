"""A `DecoderProgram` and its weights become the list of operations that the library carries out.

Plain weights are packed here, once; a quantizer's blocks are pointed to where they lie. A row of x, and of everything
between, is float32. The order is that of `pluglm_blocks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from ctypes import addressof

import torch
from torch import Tensor, nn

from pluglm.contracts import Attention, DecoderProgram, Experts, FeedForward, Norm, Part, Rope, SharedSlot
from pluglm.contracts.program import Branch
from pluglm_executor_cpu import native
from pluglm_executor_cpu.packed_layers import EMBED, PackedLayer


def padded(size: int) -> int:
    """A row of `size` floats fills this many: whole registers, and what a weight's filled-up columns meet."""
    return -(-size // 16) * 16


class Buffer:
    """[SLICE_ROWS, padded(size)] floats, zero until written; the last ones of a row always."""

    def __init__(self, size: int) -> None:
        self.tensor = torch.zeros(native.SLICE_ROWS, padded(size), dtype=torch.float32, device="cpu")
        self.pointer, self.row = self.tensor.data_ptr(), self.tensor.shape[1]


class Lowered:
    """One model as operations.

    Attributes:
        ops: what `plan` points to. ropes: the distinct rotations, in the order of `Rotation` numbers.
        sources: for each slot, the one that holds its keys. held: tensors that the operations point into.
        nbytes: of weights that are held a second time.
    """

    def __init__(
        self, module: nn.Module, program: DecoderProgram, dtype: torch.dtype, library: native.Library,
        packed: Mapping[str, PackedLayer], *, rounds: bool = False,
    ) -> None:  # fmt: skip
        """packed: the layers that are no plain ones. rounds: what meets their weights is rounded to 8 bits."""
        self.program, self.dtype, self.library, self._packed = program, dtype, library, packed
        self._parameters = dict(module.named_parameters())
        self.held: list[Tensor] = []
        self._arrays: list[object] = []
        self.ropes: list[Rope] = []
        self.sources = [slot.source if isinstance(slot, SharedSlot) else i for i, slot in enumerate(program.slots)]
        self.nbytes = 0
        self._ops: list[native.Op] = []
        C = self._size = program.embedding.hidden_size
        self._widest = padded(C)
        self._buffers: dict[str, Buffer] = {}
        self._x = self._buffer("x", C)
        self._embed()
        for i, layer in enumerate(program.layers):
            for branch in layer.branches:
                self._branch(branch, f"layers.{i}.")
        self._logits()
        self.ops = (native.Op * len(self._ops))(*self._ops)
        self.plan = native.Plan(
            self.ops, len(self._ops), program.embedding.vocab_size, self._number(dtype), self._widest, rounds
        )

    # Weights

    def _number(self, dtype: torch.dtype) -> int:
        return native.DTYPES[str(dtype).removeprefix("torch.")]

    def _hold(self, tensor: Tensor) -> int:
        self.held.append(tensor)
        return tensor.data_ptr()

    def _float(self, name: str) -> Tensor:
        return self._parameters[name].detach().float().contiguous()

    def _matrices(self, op: native.Op, biases: Mapping[str, str | None]) -> None:
        """Give an operation the weights of these layers, side by side. biases: the name of each one's, if plain."""
        matrices, op.rows = [], 0
        for name, bias in biases.items():
            packed = self._packed.get(name)
            matrix = self._plain(name, bias) if packed is None else self._blocks(packed, bias)
            matrix.at = op.rows
            op.rows += matrix.rows
            op.columns = max(op.columns, matrix.columns)
            op.packed |= packed is not None
            matrices.append(matrix)
        self._widest = max(self._widest, padded(op.columns))
        array = (native.Matrix * len(matrices))(*matrices)
        self._arrays.append(array)
        op.matrices, op.num_matrices = addressof(array), len(matrices)

    def _plain(self, name: str, bias: str | None) -> native.Matrix:
        """A plain weight, packed into blocks of its own."""
        given = None if bias is None else self._bias(self._float(bias))
        return self._plain_matrix(self._parameters[f"{name}.weight"].detach(), given)

    def _plain_matrix(self, weight: Tensor, bias: int | None) -> native.Matrix:
        """A plain weight [rows, columns], packed into blocks of its own. bias: where it lies."""
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        rows, columns = weight.shape
        filled = -(-columns // 8) * 8
        out = torch.empty(padded(rows) * filled, dtype=self.dtype, device="cpu")
        self.library.pack(weight, out)
        self.nbytes += out.nbytes
        return native.Matrix(self._hold(out), None, None, bias, self._number(self.dtype), rows, filled, 0)

    def _blocks(self, layer: PackedLayer, bias: str | None) -> native.Matrix:
        """A quantizer's weight, where it lies. bias: a parameter that counts if the layer has none (a tied head's)."""
        blocks, offset, shift = layer.blocks, layer.blocks.offset, layer.bias
        if shift is None and bias in self._parameters:
            shift = self._float(bias)
        if not layer.shared:
            self.nbytes += sum(t.nbytes for t in (blocks.codes, blocks.scale, offset) if t is not None)
        return native.Matrix(
            self._hold(blocks.codes), self._hold(blocks.scale), None if offset is None else self._hold(offset),
            None if shift is None else self._bias(shift),
            native.PACKED_FORMS[blocks.bits], blocks.rows, blocks.columns, 0,
        )  # fmt: skip

    def _bias(self, bias: Tensor) -> int:
        """Filled up to whole blocks."""
        filled = torch.zeros(padded(len(bias)), dtype=torch.float32, device="cpu")
        filled[: len(bias)] = bias
        return self._hold(filled)

    def _norm(self, norm: Norm | None, name: str, *, scale: float = 1.0, size: int | None = None) -> native.Norm:
        """A norm, the offset added where `pluglm_blocks.norm` adds it: in the model's dtype, unless it casts late."""
        if norm is None:
            return native.Norm(None, None, 0, size or self._size, 0.0, scale)
        weight = bias = None
        if norm.weight:
            given = self._parameters[f"{name}.weight"].detach()
            late = norm.kind == "rms" and norm.cast_late
            weight = self._hold((given.float() + norm.offset if late else (given + norm.offset).float()).contiguous())
        if norm.bias:
            bias = self._hold(self._float(f"{name}.bias"))
        return native.Norm(weight, bias, native.NORMS[norm.kind], norm.size, norm.eps, scale)

    # Operations

    def _buffer(self, name: str, size: int) -> Buffer:
        """The buffer of this name and size; layers share them."""
        key = f"{name}:{padded(size)}"
        if key not in self._buffers:
            self._buffers[key] = Buffer(size)
        return self._buffers[key]

    def _op(self, kind: int, src: Buffer | None, dst: Buffer | None, norm: native.Norm | None = None) -> native.Op:
        op = native.Op(kind=kind, scale=1.0, gate_scale=1.0, rotation=-1)
        if src is not None:
            op.src, op.src_row = src.pointer, src.row
        if dst is not None:
            op.dst, op.dst_row = dst.pointer, dst.row
        op.norm = norm if norm is not None else self._norm(None, "", size=src.row if src is not None else None)
        self._ops.append(op)
        return op

    def _embed(self) -> None:
        embedding = self.program.embedding
        op = self._op(native.EMBED, None, self._x)
        op.dtype = self._number(self.dtype)
        if EMBED in self._packed:
            self._matrices(op, {EMBED: None})
        else:
            table = self._parameters[f"{EMBED}.weight"].detach().contiguous()
            op.weight = self._hold(table)
            op.rows, op.columns = table.shape
        op.scale = float(torch.tensor(embedding.scale, dtype=self.dtype, device="cpu"))  # as the torch module rounds it
        if embedding.learned_positions is not None:
            learned = self._parameters["embed_positions.weight"].detach().contiguous()
            op.positions_table, op.positions_rows = self._hold(learned), learned.shape[0]
            op.position_offset = embedding.position_offset
        if embedding.norm is not None:
            self._op(native.NORMALISE, self._x, self._x, self._norm(embedding.norm, "embed_norm"))

    def _branch(self, branch: Branch, place: str) -> None:
        """x += scale * sum of the parts. A single part without a norm behind it adds to x itself."""
        alone = len(branch.parts) == 1
        total = self._x if alone else self._buffer("total", self._size)
        factor = branch.scale if alone else 1.0
        for i, part in enumerate(branch.parts):
            first = branch.parts[0] if part.share_norm_in else part
            norm = self._norm(first.norm_in, f"{place}{first.name}_norm_in", scale=part.scale_in)
            scale, adds = part.scale_out * factor, alone or i > 0
            if part.norm_out is None:
                self._part(part, norm, total, scale, adds, place)
                continue
            y = self._buffer("y", self._size)
            self._part(part, norm, y, 1.0, False, place)
            behind = self._norm(part.norm_out, f"{place}{part.name}_norm_out", scale=scale)
            self._op(native.NORMALISE, y, total, behind).add = adds
        if not alone:
            op = self._op(native.NORMALISE, total, self._x, self._norm(None, "", scale=branch.scale))
            op.add = 1

    def _part(self, part: Part, norm: native.Norm, to: Buffer, scale: float, adds: bool, place: str) -> None:
        name = f"{place}{part.name}"
        if isinstance(part.op, Attention):
            self._attention(part.op, name, norm, to, scale, adds)
        elif isinstance(part.op, Experts):
            self._experts(part.op, name, norm, to, scale, adds)
        else:
            assert isinstance(part.op, FeedForward)  # `refusals` has looked
            self._feed_forward(part.op, name, norm, to, scale, adds)

    def _attention(self, op: Attention, name: str, norm: native.Norm, to: Buffer, scale: float, adds: bool) -> None:
        spec, appends = op.spec, self.sources[op.slot] == op.slot
        H, K, D, Dv = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_head_dim
        names, sizes, with_bias = ["q"], [H * D], [op.q_bias]
        if appends:
            names, sizes, with_bias = ["q", "k", "v"], [H * D, K * D, K * Dv], [op.q_bias, op.k_bias, op.v_bias]
        projected, q, o = self._buffer("qkv", sum(sizes)), self._buffer("q", H * D), self._buffer("o", H * Dv)
        project = self._op(native.LINEAR, self._x, projected, norm)
        self._matrices(project, {
            f"{name}.{n}": f"{name}.{n}.bias" if there else None for n, there in zip(names, with_bias, strict=True)
        })  # fmt: skip
        project.clip = op.qkv_clip or 0.0

        heads, attend = self._op(native.HEADS, projected, q), self._op(native.ATTEND, q, o)
        for each in (heads, attend):
            each.slot, each.num_heads, each.num_kv_heads = self.sources[op.slot], H, K
            each.head_dim, each.v_head_dim = D, Dv
        heads.appends = appends
        heads.q_norm, heads.k_norm = self._norm(None, "", size=D), self._norm(None, "", size=D)
        if op.qk_norm is not None:
            heads.norm_all = op.qk_norm_over == "all"
            heads.q_norm = self._norm(op.qk_norm, f"{name}.q_norm")
            if appends:
                k_norm = dataclasses.replace(op.qk_norm, size=K * D if heads.norm_all else D)
                heads.k_norm = self._norm(k_norm, f"{name}.k_norm")
        if op.rope is not None:
            if op.rope not in self.ropes:
                self.ropes.append(op.rope)
            heads.rotation = self.ropes.index(op.rope)
            heads.interleaved = op.rope.interleaved
        self._widest = max(self._widest, padded(D))

        attend.scale, attend.softcap = spec.scale, spec.softcap or 0.0
        attend.causal, attend.window, attend.chunk = spec.mask.causal, spec.mask.window or 0, spec.mask.chunk or 0
        if spec.sinks:
            attend.sinks = self._hold(self._float(f"{name}.sinks"))
        if spec.alibi_slopes is not None:
            attend.slopes = self._hold(torch.tensor(spec.alibi_slopes, dtype=torch.float32, device="cpu"))

        self._project(o, to, f"{name}.o", H * Dv, op.o_bias, scale, adds)

    def _project(
        self, src: Buffer, to: Buffer, name: str, size: int, bias: bool, scale: float, adds: bool
    ) -> native.Op:
        """Back to the residual: to (+)= scale * (src @ W.T + b)."""
        op = self._op(native.LINEAR, src, to, self._norm(None, "", size=size))
        self._matrices(op, {name: f"{name}.bias" if bias else None})
        op.scale, op.add = scale, adds
        return op

    def _feed_forward(
        self, op: FeedForward, name: str, norm: native.Norm, to: Buffer, scale: float, adds: bool
    ) -> None:
        h = self._inner(op, name, norm)
        self._project(h, to, f"{name}.down", op.intermediate_size, op.bias, scale * op.down_scale, adds)

    def _inner(self, op: FeedForward, name: str, norm: native.Norm) -> Buffer:
        """act(gate) * up, or act(up)."""
        h = self._buffer("h", op.intermediate_size)
        into = self._op(native.GATED if op.gated else native.LINEAR, self._x, h, norm)
        names = ["gate", "up"] if op.gated else ["up"]
        self._matrices(into, {f"{name}.{n}": f"{name}.{n}.bias" if op.bias else None for n in names})
        into.activation, into.gate_scale = native.ACTIVATIONS[op.activation], op.gate_scale
        return h

    def _experts(self, op: Experts, name: str, norm: native.Norm, to: Buffer, scale: float, adds: bool) -> None:
        """The router, the choice, the chosen experts' two products; then the shared expert, perhaps behind a gate."""
        E, F, k, expert = op.num_experts, op.expert.intermediate_size, op.top_k, op.expert
        logits, h = self._buffer("router", E), self._buffer(f"experts of {F}", k * padded(F))
        router = self._op(native.LINEAR, self._x, logits, norm)
        self._matrices(router, {f"{name}.router": f"{name}.router.bias" if op.router_bias else None})
        weights = torch.zeros(native.SLICE_ROWS, k, dtype=torch.float32, device="cpu")
        chosen = torch.zeros(native.SLICE_ROWS, k, dtype=torch.int64, device="cpu")
        shared = native.Experts(
            E, k, native.SCORINGS[op.scoring], op.normalise, op.num_groups, op.top_k_groups, expert.gated, padded(F),
            op.scale, op.clamp or 0.0, op.alpha,
            self._hold(self._float(f"{name}.router.correction_bias")) if op.correction_bias else None,
            self._hold(weights), self._hold(chosen),
        )  # fmt: skip
        self._arrays.append(shared)
        choose = self._op(native.CHOOSE, logits, None)
        into = self._op(native.EXPERTS_IN, self._x, h, norm)
        into.activation, into.gate_scale = native.ACTIVATIONS[expert.activation], expert.gate_scale
        self._stack(into, [f"{name}.up", f"{name}.gate"] if expert.gated else [f"{name}.up"])
        gate = self._buffer("shared gate", 1) if op.shared_gate else None
        if gate is not None:
            self._matrices(self._op(native.LINEAR, self._x, gate, norm), {f"{name}.shared_gate": None})
        dense = None if op.shared is None else self._inner(op.shared, f"{name}.shared", norm)
        out = self._op(native.EXPERTS_OUT, h, to)  # `to` may be x: whatever reads x comes before
        self._stack(out, [f"{name}.down"])
        out.scale, out.add = scale * expert.down_scale, adds
        for each in (choose, into, out):
            each.experts = addressof(shared)
        if op.shared is not None:
            assert dense is not None
            size, factor = op.shared.intermediate_size, scale * op.shared.down_scale
            last = self._project(dense, to, f"{name}.shared.down", size, op.shared.bias, factor, True)
            if gate is not None:
                last.gates, last.gates_row = gate.pointer, gate.row

    def _stack(self, op: native.Op, names: list[str]) -> None:
        """Give an operation all experts' weights, name after name."""
        matrices = []
        for name in names:
            weight, bias = self._parameters[f"{name}.weight"].detach(), self._parameters.get(f"{name}.bias")
            for e in range(len(weight)):
                given = None if bias is None else self._bias(bias.detach()[e].float())
                matrices.append(self._plain_matrix(weight[e], given))
        op.columns = matrices[0].columns
        self._widest = max(self._widest, padded(op.columns))
        array = (native.Matrix * len(matrices))(*matrices)
        self._arrays.append(array)
        op.matrices, op.num_matrices = addressof(array), len(matrices)

    def _logits(self) -> None:
        head = self.program.head
        op = self._op(native.LOGITS, self._x, None, self._norm(self.program.final_norm, "norm"))
        self._matrices(op, {EMBED if head.tied else "head": "head.bias" if head.bias else None})
        op.scale, op.softcap = head.scale, head.softcap or 0.0
