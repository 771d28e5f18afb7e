"""Decoding strategies made of recipes and of callables with their signature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pluglm_decoding_blocks.failures import not_honoured
from torch import Tensor

from pluglm.contracts import (
    DecodingRequest,
    DecodingStrategy,
    GenerationConfig,
    GenerationOutput,
    LogitsProcessor,
    StoppingCriterion,
    Streamer,
)
from pluglm.errors import InputError
from pluglm_hf.cache_face import CacheFace
from pluglm_hf.fields import DEFAULTS, SAMPLING
from pluglm_hf.recipes.config import RecipeConfig
from pluglm_hf.recipes.failures import RecipeError
from pluglm_hf.recipes.handoff import hand_off, run_recipe
from pluglm_hf.recipes.loading import Recipe, load_recipe
from pluglm_hf.recipes.results import read_result
from pluglm_hf.recipes.sealed import read_sealed
from pluglm_hf.recipes.signature import MODEL_INPUTS, PROTOCOL, Takes, takes
from pluglm_hf.surface import GenerationSurface

#: Settings that reach every recipe, by its config or by the stock preparation.
STANDARD = frozenset(DEFAULTS)
#: Arguments of `generate` that a caller may add for a recipe.
HELPERS = frozenset({"prefix_allowed_tokens_fn", "assistant_model", "tokenizer", "assistant_tokenizer"})
#: Settings that every call has: they stand in the config, and are passed to who names them.
_TOLD = frozenset({"eos_token_id", "bos_token_id", "pad_token_id", "seed", "max_length"})
_FIELDS = frozenset(f.name for f in dataclasses.fields(GenerationConfig))
_OUTPUTS = ("output_scores", "output_logits", "output_hidden_states")

_Run = Callable[[GenerationSurface, Tensor, dict[str, Any]], Any]


class RecipeStrategy:
    """A recipe or a callable as a strategy.

    Attributes:
        fields: every setting of the field, and what the recipe takes itself. Whether it heeds a setting is its own
            affair: it is told. needs: nothing is known before it runs; a cache that cannot do what it asks says so.
        run: (surface, prompt [B, S], further arguments) -> what the recipe returns, whatever that is.
    """

    needs: frozenset[str] = frozenset()

    def __init__(
        self, name: str, run: _Run, signature: Takes, request: DecodingRequest, *, reads: frozenset[str],
        prepared: bool,
    ) -> None:  # fmt: skip
        """Args: run: calls it. reads: names of its own that it can read. prepared: it is handed a prepared call."""
        self.name = name
        self.fields = STANDARD | HELPERS | reads
        self.run, self._signature, self._request, self._prepared = run, signature, request, prepared

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriterion] | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Streamer | None = None,
        **model_kwargs: Any,
    ) -> GenerationOutput:
        """Generate, as `DecodingStrategy.__call__`.

        Draws come from torch's generator, as recipes expect: with a seed it is set for this call and put back after it.

        Raises: RecipeError if the recipe does what would give wrong text or returns no tokens; InputError,
            UnsupportedRequestError; and whatever the recipe raises.
        """
        config = generation_config or GenerationConfig()
        said = config.set_fields()
        if set(said) - self.fields:
            raise not_honoured(self.name, said, self.fields)
        self._check_padding(model_kwargs.get("attention_mask"))
        if config.max_new_tokens == 0:
            return read_result(input_ids, input_ids, config, self.name)
        settings = _config(config, input_ids.shape[1])
        surface = GenerationSurface(
            model, generation_config=settings, decode=self._request.decode, infers_padding=False
        )  # fmt: skip
        told = _Steps(streamer, config.eos_token_id or ()) if streamer is not None else None
        arguments = {
            **_model_arguments(model_kwargs), **self._said(settings, said),
            "logits_processor": list(logits_processor or ()) or None,
            "stopping_criteria": list(stopping_criteria or ()) or None,
        }  # fmt: skip
        if self._can_take("streamer"):
            arguments["streamer"] = told
        try:
            output = read_result(self.run(surface, input_ids, arguments), input_ids, config, self.name)
            if told is not None and not told.steps:
                told.all(output)
        finally:
            if streamer is not None:
                streamer.end()
        return output

    def _can_take(self, name: str) -> bool:
        return self._prepared or bool(self._signature.pick({name: None}))

    def _said(self, settings: RecipeConfig, said: Mapping[str, Any]) -> dict[str, Any]:
        """What a function takes by name besides its config: its own arguments, and settings as a caller wrote them."""
        open_ = self._signature.anything and not self._prepared
        passed = {name: _helper(value) for name, value in said.items() if name not in DEFAULTS and name not in _FIELDS}
        for name in said:
            if name in DEFAULTS and (name in self._signature.names or (open_ and name not in _TOLD)):
                passed[name] = getattr(settings, name)
        return passed

    def _check_padding(self, mask: Tensor | None) -> None:
        """A recipe that cannot be told of padding would read it as text; all of them go on from the last cell."""
        if mask is None:
            return
        if not bool(mask[:, -1].all()):
            row = int((mask[:, -1] == 0).nonzero()[0])
            raise InputError(
                f"row {row} of the prompts ends with padding.", why="a recipe continues each row after its last cell.",
                fix="Pad on the left.", argument="attention_mask",
            )  # fmt: skip
        if not self._can_take("attention_mask") and not bool(mask.all()):
            raise RecipeError(
                f"{self.name} takes no attention_mask, and the prompts differ in length.",
                why="it would read the padding as text.", fix="Pass the prompts one by one.", recipe=self.name,
                argument="attention_mask",
            )  # fmt: skip


def recipe_strategy(recipe: Recipe, request: DecodingRequest) -> RecipeStrategy:
    """A repository's function, called before any preparation. Raises InputError for options; there are none."""
    _no_options(recipe.name, request.options, request.variant)

    def run(surface: GenerationSurface, ids: Tensor, arguments: dict[str, Any]) -> Any:
        return run_recipe(recipe.function, surface, signature=recipe.signature, input_ids=ids, **arguments)

    reads = recipe.signature.own | (recipe.names if recipe.signature.anything else frozenset())
    return RecipeStrategy(recipe.name, run, recipe.signature, request, reads=reads, prepared=False)


