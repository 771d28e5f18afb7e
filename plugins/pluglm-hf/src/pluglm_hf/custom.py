"""`custom_generate`: a callable after the stock preparation, or a method from the Hub that was vendored, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError
from pluglm_hf.refusals import unsupported

if TYPE_CHECKING:
    from pluglm_hf.model import HFModel


def run_custom(
    model: HFModel, custom: Callable[..., Any] | str, inputs: Any, named: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> Any:  # fmt: skip
    """Run it. custom: a function with the signature of the Hub's, a vendored method's name, or its folder.

    Returns: what it returns.
    Raises: InputError, PluginNotFoundError, RecipeError; what it raises.
    """
    from pluglm_hf.generate import generate
    from pluglm_hf.recipes.handoff import GenerationMixin
    from pluglm_hf.recipes.strategy import RecipeStrategy
    from pluglm_hf.surface import GenerationSurface

    if not isinstance(model, GenerationSurface):
        raise unsupported("custom_generate", custom, "methods of the Hub run on decoder-only models here.",
                          "Leave it out, or use a decoder-only model.")  # fmt: skip
    given = dict(kwargs)
    if isinstance(inputs, Mapping):
        given, inputs = {**inputs, **given}, None
    if callable(custom):
        return GenerationMixin.generate(model, inputs, custom_generate=custom, **named, **given)
    strategies = model.language_model._strategies  # of the loaded model: see `layouts`
    strategy = strategies.of(strategies.wanted(None, custom), ())
    if not isinstance(strategy, RecipeStrategy):
        return generate(model, inputs, named, {**given, "decoding": custom})
    _refuse_trust(given)
    if inputs is not None and given.get("input_ids") is not None:
        raise InputError("inputs and input_ids both hold the prompt.", fix="Pass one of them.", argument="inputs")
    ids = inputs if inputs is not None else given.pop("input_ids", None)
    # As a strategy it would return sequences; called so, it returns what it returns.
    return strategy.run(model, ids, {**given, **{k: v for k, v in named.items() if v is not None}})


def _refuse_trust(given: dict[str, Any]) -> None:
    if given.pop("trust_remote_code", None):
        raise unsupported("trust_remote_code", True, "a vendored method was looked at when it was installed.",
                          "Leave it out.")  # fmt: skip
