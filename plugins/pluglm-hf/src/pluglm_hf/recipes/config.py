"""`generation_config` as recipes read it: every field of transformers 5.23 by attribute, and fields of their own."""

from __future__ import annotations

import copy
from typing import Any

from pluglm_hf.configs import GenerationConfig
from pluglm_hf.fields import DEFAULTS

#: What an unset field is for a recipe: a value that changes nothing, so that loops written before version 5, where no
#: field was None, work as well. Lengths and top_k have no such value.
UNSET: dict[str, Any] = {
    **DEFAULTS, "max_length": None, "top_k": None, "low_memory": None, "max_matching_ngram_size": None
}  # fmt: skip


class RecipeConfig(GenerationConfig):
    """Settings by attribute. Names that no field has are kept: recipes read and write their own.

    Attributes:
        _pad_token_tensor, _bos_token_tensor: [] int64 or None. _eos_token_tensor: [E] int64 or None. Set when a call
            is prepared.
    """

    _pad_token_tensor: Any = None
    _bos_token_tensor: Any = None
    _eos_token_tensor: Any = None

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(copy.deepcopy(UNSET))
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the generation config has no {name!r}, and the call does not set it")

    def to_dict(self) -> dict[str, Any]:
        """All fields, its own included."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **fields: Any) -> dict[str, Any]:
        """Set fields; returns what is none.

        Args:
            defaults_only: set only those that are None. allow_custom_entries: take any name.
        """
        rest = {}
        for name, value in fields.items():
            if name not in self.__dict__ and not allow_custom_entries:
                rest[name] = value
            elif not defaults_only or self.__dict__.get(name) is None:
                self.__dict__[name] = value
        return rest

    def updated(self, **fields: Any) -> RecipeConfig:
        """A copy with these fields, new ones included."""
        other = copy.copy(self)
        other.__dict__.update(fields)
        return other


def recipe_config(config: GenerationConfig | None) -> RecipeConfig:
    """A copy of `config` as recipes read it; None: nothing is set."""
    if config is None:
        return RecipeConfig()
    said = {name: value for name, value in config.__dict__.items() if value is not None}
    return RecipeConfig(**said)
