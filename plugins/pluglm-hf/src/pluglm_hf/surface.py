"""What a decoding method of the Hub calls `model`: the forward contract, and the helpers that such methods lean on.

Both generations of loops work: since transformers 5.3 a loop says how many tokens are new (`next_sequence_length`);
before, `prepare_inputs_for_generation` found that out. Here it does again, from the cache and the mask, never by guess.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pluglm.errors import InputError
from pluglm.forward import CausalLM
from pluglm_hf.cache_face import TELLING, CacheFace
from pluglm_hf.model_config import PretrainedConfig
from pluglm_hf.outputs import CausalLMOutputWithPast
from pluglm_hf.recipes.config import RecipeConfig
from pluglm_hf.recipes.failures import fed_twice
from pluglm_hf.recipes.inputs import new_tokens, whole_length

#: Arguments of a forward call that say nothing where they are None or False.
_SILENT = ("output_attentions", "output_router_logits", "labels", "token_type_ids", "return_legacy_cache")


class GenerationSurface:
    """A decoder-only model as Hub methods see it.

    Args:
        lm: the model. generation_config: what `model.generation_config` is; None: nothing is set.
        generate: what `model.generate(…)` does; None: greedy decoding and sampling by `recipes.stock`.
        decode: token ids -> text, for stop strings; None if there is no tokenizer.
        infers_padding: where a call gives no mask, pad tokens in the prompt are padding, as in the reference.
    """

    main_input_name = "input_ids"
    base_model_prefix = "model"
    # Recipes ask for `_reorder_cache` and `_get_initial_cache_position` with hasattr: neither may be here.

    def __init__(
        self, lm: CausalLM, *, generation_config: RecipeConfig | None = None,
        generate: Callable[..., Any] | None = None, decode: Callable[..., str] | None = None,
        infers_padding: bool = True,
    ) -> None:  # fmt: skip
        self.lm, self.decode, self.infers_padding = lm, decode, infers_padding
        self.config = model_config(lm)
        self.generation_config = generation_config if generation_config is not None else RecipeConfig()
        self._generate = generate
        self._is_stateful = any(slot.kind == "state" for slot in lm.description.slots)

    def configured(self, config: RecipeConfig) -> GenerationSurface:
        """The same model with other settings of its own."""
        other = copy.copy(self)
        other.generation_config = config
        return other

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.lm.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """`forward`."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """One pass, as `pluglm.forward.CausalLM.forward`, with a cache unless `use_cache=False`.

        Raises: RecipeError if the input begins with what the cache holds; InputError for what cannot be honoured.
        """
        if more.get("output_attentions"):
            raise InputError(
                "output_attentions=True cannot be honoured.", why="attention backends do not keep their weights.",
                fix="Leave it out.", argument="output_attentions",
            )  # fmt: skip
        if output_hidden_states not in (None, True, False):
            raise InputError(f"output_hidden_states={output_hidden_states!r} makes no sense: it must be True or False.",
                             why="all layers are returned, or none.", argument="output_hidden_states")  # fmt: skip
        more = {name: value for name, value in more.items() if name not in _SILENT or value not in (None, False)}
        tokens = input_ids if input_ids is not None else inputs_embeds
        keeps = use_cache is not False and self.lm.layout is not None
        face = past_key_values if past_key_values is not None or not keeps else CacheFace()
        cache, held = face, 0
        if isinstance(face, CacheFace) and tokens is not None:
            cache = face.bind(self.lm, tokens.shape[0])
            held = cache.length
            _check_not_fed_twice(face, input_ids, held, masked=attention_mask is not None, position_ids=position_ids)
            if attention_mask is None and position_ids is not None and (not held or cache.dense):
                # They say nothing that the cache does not know, which knows quicker ways for what is dense.
                position_ids = None if _follow(position_ids, held, tokens.shape[1]) else position_ids
        if isinstance(tokens, Tensor) and tokens.device != self.device:
            input_ids, inputs_embeds, attention_mask, position_ids = (
                x.to(self.device) if x is not None else None
                for x in (input_ids, inputs_embeds, attention_mask, position_ids)
            )
        output = self.lm(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            inputs_embeds=inputs_embeds, use_cache=keeps, logits_to_keep=logits_to_keep,
            output_hidden_states=bool(output_hidden_states), **more,
        )  # fmt: skip
        if isinstance(face, CacheFace):
            face.remember(input_ids, held)
        result = CausalLMOutputWithPast(None, output.logits, face if keeps else None, output.hidden_states)
        return result.to_tuple() if return_dict is False else result

    # Helpers of loops

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments of the next forward call: the tokens that the cache does not hold, with their positions and mask.

        Args:
            input_ids: [B, S] the whole sequence, or the new tokens. next_sequence_length: how many of its last tokens
                are new. None: found out from the cache and the width of attention_mask or position_ids.
            inputs_embeds: [B, S, C] instead of ids, in the first iteration.
            **kwargs: go on to the forward call.
        Raises: RecipeError if nothing says which tokens are new.
        """
        cache_position = kwargs.pop("cache_position", None)  # follows from the cache; kept by loops of older versions
        position_ids = kwargs.pop("position_ids", None)
        embedded = inputs_embeds is not None and bool(is_first_iteration)
        tokens = inputs_embeds if embedded else input_ids
        assert tokens is not None
        total = whole_length(attention_mask, position_ids, cache_position)
        count = new_tokens(tokens, past_key_values, next_sequence_length, total, embedded=embedded)
        tokens = tokens[:, tokens.shape[1] - count :]
        inputs: dict[str, Any] = {"inputs_embeds" if embedded else "input_ids": tokens}
        if past_key_values is not None:
            inputs["past_key_values"] = past_key_values
        if position_ids is not None:
            inputs["position_ids"] = position_ids[:, -count:]
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        return {**kwargs, **inputs}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, num_new_tokens: int = 1
    ) -> dict[str, Any]:
        """`model_kwargs` after `num_new_tokens` were chosen: the cache of `outputs`, mask and positions grown."""
        prefix = "decoder_" if is_encoder_decoder else ""
        cache = getattr(outputs, "past_key_values", None)
        if cache is not None:
            model_kwargs["past_key_values"] = cache
        steps = torch.arange(1, num_new_tokens + 1, device=self.device)
        mask = model_kwargs.get(f"{prefix}attention_mask")
        if mask is not None:
            ones = mask.new_ones((mask.shape[0], num_new_tokens))
            model_kwargs[f"{prefix}attention_mask"] = torch.cat((mask, ones), dim=1)
        for name in (f"{prefix}position_ids", "cache_position"):
            positions = model_kwargs.get(name)
            if positions is not None:
                new = positions[..., -1:] + steps.to(positions)
                # Positions are kept whole; cells only of the tokens that come next.
                model_kwargs[name] = new if name == "cache_position" else torch.cat((positions, new), dim=-1)
        return model_kwargs

    def _has_unfinished_sequences(self, this_peer_finished: bool, synced_gpus: bool, device: Any = None) -> bool:
        """Shall the loop go on? synced_gpus: refused, there is one process."""
        if synced_gpus:
            raise InputError("synced_gpus=True cannot be honoured.", why="a model here runs in one process.",
                             fix="Leave it out.", argument="synced_gpus")  # fmt: skip
        return not this_peer_finished

    def _prefill(
        self, input_ids: Tensor, generation_config: RecipeConfig, model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:  # fmt: skip
        """Run what the cache does not hold of the prompt, in pieces of `generation_config.prefill_chunk_size`."""
        inputs = self.prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **model_kwargs)
        size = getattr(generation_config, "prefill_chunk_size", None)
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        if size is None or ids is None or ids.shape[1] <= size:
            return self(**inputs, return_dict=True)
        if cache is None:
            raise InputError("prefill_chunk_size needs a cache.", fix="Leave it out, or leave out use_cache=False.",
                             argument="prefill_chunk_size")  # fmt: skip
        past, outputs = cache.get_seq_length(), None
        mask, positions = inputs.pop("attention_mask", None), inputs.pop("position_ids", None)
        for start in range(0, ids.shape[1], size):
            stop = min(start + size, ids.shape[1])
            inputs["input_ids"] = ids[:, start:stop]
            if mask is not None:
                inputs["attention_mask"] = mask[:, : past + stop]
            if positions is not None:
                inputs["position_ids"] = positions[:, start:stop]
            outputs = self(**inputs, return_dict=True)
        return outputs

    def get_compiled_call(self, compile_config: Any = None) -> Callable[..., Any]:
        """The forward call: how a model is run was planned when it was loaded."""
        return self.__call__

    def _valid_auto_compile_criteria(self, model_kwargs: Mapping[str, Any], generation_config: Any) -> bool:
        """Never: see `get_compiled_call`."""
        return False

    @contextlib.contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        """Nothing is to be done: the executor is the same for prefill and decode."""
        yield

    # Parts of the model

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, weight [V, C]."""
        return self.lm.get_input_embeddings()

    def get_output_embeddings(self) -> Callable[[Tensor], Tensor]:
        """The head: hidden states [..., C] -> scores [..., V], before any scale or cap."""
        return self.lm.get_output_embeddings()

    def can_generate(self) -> bool:
        """Yes."""
        return True

    def eval(self) -> GenerationSurface:
        """Itself: a loaded model is never in training."""
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the caller's `generate` does without a recipe; see `GenerationMixin.generate`."""
        if self._generate is not None:
            return self._generate(*args, **kwargs)
        from pluglm_hf.recipes.handoff import GenerationMixin

        return GenerationMixin.generate(self, *args, **kwargs)


