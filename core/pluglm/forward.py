"""The forward contract of the field over any architecture and executor: `model(input_ids, attention_mask=…)`.

Names, defaults and outputs are those that decoding methods and users rely on; the one addition is that nothing is
swallowed: an unknown argument, or a mask that does not fit the cache, raises. Encoder-decoders have a contract of their
own, in `pluglm.seq2seq`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pluglm.contracts.model import ForwardInput, ForwardOutput, ModelDescription
from pluglm.errors import InputError, PlanError, UnsupportedRequestError
from pluglm.outputs import CausalOutput
from pluglm.passed import Passed, check_cache, check_kept, check_length, unknown_argument

if TYPE_CHECKING:
    from pluglm.contracts.cache import Cache, CacheLayout
    from pluglm.contracts.runtime import Executor

__all__ = ["BuiltModel", "CausalLM", "CausalOutput"]


class Unable:
    """An executor in the place of one that cannot go on: every pass raises `error`."""

    name = "unable"

    def __init__(self, error: PlanError) -> None:
        self.error = error

    def run(self, inputs: ForwardInput) -> ForwardOutput:
        """Raises the error."""
        raise self.error


class BuiltModel(nn.Module):
    """A built model, run by its executor: what the contracts of decoder-only models and encoder-decoders share.

    Attributes:
        description: what the architecture said of the model. module: the built torch module.
        layout: makes its caches. config: config.json as read. executor: runs the passes of the decoder.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"

    def __init__(
        self, module: nn.Module, executor: Executor, layout: CacheLayout | None, description: ModelDescription,
        config: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.module = module
        self.layout = layout
        self.description = description
        self.config = config
        self.run_by(executor)

    def run_by(self, executor: Executor) -> None:
        """Let this executor run the passes from now on."""
        self.executor = executor
        self._run: Callable[[ForwardInput], ForwardOutput] = executor.run

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters that are not quantized."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, weight [V, C]; a `BlockedEmbedding` where a quantizer has packed it."""
        return self.module.get_submodule("embed")

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.module.get_submodule("head")

    def new_cache(self, *, batch_size: int, capacity: int | None = None) -> Cache:
        """An empty cache of the planned layout. Raises InputError for a model that keeps nothing."""
        if self.layout is None:
            raise InputError("this model has nothing to cache.", fix="Pass use_cache=False.", argument="use_cache")
        return self.layout.new(batch_size=batch_size, capacity=capacity)

    def step(
        self, token_ids: Tensor, cache: Cache, *, positions: Tensor | None = None, logits_to_keep: int = 1
    ) -> Tensor:
        """One forward pass without the contract's bookkeeping: the decode loop's call.

        Args:
            token_ids: [B, T] int64. cache: grows by T.
            positions: [B, T]; negative: padding. None: the tokens follow each row's last one.
        Returns: logits [B, logits_to_keep or T, V].
        """
        if positions is None:
            positions = cache.next_positions(token_ids.shape[1])
            inputs = ForwardInput(token_ids, positions, cache, dense=cache.dense, logits_to_keep=logits_to_keep)
        else:
            inputs = ForwardInput(token_ids, positions, cache, logits_to_keep=logits_to_keep)
        return self._run(inputs).logits

    def _inputs(
        self, passed: Passed, cache: Cache | None, use_cache: bool | None, cache_position: Tensor | None,
        logits_to_keep: int | Tensor, output_hidden_states: bool,
    ) -> ForwardInput:  # fmt: skip
        """One pass of the decoder, checked; its cache is a new one if the caller wants one and gave none."""
        B, T = passed.shape(vocab_size=self.description.vocab_size, hidden_size=self.description.hidden_size)
        if cache is None and use_cache:
            cache = self.new_cache(batch_size=B, capacity=self.description.max_seq_len)
        check_cache(cache, B, T, cache_position)
        check_kept(logits_to_keep)
        # A cache that streams keeps the distances within the context by itself, however long the text.
        limit = None if cache is not None and cache.streams else self.description.max_seq_len
        check_length((cache.length if cache is not None else 0) + T, limit)
        positions, dense = passed.positions(cache, limit)
        return ForwardInput(
            passed.ids, positions, cache, embeds=passed.embeds, dense=dense, logits_to_keep=logits_to_keep,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip


class CausalLM(BuiltModel):
    """A decoder-only model. What strategies and Hub methods call `model`."""

    @property
    def logits_of(self) -> Callable[[Tensor], Tensor]:
        """The head on a hidden state of any layer, [..., C] -> [..., V], with the scale and cap of the logits.

        The final norm is not applied: the last of `hidden_states` has been through it, the others go as they are.

        Raises: UnsupportedRequestError if the architecture's module has no `logits_of`.
        """
        found: Callable[[Tensor], Tensor] | None = getattr(self.module, "logits_of", None)
        if found is None:
            reason = f"the module of this {self.description.model_type} model cannot apply its head to an inner layer."
            raise UnsupportedRequestError(
                reason, why="it is a module of its own, without `logits_of`; how its head is scaled is not known.",
                fix="Use a strategy that reads the last layer alone, or a model whose architecture has a program.",
                reasons=(reason,),
            )  # fmt: skip
        return found

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        return_dict: bool | None = None,
        **unknown: Any,
    ) -> CausalOutput | tuple[Any, ...]:
        """One forward pass.

        Args:
            input_ids: [B, T] int64; or inputs_embeds: [B, T, C]; exactly one of them.
            attention_mask: [B, cache length + T], 1 for a token, 0 for padding on either side. None: all tokens.
            position_ids: [B, T] or [1, T]. None: counted from the mask, or from the cache.
            past_key_values: a cache; it grows by T. None with `use_cache`: a new one.
            use_cache: None: True if a cache is given, else False.
            cache_position: [T]; must be the next cells, it cannot choose others.
            logits_to_keep: 0: logits of all T; n: of the last n; a tensor: of these indices.
            output_hidden_states: return L + 1 hidden states.
            return_dict: False: a tuple.
        Raises: InputError for what cannot be honoured, ContextLengthError if the model or the cache holds no more.
        """
        if unknown:
            raise unknown_argument(unknown, _KNOWN)
        passed = Passed(input_ids, inputs_embeds, attention_mask, position_ids)
        inputs = self._inputs(passed, past_key_values, use_cache, cache_position, logits_to_keep, output_hidden_states)
        output = self._run(inputs)
        kept = inputs.cache if use_cache is not False else None
        result = CausalOutput(output.logits, kept, output.hidden_states)
        return result.to_tuple() if return_dict is False else result


_KNOWN = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache", "cache_position",
    "logits_to_keep", "output_hidden_states", "return_dict",
)  # fmt: skip
