"""The executor: decode passes in one native call, every other pass through the torch module, on the same cache."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from ctypes import addressof
from typing import Any

import torch
from torch import Tensor, nn

from pluglm.contracts import (
    Attention,
    Cache,
    Decoded,
    DecodeRun,
    ExecutorRequest,
    ForwardInput,
    ForwardOutput,
)
from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import InputError, PluglmError, UnsupportedRequestError
from pluglm_executor_cpu import native
from pluglm_executor_cpu.binding import Binding, writes_in_place
from pluglm_executor_cpu.lower import Lowered
from pluglm_executor_cpu.packed_layers import BLOCKED, PackedLayer, lay_out, packed_modules
from pluglm_executor_cpu.refusals import refusals
from pluglm_executor_cpu.rotations import Rotations
from pluglm_executor_cpu.runs import Books, positions_of

#: Tokens (rows × tokens) up to which a prompt of packed layers is faster in native slices: measured, see the README.
_PROMPT = 1024


def build(request: ExecutorRequest) -> CpuExecutor:
    """Raises: UnsupportedRequestError with every reason, before anything is packed."""
    reasons = refusals(request)
    packed: dict[str, PackedLayer] = {}
    if not reasons:
        program, module = request.description.program, request.module
        assert program is not None
        assert isinstance(module, nn.Module)
        written = sorted({getattr(slot, "source", i) for i, slot in enumerate(program.slots)})
        if not writes_in_place(request.layout, written):
            reasons = [f"caches of the layout {request.layout.name!r} do not hand out slices of what they store"]
        packed, unfit = lay_out(packed_modules(module, program), program)
        reasons += unfit
    if reasons:
        raise UnsupportedRequestError(
            'executor="cpu" cannot run this model.', why="\n".join(reasons),
            fix='Choose executor="eager", or change what stands in the way.', reasons=tuple(reasons),
        )  # fmt: skip
    return CpuExecutor(request, packed)


class CpuExecutor:
    """See `pluglm.contracts.Executor`. Passes of several threads of Python wait for each other.

    Attributes:
        threads, isa, activations: what it runs with. native_passes, torch_passes: how many passes went either way.
        decoding_s: seconds that the library has spent in runs of several tokens.
    """

    name = "cpu"

    def __init__(self, request: ExecutorRequest, packed: Mapping[str, PackedLayer]) -> None:
        library, program = native.library(), request.description.program
        assert library is not None
        assert program is not None
        assert isinstance(request.module, nn.Module)
        options: dict[str, Any] = dict(request.options)
        self.threads: int = options.get("threads", torch.get_num_threads())
        self.isa: str = options.get("isa", library.isas[-1])
        self.activations: str = options.get("activations", "float32")
        self.native_passes = self.torch_passes = 0
        self.decoding_s = 0.0
        self._scores = torch.empty(0)
        self._library, self._program = library, program
        self._module: nn.Module = request.module
        self._forward = request.module.forward
        self._dtype, self._vocab = torch_dtype(request.dtype), program.embedding.vocab_size
        self._parameters = list(request.module.parameters())
        self._lock = threading.Lock()
        _EXECUTORS.add(self)
        self._bindings: weakref.WeakKeyDictionary[Cache, Binding] = weakref.WeakKeyDictionary()
        self._packed_modules = packed_modules(self._module, program)
        self._pack(packed)
        self._start()

    # What is made once

    def _pack(self, packed: Mapping[str, PackedLayer] | None = None) -> None:
        if packed is None:
            packed, unfit = lay_out(self._packed_modules, self._program)
            if unfit:
                raise PluglmError("A packed layer has changed its form.", why="\n".join(unfit), fix="Load anew.")
        with torch.inference_mode(False), torch.no_grad():
            self._lowered = Lowered(
                self._module, self._program, self._dtype, self._library, packed, rounds=self.activations == "int8"
            )
        self._rotations = Rotations(self._lowered.ropes)
        self._sources = sorted(set(self._lowered.sources))
        self._versions = self._state_of_weights()
        #: Tokens of the longest pass that is run natively: torch's unpacks packed layers anew each time.
        self._longest = _PROMPT if packed and self._sliceable() else native.MAX_ROWS
        self._pass = native.Pass(isa=native.ISAS[self.isa])
        self._arguments = addressof(self._lowered.plan), addressof(self._pass)

    def _sliceable(self) -> bool:
        """Whether a prompt may be computed some tokens at a time: no token sees a later one, or how many there are."""
        specs = (op.spec for op in self._program.ops() if isinstance(op, Attention))
        return self._rotations.by_position and all(spec.mask.causal for spec in specs)

    def _start(self) -> None:
        """Start the threads: at first, and in a child process, which has none of its parent's."""
        worker = self._library.start(self.threads)
        if not worker:
            raise PluglmError(f"{self.threads} threads could not be started.", fix="Ask for fewer with threads=…")
        self._worker, self._process = worker, os.getpid()
        self._finalizer = weakref.finalize(self, _stop, self._library, self._worker, self._process)
        # At the end of the process a daemon thread may be in the middle of a pass: its threads end with the process.
        self._finalizer.atexit = False

    def _forked(self) -> None:
        """In a child process: a thread that is not in it may have held the lock."""
        self._lock = threading.Lock()

    def _state_of_weights(self) -> list[int]:
        """Changes with every write to a weight that torch counts; inference tensors are never written again."""
        packed = self._packed_modules.values()
        buffers = [b for layer in packed if isinstance(layer, nn.Module) for b in layer.buffers()]
        counts = [0 if t.is_inference() else t._version for t in (*self._parameters, *buffers)]
        return counts + [layer.blocks.codes.data_ptr() for layer in packed if isinstance(layer, BLOCKED)]

    # A pass

    def run(self, inputs: ForwardInput) -> ForwardOutput:
        """One forward pass; see `Executor.run`."""
        if self._is_native(inputs):
            with self._lock:
                output = self._run(inputs)
            if output is not None:
                return output
        return self._through_torch(inputs)

    def _is_native(self, inputs: ForwardInput) -> bool:
        """Whether the library computes everything that this pass asks for."""
        token_ids, positions, cache = inputs.token_ids, inputs.positions, inputs.cache
        if token_ids is None or cache is None or token_ids.dim() != 2 or positions.dim() != 2:
            return False
        B, T = token_ids.shape
        return (
            0 < B * T <= (self._longest if B <= native.MAX_ROWS else 0)
            and cache.batch_size == B
            and positions.shape[1] == T
            and positions.shape[0] in (1, B)
            and isinstance(inputs.logits_to_keep, int)
            and inputs.logits_to_keep >= 0
            and not inputs.output_hidden_states
            and inputs.segments is None
            and inputs.prefix_lengths is None
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters))
        )

    def _through_torch(self, inputs: ForwardInput) -> ForwardOutput:
        self.torch_passes += 1
        output = self._forward(inputs)
        with self._lock:
            if self._state_of_weights() != self._versions:
                self._pack()
        return output

    def _run(self, inputs: ForwardInput) -> ForwardOutput | None:
        """A pass as native calls of at most SLICE_ROWS rows; None: the cache hands out what the library cannot use."""
        token_ids, positions, cache = inputs.token_ids, inputs.positions, inputs.cache
        assert token_ids is not None
        assert cache is not None
        token_ids, positions = (x if x.dtype is torch.int64 else x.long() for x in (token_ids, positions))
        B, T = token_ids.shape
        if B * T > native.MAX_ROWS and self._state_of_weights() != self._versions:
            self._pack()
        step = cache.begin(positions, dense=inputs.dense)
        binding = self._binding(cache)
        if not binding.follow(cache, step) or step.keys(self._sources[0]).segments is not None:
            return None
        self._rotations.reach(positions, cache.length + T if inputs.dense and cache.dense else None)
        asked = inputs.logits_to_keep
        assert isinstance(asked, int)
        keep = min(asked, T) if asked else T
        logits = torch.empty((B, keep, self._vocab), dtype=self._dtype, device="cpu")

        self._point(binding, B)
        if B * T <= native.SLICE_ROWS:
            self._call(token_ids, positions, logits)
        else:
            self._slices(token_ids, positions, logits, binding)
        cache.commit(step)
        self.native_passes += 1
        return ForwardOutput(logits)

    def _binding(self, cache: Cache) -> Binding:
        """The books of a cache; new ones for one that is seen for the first time."""
        binding = self._bindings.get(cache)
        if binding is None:
            binding = self._bindings[cache] = Binding(self._program.slots, self._sources)
        return binding

    def _point(self, binding: Binding, rows: int) -> None:
        """Tell the library where the cache and the rotations lie, and have threads to run it."""
        call = self._pass
        call.B = rows
        call.slots, call.groups = addressof(binding.slots), addressof(binding.groups)
        call.rotations = addressof(self._rotations.array)
        if os.getpid() != self._process:
            self._start()

    def _slices(self, token_ids: Tensor, positions: Tensor, logits: Tensor, binding: Binding) -> None:
        """All tokens of a prompt, some at a time, in one pass of the cache: a slice sees the cells up to its own."""
        B, T = token_ids.shape
        size, first = native.SLICE_ROWS // B, T - logits.shape[1]  # first: token whose logits are kept
        lengths = binding.lengths
        for i in range(0, T, size):
            j = min(i + size, T)
            binding.lengths = [length - (T - j) for length in lengths]
            kept = max(i, first)
            out = torch.empty((B, max(j - kept, 0), self._vocab), dtype=self._dtype, device="cpu")
            self._call(token_ids[:, i:j], positions[:, i:j], out)
            if kept < j:
                logits[:, kept - first : j - first] = out

    def _call(self, token_ids: Tensor, positions: Tensor, logits: Tensor) -> None:
        """One native call. What it points to lives in the caller. logits: [B, kept, V], written to."""
        call = self._pass
        call.T, call.keep = token_ids.shape[1], logits.shape[1]
        call.ids, (call.ids_row, call.ids_column) = token_ids.data_ptr(), token_ids.stride()
        call.positions, (row, call.positions_column) = positions.data_ptr(), positions.stride()
        call.positions_row = row if positions.shape[0] > 1 else 0
        call.logits = logits.data_ptr()
        failed = self._library.step(self._worker, *self._arguments)
        if failed:
            raise self._failure(failed, token_ids, positions)

    # Several tokens

    def decode(self, run: DecodeRun) -> Decoded | None:
        """Up to `run.count` tokens of each row in one native call; see `DecodesAhead.decode`."""
        rows = run.token_ids.shape[0]
        differentiated = torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters)
        if rows > native.MAX_ROWS or not self._rotations.by_position or run.cache.batch_size != rows or differentiated:
            return None
        with self._lock:
            return self._decode(run, rows)

    def _decode(self, run: DecodeRun, rows: int) -> Decoded | None:
        """As `decode`, in one pass of the cache, which holds as many cells of it in the end as tokens were fed.

        A cache that must move what it stores does so for the first token alone, as it would token by token: layouts
        exist in which later tokens would read other numbers if it did so sooner.
        """
        cache, binding = run.cache, self._binding(run.cache)
        count = max(1, min(run.count, binding.spare(cache.length)))
        positions, dense = positions_of(run, count)
        step = cache.begin(positions, dense=dense)
        if not binding.follow(cache, step) or step.keys(self._sources[0]).segments is not None:
            return None
        binding.measure(cache.length + count)
        self._rotations.reach(positions, cache.length + count if dense else None)
        self._point(binding, rows)
        if self._scores.shape[0] != rows:
            self._scores = torch.empty((rows, self._vocab), dtype=self._dtype, device="cpu")
        books, call = Books(run, count, binding.num_groups), self._pass
        call.positions, (row, call.positions_column) = positions.data_ptr(), positions.stride()
        call.positions_row = row if positions.shape[0] > 1 else 0
        call.logits = self._scores.data_ptr()
        if failed := self._library.decode(self._worker, *self._arguments, books.address):
            raise self._failure(failed, run.token_ids, positions[:, :1])
        made, fed = books.run.made, books.run.fed
        if fed < count:
            step = cache.begin(positions[:, :fed], dense=dense)
            if not binding.again(cache, step):
                return None
            binding.measure(cache.length + fed)
        cache.commit(step)
        self.native_passes += fed
        self.decoding_s += books.run.seconds
        return Decoded(books.tokens[:, 1 : made + 1], self._scores.clone() if fed > made else None)

    def _failure(self, code: int, token_ids: Tensor, positions: Tensor) -> PluglmError:
        if code == native.BAD_TOKEN:
            return InputError(
                f"The token ids run from {int(token_ids.min())} to {int(token_ids.max())}.",
                why=f"the vocabulary has the ids 0 to {self._vocab - 1}.",
                fix="Use ids of this model's tokenizer.", argument="token_ids",
            )  # fmt: skip
        if code == native.BAD_POSITION:
            learned = self._program.embedding.learned_positions
            return InputError(
                f"The model has no position {int(positions.max())}.", why=f"it has learned {learned} positions.",
                fix="Shorten the text.", argument="positions",
            )  # fmt: skip
        return PluglmError("The pass ran out of memory.", fix="Send fewer rows at a time.")


def _stop(library: native.Library, worker: int, process: int) -> None:
    """End the threads, where they are this process's own."""
    if os.getpid() == process:
        library.stop(worker)


#: Every executor of this process, for `_after_fork`.
_EXECUTORS: weakref.WeakSet[CpuExecutor] = weakref.WeakSet()


def _after_fork() -> None:
    for executor in list(_EXECUTORS):
        executor._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