def model_config(lm: CausalLM) -> PretrainedConfig:
    """config.json by attribute, with the names that recipes read of every config."""
    description = lm.description
    config = PretrainedConfig(lm.config, description)
    tied = description.program.head.tied if description.program is not None else False
    further = {
        "num_hidden_layers": description.num_layers, "tie_word_embeddings": tied, "use_cache": True,
        # Recipes ask only whether it is a flash kernel that wants other masks; masks are the backend's affair here.
        "_attn_implementation": "sdpa",
    }  # fmt: skip
    for name, value in further.items():
        if not hasattr(config, name):
            setattr(config, name, value)
    # A decoder bound to encoded inputs is a decoder-only model to its caller.
    config.is_encoder_decoder = False
    return config


def _check_not_fed_twice(
    face: CacheFace, ids: Tensor | None, held: int, *, masked: bool, position_ids: Tensor | None
) -> None:
    """Raise RecipeError for a whole sequence on a cache that holds its beginning.

    A mask over the cache and the input says what is meant, and the core checks its width. Without one, tokens that
    begin as the cache begins, and are more than it holds, are the sequence again.
    """
    if ids is None or not held or masked or ids.ndim != 2:
        return
    T = ids.shape[1]
    if held > T or (held == T and T < TELLING) or not face.starts(ids):
        return
    if position_ids is None or not _follow(position_ids, held, T):
        raise fed_twice(held, T)


def _follow(position_ids: Tensor, held: int, T: int) -> bool:
    """Are these the positions of T tokens behind `held` ones, with no padding anywhere?"""
    if position_ids.ndim != 2 or position_ids.shape[1] != T:
        return False
    wanted = torch.arange(held, held + T, device=position_ids.device)
    return torch.equal(position_ids, wanted.expand(position_ids.shape))