def callable_strategy(function: Callable[..., Any], request: DecodingRequest) -> DecodingStrategy:
    """A callable, handed a prepared call: what `custom_generate=function` means.

    Raises: RecipeError if it has no readable signature.
    """
    signature = takes(function)
    name = str(getattr(function, "__name__", type(function).__name__))

    def run(surface: GenerationSurface, ids: Tensor, arguments: dict[str, Any]) -> Any:
        processors, criteria = arguments.pop("logits_processor"), arguments.pop("stopping_criteria")
        return hand_off(surface, function, ids, surface.generation_config, processors, criteria, signature=signature,
                        **arguments)  # fmt: skip

    return RecipeStrategy(name, run, signature, request, reads=signature.own, prepared=True)


def vendored_strategy(package: str, request: DecodingRequest) -> DecodingStrategy:
    """The recipe of an installed package that `pluglm vendor` made: checked, loaded, made a strategy.

    Raises: PluginError if a file is not what was vendored; RecipeError if it cannot be loaded.
    """
    sealed = read_sealed(package)
    name = package.removeprefix("pluglm_recipe_").replace("_", "-")
    return recipe_strategy(load_recipe(sealed.files, name), request)


class _Steps:
    """Tells a streamer of tokens alone: recipes put the prompt first, [B, S], and steps after it, [B].

    Args:
        eos: a row that had one of these has ended; what comes after it is told as -1.
    """

    def __init__(self, streamer: Streamer, eos: Sequence[int]) -> None:
        self._streamer, self._eos = streamer, torch.tensor(eos, dtype=torch.int64)
        self._ended: Tensor | None = None
        self.steps = 0

    def put(self, token_ids: Tensor) -> None:
        """[B] of one step; what has two dimensions is the prompt."""
        if token_ids.ndim != 1:
            return
        self.steps += 1
        ids = token_ids.cpu()
        ended = torch.isin(ids, self._eos)
        if self._ended is not None and self._ended.shape == ended.shape:
            ids, ended = ids.masked_fill(self._ended, -1), ended | self._ended
        self._ended = ended
        self._streamer.put(ids)

    def all(self, output: GenerationOutput) -> None:
        """Everything, of a recipe that told nothing while it ran."""
        new = output.sequences[:, output.prompt_length :].cpu()
        counts = torch.tensor(output.num_new_tokens)[:, None]
        for tokens in new.masked_fill(torch.arange(new.shape[1]) >= counts, -1).T:
            self._streamer.put(tokens)

    def end(self) -> None:
        """The strategy's end is told by the strategy."""


def _config(config: GenerationConfig, S: int) -> RecipeConfig:
    """The settings as recipes read them. S: cells of the prompt."""
    said = {name: value for name, value in config.set_fields().items() if name in DEFAULTS and name != "max_length"}
    if "do_sample" not in said:  # contrastive search reads top_k and draws nothing
        said["do_sample"] = any(name in said for name in SAMPLING) and "penalty_alpha" not in said
    if config.eos_token_id is not None:
        said["eos_token_id"] = config.eos_token_id[0] if len(config.eos_token_id) == 1 else list(config.eos_token_id)
    if config.stop_strings is not None:
        said["stop_strings"] = list(config.stop_strings)
    if config.max_new_tokens is not None:
        said["max_length"] = S + config.max_new_tokens
    elif config.max_length is not None:
        said["max_length"] = config.max_length
    if any(said.get(name) for name in _OUTPUTS):
        said["return_dict_in_generate"] = True
    extra = {name: value for name, value in config.extra.items() if name not in HELPERS}
    return RecipeConfig(**{**extra, **said})


def _model_arguments(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the forward call that say something, the cache in the face that recipes know."""
    given = {name: value for name, value in model_kwargs.items() if value is not None}
    foreign = sorted(set(given) - MODEL_INPUTS)
    if foreign:
        raise InputError(f"a recipe is handed no {foreign[0]}.", fix="Leave it out.", argument=foreign[0])
    cache = given.get("past_key_values")
    if cache is not None and not isinstance(cache, CacheFace):
        given["past_key_values"] = CacheFace(cache)
    return given


def _helper(value: Any) -> Any:
    """A loaded model as recipes call models; anything else as it is."""
    model = getattr(value, "model", None)
    from pluglm.forward import CausalLM

    if isinstance(value, CausalLM):
        return GenerationSurface(value)
    return GenerationSurface(model) if isinstance(model, CausalLM) else value


def _no_options(name: str, options: Sequence[tuple[str, Any]], variant: str | None) -> None:
    said = [option for option, _ in options] + ([variant] if variant else [])
    if said:
        raise InputError(
            f"the recipe {name} has no option {said[0]!r}.", why="a recipe is told everything by its call.",
            fix="Pass it to generate.", argument=str(said[0]),
        )  # fmt: skip


__all__ = ["PROTOCOL", "RecipeStrategy", "callable_strategy", "recipe_strategy", "vendored_strategy"]
