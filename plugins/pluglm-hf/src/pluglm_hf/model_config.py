"""`config` of a model: config.json by attribute, and what its architecture said where the file is silent."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pluglm.contracts.model import ModelDescription


class PretrainedConfig:
    """config.json as read. Values may be set (`config.pad_token_id = 0`); what a loaded model computes stays as it is.

    Args:
        values: config.json. description: what the architecture said, for names that the file does not have.
    """

    def __init__(self, values: Mapping[str, Any], description: ModelDescription | None = None) -> None:
        self.__dict__.update(copy.deepcopy(dict(values)))
        self.__dict__["_names"] = tuple(values)
        for name, value in _described(description).items():
            self.__dict__.setdefault(name, value)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"config.json has no {name!r}; it has {', '.join(self.__dict__.get('_names', ()))}")

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __contains__(self, name: str) -> bool:
        return name in self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretrainedConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it may change

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        return self.__dict__.get(name, default)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """Itself: a model here is of text alone."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """A copy of what it says."""
        return {name: copy.deepcopy(value) for name, value in self.__dict__.items() if not name.startswith("_")}

    def to_json_string(self, use_diff: bool = True) -> str:
        """As JSON text. There is no other form to differ from, so `use_diff` changes nothing."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str) + "\n"

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write config.json."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.to_json_string(), encoding="utf-8")


def _described(description: ModelDescription | None) -> dict[str, Any]:
    """Names that code reads of every config, for files that spell them otherwise or leave them out."""
    if description is None:
        return {}
    eos = description.eos_token_ids
    return {
        "vocab_size": description.vocab_size, "hidden_size": description.hidden_size,
        "max_position_embeddings": description.max_seq_len, "is_encoder_decoder": description.is_encoder_decoder,
        "model_type": description.model_type, "bos_token_id": description.bos_token_id,
        "pad_token_id": description.pad_token_id, "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
        "decoder_start_token_id": description.decoder_start_token_id,
    }  # fmt: skip
