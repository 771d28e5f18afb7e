"""The ways in: a repository's function before any preparation, and a callable after the stock one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pluglm.errors import InputError
from pluglm_hf.configs import GenerationConfig
from pluglm_hf.recipes.config import UNSET, RecipeConfig, recipe_config
from pluglm_hf.recipes.draws import seeded
from pluglm_hf.recipes.failures import RecipeError
from pluglm_hf.recipes.prepare import Prepared, prepare
from pluglm_hf.recipes.signature import MODEL_INPUTS, Takes, takes
from pluglm_hf.refusals import unknown
from pluglm_hf.surface import GenerationSurface

#: What a repository's function is always handed, None or not.
_NAMED = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "streamer",
    "negative_prompt_ids", "negative_prompt_attention_mask",
)  # fmt: skip


@torch.no_grad()
def run_recipe(
    function: Callable[..., Any], model: GenerationSurface, *args: Any, signature: Takes | None = None, **kwargs: Any
) -> Any:
    """Call a repository's function (way 1), without gradients.

    Args:
        args: the prompt, if by position. signature: of the function, if known.
        **kwargs: of `generate`: inputs or input_ids, generation_config, settings, and the function's own.
    Returns: what it returns.
    Raises: RecipeError, InputError; and whatever it raises.
    """
    signature = signature or takes(function)
    prompt, spelled, kwargs = _prompt(args, kwargs)
    settings = {name: kwargs[name] for name in UNSET if name in kwargs}
    config = _merged_config(model, kwargs.pop("generation_config", None), settings, prompt)
    _check_taken(function, signature, kwargs)
    named: dict[str, Any] = {**dict.fromkeys(_NAMED), **kwargs, "generation_config": config}
    if "seed" not in signature.names:  # it is spent here, not once more in a call below
        named.pop("seed", None)
    passed = signature.pick(named)
    by_name = [name for name in ("inputs", "input_ids") if name in signature.names]
    # What a recipe reads off the model must agree with what it is handed.
    seed, config.seed = config.seed, None
    model = model.configured(config)
    with seeded(seed, model.device):
        if spelled in by_name or (not by_name and signature.anything):
            return function(model, **passed, **{spelled: prompt})
        if by_name:
            return function(model, **passed, **{by_name[0]: prompt})
        return function(model, prompt, **passed)


@torch.no_grad()
def hand_off(
    model: GenerationSurface, function: Callable[..., Any], input_ids: Tensor | None, config: GenerationConfig | None,
    processors: Sequence[Any] | None = None, criteria: Sequence[Any] | None = None, streamer: Any = None,
    tokenizer: Any = None, *, signature: Takes | None = None, prefix_allowed_tokens_fn: Any = None,
    assistant_model: Any = None, assistant_tokenizer: Any = None, **own: Any,
) -> Any:  # fmt: skip
    """Prepare a call and hand it to a callable (way 3), without gradients.

    Args:
        input_ids: [B, S]. processors, criteria: the caller's. streamer, tokenizer, assistant_model: go to a callable
            that declares them; a streamer of one that does not is told the tokens at the end.
        **own: what the callable declares beyond that, and arguments of the forward call.
    Returns: what the callable returns.
    Raises: RecipeError, InputError; and whatever it raises.
    """
    signature = signature or takes(function)
    base = recipe_config(config)
    mine = {name: own.pop(name) for name in list(own) if name in signature.own}
    settings = {name: own[name] for name in own if name in base.__dict__ and own[name] is not None}
    own = {name: value for name, value in own.items() if name not in base.__dict__ or name == "use_cache"}
    foreign = [name for name, value in own.items() if name not in MODEL_INPUTS and value is not None]
    if foreign:
        raise unknown("generate", foreign[0], {*signature.own, *UNSET, *MODEL_INPUTS})
    ready = prepare(
        model, input_ids, base.updated(**settings), logits_processor=processors, stopping_criteria=criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        tokenizer=tokenizer if tokenizer is not None else model.decode, model_kwargs=own,
    )  # fmt: skip
    declared = {
        "streamer": streamer, "tokenizer": tokenizer, "assistant_model": assistant_model,
        "assistant_tokenizer": assistant_tokenizer, "synced_gpus": False, "inputs_tensor": ready.input_ids,
    }  # fmt: skip
    said = {name for name, value in declared.items() if value is not None} | signature.required
    mine |= {name: declared[name] for name in declared.keys() & said & signature.names}
    if "tokenizer" in signature.required and tokenizer is None:
        raise RecipeError(
            f"{getattr(function, '__name__', 'the callable')} needs a tokenizer, and none was passed.",
            fix="Pass tokenizer=… to generate.", argument="tokenizer",
        )  # fmt: skip
    passed = {
        "logits_processor": ready.processors, "stopping_criteria": ready.criteria, "generation_config": ready.config,
        **mine, **ready.model_kwargs,
    }  # fmt: skip
    _check_called(function, signature, passed)
    if streamer is not None:
        streamer.put(ready.input_ids.cpu())
    with seeded(ready.config.seed, model.device):
        result = function(model, ready.input_ids, **passed)
    if streamer is not None and "streamer" not in signature.names:
        _tell(streamer, result, ready)
    return result


class GenerationMixin:
    """What recipes call as `GenerationMixin.generate(model, …, custom_generate=function)`."""

    @staticmethod
    @torch.no_grad()
    def generate(
        model: GenerationSurface, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Any] | None = None, stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Any = None, synced_gpus: bool | None = None, assistant_model: Any = None,
        streamer: Any = None, negative_prompt_ids: Any = None, negative_prompt_attention_mask: Any = None,
        custom_generate: Callable[..., Any] | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Stock preparation, then `custom_generate`; without it greedy decoding or sampling.

        Raises: InputError, UnsupportedRequestError for what cannot be honoured; RecipeError.
        """
        if synced_gpus:
            raise InputError("synced_gpus=True cannot be honoured.", why="a model here runs in one process.",
                             fix="Leave it out.", argument="synced_gpus")  # fmt: skip
        if negative_prompt_ids is not None or negative_prompt_attention_mask is not None:
            raise InputError("negative_prompt_ids cannot be honoured.", why="there is no guidance inside a recipe.",
                             fix="Leave it out.", argument="negative_prompt_ids")  # fmt: skip
        if custom_generate is None:
            from pluglm_hf.recipes.stock import sample

            custom_generate = sample
        if not callable(custom_generate):
            raise RecipeError(
                f"a recipe calls generate with custom_generate={custom_generate!r}.",
                why="one recipe does not load another: each is vendored by itself.",
                fix="Vendor the other one, and name it in the call.", argument="custom_generate",
            )  # fmt: skip
        ids = kwargs.pop("input_ids", None)
        kwargs.pop("trust_remote_code", None)  # what runs here was consented to
        base = generation_config if generation_config is not None else model.generation_config
        return hand_off(
            model, custom_generate, inputs if inputs is not None else ids, base, logits_processor, stopping_criteria,
            streamer, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn, assistant_model=assistant_model, **kwargs,
        )  # fmt: skip


