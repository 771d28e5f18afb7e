"""The executor: decode passes in one native call, every other pass through the torch module, on the same cache."""

from __future__ import annotations

import os
import threading
import weakref
from ctypes import addressof
from typing import Any

import torch
from torch import Tensor, nn

from pluglm.contracts import Cache, ExecutorRequest, ForwardInput, ForwardOutput
from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import InputError, PluglmError, UnsupportedRequestError
from pluglm_executor_cpu import native
from pluglm_executor_cpu.binding import Binding, writes_in_place
from pluglm_executor_cpu.lower import Lowered
from pluglm_executor_cpu.refusals import refusals
from pluglm_executor_cpu.rotations import Rotations


def build(request: ExecutorRequest) -> CpuExecutor:
    """Raises: UnsupportedRequestError with every reason, before anything is packed."""
    reasons = refusals(request)
    if not reasons:
        program = request.description.program
        assert program is not None
        written = sorted({getattr(slot, "source", i) for i, slot in enumerate(program.slots)})
        if not writes_in_place(request.layout, written):
            reasons = [f"caches of the layout {request.layout.name!r} do not hand out slices of what they store"]
    if reasons:
        raise UnsupportedRequestError(
            'executor="cpu" cannot run this model.', why="\n".join(reasons),
            fix='Choose executor="eager", or change what stands in the way.', reasons=tuple(reasons),
        )  # fmt: skip
    return CpuExecutor(request)


class CpuExecutor:
    """See `pluglm.contracts.Executor`. Passes of several threads of Python wait for each other.

    Attributes:
        threads, isa: what it runs with. native_passes, torch_passes: how many passes went either way.
    """

    name = "cpu"

    def __init__(self, request: ExecutorRequest) -> None:
        library, program = native.library(), request.description.program
        assert library is not None
        assert program is not None
        assert isinstance(request.module, nn.Module)
        options: dict[str, Any] = dict(request.options)
        self.threads: int = options.get("threads", torch.get_num_threads())
        self.isa: str = options.get("isa", library.isas[-1])
        self.native_passes = self.torch_passes = 0
        self._library, self._program = library, program
        self._module: nn.Module = request.module
        self._forward = request.module.forward
        self._dtype, self._vocab = torch_dtype(request.dtype), program.embedding.vocab_size
        self._parameters = list(request.module.parameters())
        self._lock = threading.Lock()
        self._bindings: weakref.WeakKeyDictionary[Cache, Binding] = weakref.WeakKeyDictionary()
        self._pack()
        self._start()

    # What is made once

    def _pack(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._lowered = Lowered(self._module, self._program, self._dtype, self._library)
        self._rotations = Rotations(self._lowered.ropes)
        self._sources = sorted(set(self._lowered.sources))
        self._versions = self._state_of_weights()
        self._pass = native.Pass(isa=native.ISAS[self.isa])
        self._arguments = addressof(self._lowered.plan), addressof(self._pass)

    def _start(self) -> None:
        """Start the threads: at first, and in a child process, which has none of its parent's."""
        self._process = os.getpid()
        self._worker = self._library.start(self.threads)
        if not self._worker:
            raise PluglmError(f"{self.threads} threads could not be started.", fix="Ask for fewer with threads=…")
        self._finalizer = weakref.finalize(self, _stop, self._library, self._worker, self._process)

    def _state_of_weights(self) -> list[int]:
        """Changes with every write to a parameter that torch counts; inference tensors are never written again."""
        return [0 if p.is_inference() else p._version for p in self._parameters]

    # A pass

    def run(self, inputs: ForwardInput) -> ForwardOutput:
        """One forward pass; see `Executor.run`."""
        if not self._is_decode(inputs):
            return self._through_torch(inputs)
        with self._lock:
            return self._decode(inputs) or self._through_torch(inputs)

    def _is_decode(self, inputs: ForwardInput) -> bool:
        """Whether the library computes everything that this pass asks for."""
        token_ids, cache = inputs.token_ids, inputs.cache
        return (
            token_ids is not None
            and cache is not None
            and 0 < token_ids.numel() <= native.MAX_ROWS
            and cache.batch_size == token_ids.shape[0]
            and isinstance(inputs.logits_to_keep, int)
            and not inputs.output_hidden_states
            and inputs.segments is None
            and inputs.prefix_lengths is None
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters))
        )

    def _through_torch(self, inputs: ForwardInput) -> ForwardOutput:
        self.torch_passes += 1
        output = self._forward(inputs)
        if self._state_of_weights() != self._versions:
            with self._lock:
                self._pack()
        return output

    def _decode(self, inputs: ForwardInput) -> ForwardOutput | None:
        """One native call; None: the cache hands out what the library cannot use."""
        token_ids, positions, cache = inputs.token_ids, inputs.positions, inputs.cache
        assert token_ids is not None
        assert cache is not None
        if token_ids.dtype is not torch.int64:
            token_ids = token_ids.long()
        B, T = token_ids.shape
        step = cache.begin(positions, dense=inputs.dense)
        binding = self._bindings.get(cache)
        if binding is None:
            binding = self._bindings[cache] = Binding(len(cache.slots), self._sources)
        if not binding.follow(cache, step) or step.keys(self._sources[0]).segments is not None:
            return None
        self._rotations.reach(positions, cache.length + T if inputs.dense and cache.dense else None)
        asked = inputs.logits_to_keep
        assert isinstance(asked, int)
        keep = min(asked, T) if asked else T
        logits = torch.empty((B, keep, self._vocab), dtype=self._dtype)

        call = self._pass
        call.B, call.T, call.keep = B, T, keep
        call.ids, (call.ids_row, call.ids_column) = token_ids.data_ptr(), token_ids.stride()
        call.positions, (row, call.positions_column) = positions.data_ptr(), positions.stride()
        call.positions_row = row if positions.shape[0] > 1 else 0
        call.logits = logits.data_ptr()
        call.slots, call.groups = addressof(binding.slots), addressof(binding.groups)
        call.rotations = addressof(self._rotations.array)
        if os.getpid() != self._process:
            self._start()
        failed = self._library.step(self._worker, *self._arguments)
        if failed:
            raise self._failure(failed, token_ids, positions)
        cache.commit(step)
        self.native_passes += 1
        return ForwardOutput(logits)

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
