"""The forward contract of the field over any architecture and executor: `model(input_ids, attention_mask=…)`.

Names, defaults and outputs are those that decoding methods and users rely on; the one addition is that nothing is
swallowed: an unknown argument, or a mask that does not fit the cache, raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pluglm.contracts.model import ForwardInput, ModelDescription
from pluglm.errors import ContextLengthError, InputError

if TYPE_CHECKING:
    from pluglm.contracts.cache import Cache, CacheLayout
    from pluglm.contracts.runtime import Executor


class CausalOutput(Mapping[str, Any]):
    """One forward pass's results, by attribute, key or index; what is None is not there by key or index.

    Attributes:
        logits: [B, T or fewer, V]. past_key_values: the cache, grown by T, or None.
        hidden_states: L + 1 tensors [B, T, C], the first one the embeddings, or None.
    """

    __slots__ = ("hidden_states", "logits", "past_key_values")
    FIELDS = ("logits", "past_key_values", "hidden_states")

    def __init__(self, logits: Tensor, past_key_values: Cache | None, hidden_states: tuple[Tensor, ...] | None) -> None:
        self.logits, self.past_key_values, self.hidden_states = logits, past_key_values, hidden_states

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there, in order."""
        return tuple(value for value in (getattr(self, name) for name in self.FIELDS) if value is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            value = getattr(self, key) if key in self.FIELDS else None
            if value is None:
                raise KeyError(key)
            return value
        return self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.FIELDS if getattr(self, name) is not None)

    def __len__(self) -> int:
        return len(self.to_tuple())