def _prompt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor | None, str, dict[str, Any]]:
    """The one prompt, the name that it came by, and the other arguments. By position it is `inputs`."""
    kwargs = dict(kwargs)
    given = [*(("inputs", x) for x in args), *((name, kwargs.pop(name, None)) for name in ("inputs", "input_ids"))]
    found = [(name, x) for name, x in given if x is not None]
    if len(found) > 1:
        raise InputError("the prompt was passed more than once.", fix="Pass it as inputs, or as input_ids.",
                         argument="inputs")  # fmt: skip
    return (found[0][1], found[0][0], kwargs) if found else (None, "inputs", kwargs)


def _check_taken(function: Callable[..., Any], signature: Takes, kwargs: dict[str, Any]) -> None:
    """Raise for arguments that the function has no place for. Settings have one: the config."""
    for name, value in kwargs.items():
        if value is not None and name not in UNSET and not signature.pick({name: value}):
            raise unknown(f"the recipe {getattr(function, '__name__', '')}".rstrip(), name, signature.names)


def _check_called(function: Callable[..., Any], signature: Takes, passed: dict[str, Any]) -> None:
    """Raise where the call of a callable would be no call: what it has no place for, and what it misses."""
    name = getattr(function, "__name__", "the callable")
    foreign = sorted(passed.keys() - signature.pick(passed).keys())
    missing = sorted(signature.required - passed.keys() - {*signature.first}) if signature.first else []
    if len(signature.first) == 1:
        foreign = ["input_ids", *foreign]
    if foreign:
        raise RecipeError(
            f"{name} takes no {foreign[0]}.", why=f"a callable is handed the prompt and, by name, {', '.join(passed)}.",
            fix="Write def generate(model, input_ids, logits_processor, stopping_criteria, generation_config, "
            "**model_kwargs).", argument="custom_generate",
        )  # fmt: skip
    if missing:
        raise RecipeError(f"{name} needs {missing[0]}, and it was not passed.", fix=f"Pass {missing[0]}=… to generate.",
                          argument=missing[0])  # fmt: skip


def _merged_config(
    model: GenerationSurface, given: GenerationConfig | None, settings: dict[str, Any], prompt: Tensor | None
) -> RecipeConfig:
    """The call's settings over the given config over the model's, with both ways to say a length."""
    config = recipe_config(model.generation_config)
    for said in (given.__dict__ if given is not None else {}, settings):
        config = config.updated(**{name: value for name, value in said.items() if value is not None})
    if prompt is not None and prompt.ndim == 2:
        S = prompt.shape[1]
        if config.max_new_tokens is not None:
            config.max_length = S + config.max_new_tokens
        elif config.max_length is not None:
            config.max_new_tokens = max(0, config.max_length - S)
    return config


def _tell(streamer: Any, result: Any, ready: Prepared) -> None:
    """Tell a streamer of the tokens that a callable without one has made."""
    sequences = getattr(result, "sequences", result)
    if isinstance(sequences, Tensor):
        for tokens in sequences[:, ready.input_ids.shape[1] :].T:
            streamer.put(tokens.cpu())
    streamer.end()
