"""What a recipe's function takes; looked up once, when it is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pluglm_hf.recipes.failures import RecipeError

#: Arguments that both ways of calling a recipe know by name; all others are its own, or settings.
PROTOCOL = frozenset({
    "model", "inputs", "input_ids", "generation_config", "logits_processor", "stopping_criteria", "streamer",
    "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "tokenizer", "assistant_tokenizer",
    "negative_prompt_ids", "negative_prompt_attention_mask",
})  # fmt: skip
#: Arguments of a forward call that a caller may give.
MODEL_INPUTS = frozenset({
    "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache", "logits_to_keep",
    "token_type_ids", "cache_position",
})  # fmt: skip


@dataclass(frozen=True)
class Takes:
    """The parameters of one function.

    Attributes:
        names: that can be given by keyword. required: of these, without a default. anything: it has `**kwargs`.
        first: names of the first two that can be given by position, () if it takes any number.
    """

    names: frozenset[str]
    required: frozenset[str]
    anything: bool
    first: tuple[str, ...]

    @property
    def own(self) -> frozenset[str]:
        """Names that neither the protocol nor the forward call has."""
        return self.names - PROTOCOL - MODEL_INPUTS

    def pick(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `arguments` that it can take."""
        return {name: value for name, value in arguments.items() if self.anything or name in self.names}


def takes(function: Callable[..., Any]) -> Takes:
    """Look a function up. Raises RecipeError if it has no readable signature, or no place for the model."""
    name = getattr(function, "__name__", type(function).__name__)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as e:
        raise RecipeError(
            f"{name} has no signature that can be read.", why=str(e), fix="Wrap it in a Python function.",
            argument="custom_generate",
        ) from e  # fmt: skip
    kinds = inspect.Parameter
    keyword = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    positional = [p.name for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    spread = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    if not positional and not spread:
        raise RecipeError(
            f"{name} takes no model.", why="its first parameter is what it generates with.",
            fix="Write def generate(model, input_ids, …, **kwargs).", argument="custom_generate",
        )  # fmt: skip
    return Takes(
        frozenset(p.name for p in keyword),
        frozenset(p.name for p in keyword if p.default is kinds.empty),
        any(p.kind is kinds.VAR_KEYWORD for p in parameters),
        () if spread else tuple(positional[:2]),
    )