class CausalLM(nn.Module):
    """A built model, run by its executor. What strategies and Hub methods call `model`.

    Attributes:
        description: what the architecture said of the model. module: the built torch module.
        layout: makes its caches. config: config.json as read. generation_config: the model's defaults.
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
        self.executor = executor
        self._run = executor.run

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters that are not quantized."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, weight [V, C]."""
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
            raise _unknown_argument(unknown)
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("give exactly one of input_ids and inputs_embeds.", argument="input_ids")
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        self._check_input(tokens, input_ids is not None)
        B, T = tokens.shape[:2]
        if T == 0 or B == 0:
            raise InputError(
                f"the input has shape {tuple(tokens.shape)}: there is no token to run.", argument="input_ids"
            )
        cache = past_key_values
        if cache is None and use_cache:
            cache = self.new_cache(batch_size=B, capacity=self.description.max_seq_len)
        past = cache.length if cache is not None else 0
        if cache is not None and cache.batch_size != B:
            raise InputError(
                f"the cache holds {cache.batch_size} rows, the input has {B}.",
                fix="Make the cache for this batch, or use its `select` or `repeat`.",
                argument="past_key_values",
            )
        if cache_position is not None and cache_position.tolist() != list(range(past, past + T)):
            raise InputError(
                f"cache_position must be the next cells, {past} to {past + T - 1}.",
                why="a cache appends; it cannot write elsewhere.",
                fix="Leave cache_position out, or crop the cache first.",
                argument="cache_position",
            )
        self._check_length(past + T)
        positions, dense = self._positions(attention_mask, position_ids, cache, B, T, tokens.device)
        output = self._run(
            ForwardInput(
                input_ids, positions, cache, embeds=inputs_embeds, dense=dense, logits_to_keep=logits_to_keep,
                output_hidden_states=output_hidden_states,
            )
        )  # fmt: skip
        kept = cache if use_cache is not False else None
        result = CausalOutput(output.logits, kept, output.hidden_states)
        return result.to_tuple() if return_dict is False else result

    def _check_input(self, tokens: Any, are_ids: bool) -> None:
        C, V = self.description.hidden_size, self.description.vocab_size
        if not isinstance(tokens, Tensor):
            name = "input_ids" if are_ids else "inputs_embeds"
            raise InputError(f"{name} is a {type(tokens).__name__}, not a tensor.",
                             fix="Pass torch.tensor(…) of shape [B, T].", argument=name)  # fmt: skip
        if are_ids and (tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype is torch.bool):
            raise InputError(
                f"input_ids has shape {tuple(tokens.shape)} and dtype {tokens.dtype}; it must be integers [B, T].",
                fix="Pass one prompt as input_ids[None], embeddings as inputs_embeds.",
                argument="input_ids",
            )
        if are_ids and tokens.device.type == "cpu" and tokens.numel():  # elsewhere the look would wait for the device
            low, high = (int(i) for i in tokens.aminmax())
            if low < 0 or high >= V:
                raise InputError(
                    f"input_ids holds {low if low < 0 else high}, which is outside the vocabulary of {V}.",
                    fix="Use ids of this model's tokenizer; mark padding in attention_mask, with any valid id.",
                    argument="input_ids",
                )
        if not are_ids and (tokens.ndim != 3 or tokens.shape[2] != C):
            raise InputError(
                f"inputs_embeds has shape {tuple(tokens.shape)}; it must be [B, T, {C}].", argument="inputs_embeds"
            )

    def _check_length(self, tokens: int) -> None:
        limit = self.description.max_seq_len
        if limit is not None and tokens > limit:
            raise ContextLengthError(
                f"{tokens} tokens are more than this model's context of {limit}.",
                why="positions past it were never trained and cannot be told apart reliably.",
                fix=f"Shorten the input to {limit} tokens, new ones included.",
                tokens=tokens,
                limit=limit,
            )

    def _positions(
        self,
        mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        B: int,
        T: int,
        device: torch.device,
    ) -> tuple[Tensor, bool]:
        """Absolute positions [B, T], or [1, T] where all rows agree, and whether they are known to be dense."""
        past = cache.length if cache is not None else 0
        if mask is not None:
            if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] != past + T:
                raise InputError(
                    f"attention_mask has shape {tuple(mask.shape)}; it must be [{B}, {past + T}].",
                    why=f"the cache holds {past} cells and this call brings {T}; a mask of another width means that "
                    "tokens are fed twice or lost.",
                    fix="Feed only tokens that the cache does not hold yet, with a mask over all of them.",
                    argument="attention_mask",
                )
            if bool(mask.all()) and (cache is None or cache.dense):
                mask = None
        if position_ids is not None:
            if position_ids.ndim != 2 or position_ids.shape[1] != T or position_ids.shape[0] not in (1, B):
                raise InputError(
                    f"position_ids has shape {tuple(position_ids.shape)}; it must be [{B}, {T}] or [1, {T}].",
                    argument="position_ids",
                )
            padding = mask[:, past:] == 0 if mask is not None else torch.zeros_like(position_ids, dtype=torch.bool)
            if bool(((position_ids < 0) & ~padding).any()):
                raise InputError("position_ids holds negative numbers.", fix="Mark padding in attention_mask.",
                                 argument="position_ids")  # fmt: skip
            self._check_length(int(position_ids.masked_fill(padding, -1).max()) + 1)
            return (position_ids if mask is None else position_ids.expand(B, T).masked_fill(padding, -1)), False
        if mask is not None:
            real = mask != 0
            if cache is not None and past:
                _check_past(real[:, :past], cache)
            counted = real.long().cumsum(1) - 1
            return counted.masked_fill(~real, -1)[:, past:], False
        if cache is not None:
            return cache.next_positions(T), cache.dense
        return torch.arange(T, device=device)[None], True


_KNOWN = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache", "cache_position",
    "logits_to_keep", "output_hidden_states", "return_dict",
)  # fmt: skip


def _check_past(real: Tensor, cache: Cache) -> None:
    """The mask's past must mark as many tokens as each row of the cache holds. real: [B, cache length] bool."""
    said = real.sum(1)
    held = cache.next_positions(1)[:, 0].expand_as(said)
    if bool((said != held).any()):
        row = int((said != held).nonzero()[0])
        raise InputError(
            f"attention_mask marks {int(said[row])} tokens of row {row}'s past; its next position is {int(held[row])}.",
            why="a cache knows which of its cells are padding; a later mask cannot hide or uncover any.",
            fix="Repeat the mask under which these cells were fed, with new columns at its end, or leave it out; after "
            "position_ids of your own, go on passing them.",
            argument="attention_mask",
        )  # fmt: skip


def _unknown_argument(unknown: Mapping[str, Any]) -> InputError:
    name = next(iter(unknown))
    near = get_close_matches(name, _KNOWN, 1)
    return InputError(
        f"the model takes no argument {name!r}.",
        why="an argument that is ignored changes results in silence.",
        fix=(f"Did you mean {near[0]!r}? " if near else "") + f"It takes {', '.join(_KNOWN)}.",
        argument=name,
    )
