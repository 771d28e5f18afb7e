"""The executor: one compiled graph for each shape of a pass, around it the cache's transaction, run as ever."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from pluglm_blocks import Decoder
from pluglm_blocks.attention import SelfAttention
from torch import Tensor, nn

from pluglm.contracts import ExecutorRequest, ForwardInput, ForwardOutput
from pluglm.errors import PluglmError, UnsupportedRequestError
from pluglm_executor_compile.attend_op import Pass, Site, TracedBackend, TracedState, TracedTokens, passing
from pluglm_executor_compile.compiling import COMPILER_ERRORS, compiling, failed
from pluglm_executor_compile.refusals import refusals

#: A pass of more than one token is filled up to a power of two, and at least to this.
SMALLEST_PROMPT = 16
MAX_SHAPES = 32
#: B, T with padding, kept positions (None: all), hidden states, embeddings' dtype or None for ids, rows of positions.
Shape = tuple[int, int, int | None, bool, torch.dtype | None, int]


def build(request: ExecutorRequest) -> CompileExecutor:
    """Raises: UnsupportedRequestError with every reason, before anything is compiled."""
    reasons = refusals(request)
    if reasons:
        raise UnsupportedRequestError(
            'executor="compile" cannot run this model.', why="\n".join(reasons),
            fix='Choose executor="eager", or change what stands in the way.', reasons=tuple(reasons),
        )  # fmt: skip
    return CompileExecutor(request)


class CompileExecutor:
    """See `pluglm.contracts.Executor`. Passes of several threads may run at once; they compile one at a time.

    Attributes:
        compiled_s: shape -> seconds its first pass took.
        compiled_passes, eager_passes: how many passes went either way.
    """

    name = "compile"

    def __init__(self, request: ExecutorRequest) -> None:
        assert isinstance(request.module, Decoder)
        options: dict[str, Any] = dict(request.options)
        self._decoder = request.module
        self._backend: str = options.get("backend", "inductor")
        self._mode: str | None = options.get("mode")
        self._cache_dir: str | None = options.get("cache_dir")
        self._max_shapes: int = options.get("max_shapes", MAX_SHAPES)
        self.compiled_s: dict[Shape, float] = {}
        self.compiled_passes = self.eager_passes = 0
        self._graphs: dict[Shape, Callable[..., Any]] = {}
        self._lock = threading.Lock()
        self._parameters = list(request.module.parameters())
        self._shadow()

    def _shadow(self) -> None:
        """Copies of the layers, which share every parameter, with attention parts whose backend is the operation."""
        sites: list[Site] = []
        self._layers: list[nn.Module] = []
        self._seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for layer in self._decoder.layers:
            twin = copy.copy(layer)
            parts = dict(layer._modules)
            self._seen.append((layer._modules, dict(parts)))
            for name, part in parts.items():
                if isinstance(part, SelfAttention):
                    attention = copy.copy(part)  # the same dicts of parameters and submodules
                    attention.backend = TracedBackend(len(sites))  # type: ignore[assignment]
                    sites.append(Site(part.backend, part.spec, part.is_shared))
                    parts[name] = attention
            twin.__dict__["_modules"] = parts
            twin.__dict__["_bound"] = ()
            twin._bind()  # type: ignore[operator]
            self._layers.append(twin)
        self._sites = tuple(sites)

    # A pass

    def run(self, inputs: ForwardInput) -> ForwardOutput:
        """One forward pass; see `Executor.run`.

        Raises: UnsupportedRequestError if a graph cannot be compiled; PluglmError for one shape too many.
        """
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters):
            self.eager_passes += 1
            return self._decoder.forward(inputs)
        if any(now != then for now, then in self._seen):
            self._replaced()
        given = inputs.token_ids if inputs.embeds is None else inputs.embeds
        assert given is not None  # one of them is given, says the contract
        B, T = given.shape[:2]
        room = 1 if T == 1 else max(SMALLEST_PROMPT, 1 << (T - 1).bit_length())
        kept = _kept(inputs.logits_to_keep, T, given.device)
        embedded = None if inputs.embeds is None else inputs.embeds.dtype
        shape: Shape = (
            B, room, None if kept is None else kept.shape[0], inputs.output_hidden_states, embedded,
            inputs.positions.shape[0],
        )  # fmt: skip
        graph = self._graphs.get(shape)
        if graph is None:
            self._check_room(shape)
        decoder = self._decoder
        real = inputs.positions if inputs.dense else inputs.positions.clamp(min=0)
        state = decoder._plan.begin(inputs, real)
        rotations = [(_filled(cos, room), _filled(sin, room)) for cos, sin in state.rotations]
        temperatures = [_filled(t, room) for t in state.temperatures]
        arguments = (_lengthened(given, room), _lengthened(real, room), rotations, temperatures, kept)
        try:
            with passing(Pass(state, T, self._sites)):
                logits, hidden = self._first(shape, arguments) if graph is None else graph(*arguments)
        except COMPILER_ERRORS as e:  # at any pass: a changed model is compiled anew
            raise failed(e, self._backend, shape[0], room) from e
        state.cache.commit(state.step)
        self.compiled_passes += 1
        if kept is None and room != T:
            logits = logits[:, :T]
        if hidden is None:
            return ForwardOutput(logits)
        return ForwardOutput(logits, tuple(x[:, :T] for x in hidden))

    # A shape's first pass

    def _first(self, shape: Shape, arguments: tuple[Any, ...]) -> Any:
        """Compile and run. Another thread may have been faster: then only run."""
        with self._lock:
            graph = self._graphs.get(shape)
            if graph is not None:
                return graph(*arguments)
            self._check_room(shape)
            graph = self._graph(shape)
            began = time.monotonic()
            with compiling(f"compiling passes of {shape[0]} × {shape[1]} tokens", self._cache_dir):
                result = graph(*arguments)
            self.compiled_s[shape] = time.monotonic() - began
            self._graphs[shape] = graph
            return result

    def _graph(self, shape: Shape) -> Callable[..., Any]:
        """The pass between the cache's `begin` and `commit`, to be compiled by its first call."""
        decoder, layers, embeds = self._decoder, self._layers, shape[4] is not None
        plan = decoder._plan
        masks, slots = len(plan._masks), len(plan._slots)
        with_hidden = shape[3]

        def graph_of_pass(
            given: Tensor, real: Tensor, rotations: list[tuple[Tensor, Tensor]], temperatures: list[Tensor],
            kept: Tensor | None,
        ) -> tuple[Tensor, list[Tensor] | None]:  # fmt: skip
            state: Any = TracedState(masks, slots, rotations, temperatures)
            tokens: Any = TracedTokens(None, given) if embeds else TracedTokens(given, None)
            x = decoder._embed(tokens, real)
            hidden = []
            for layer in layers:
                if with_hidden:
                    hidden.append(x)
                x = layer(x, state)
            if with_hidden:
                x = decoder._final(x)
                hidden.append(x)
                return decoder._logits(x if kept is None else x.index_select(1, kept)), hidden
            return decoder._logits(decoder._final(x if kept is None else x.index_select(1, kept))), None

        # Dynamo keeps what it has compiled with the code object, and counts there how often it compiled anew. One for
        # each shape: so nothing but a change of the model, or of torch's settings, makes it compile again.
        code = graph_of_pass.__code__.replace(co_name=f"pass_{len(self._graphs)}")
        own = FunctionType(code, globals(), code.co_name, None, graph_of_pass.__closure__)
        compiled: Callable[..., Any] = torch.compile(
            own, fullgraph=True, dynamic=False, backend=self._backend, mode=self._mode
        )
        return compiled

    def _check_room(self, shape: Shape) -> None:
        if len(self._graphs) >= self._max_shapes:
            raise PluglmError(
                f"The compile executor has compiled {len(self._graphs)} shapes of passes, and this would be one more.",
                why=f"each takes seconds and memory; the new one has {shape[0]} rows and {shape[1]} tokens.",
                fix='Keep to fewer batch sizes, raise the option max_shapes, or choose executor="eager".',
            )

    def _replaced(self) -> None:
        raise PluglmError(
            "A part of the model was replaced after it was loaded.", why="the compiled passes hold the parts before.",
            fix='Load the model with the part in place, or with executor="eager".',
        )  # fmt: skip


def _kept(keep: int | Tensor, T: int, device: torch.device) -> Tensor | None:
    """The positions whose logits are wanted, [n]; None: all."""
    if isinstance(keep, Tensor):
        return torch.arange(T, device=device)[keep]  # as indexing means it: negative numbers, masks
    return None if keep == 0 or T == 1 else torch.arange(max(0, T - keep), T, device=device)


def _lengthened(x: Tensor, room: int) -> Tensor:
    """x [B, T, …] with zeros behind, [B, room, …]."""
    T = x.shape[1]
    if room == T:
        return x
    out = x.new_zeros(x.shape[0], room, *x.shape[2:])
    out[:, :T] = x
    return out


def _filled(x: Tensor, room: int) -> Tensor:
    """x [b, …, T, d] with zeros behind, [b, …, room, d]."""
    missing = room - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing else x
