"""`GenerationConfig` as code written for transformers makes and changes it, and its JSON file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pluglm.errors import ConfigError, InputError, ModelNotFoundError
from pluglm_hf.fields import DEFAULTS, RECORDS
from pluglm_hf.refusals import unknown, unsupported

FILE = "generation_config.json"
_CLASS = "GenerationConfig"


class GenerationConfig:
    """How to generate. A field that is None says nothing; `fields.DEFAULTS` has every field and what holds then.

    Unlike the reference's, it has no other attributes: `max_new_token=5` is a typed error, not a setting nobody reads.
    (Names with a leading underscore may be set, as decoding methods from the Hub do.)
    """

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(dict.fromkeys(DEFAULTS))
        for name, value in fields.items():
            if name not in RECORDS:
                setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in DEFAULTS and not name.startswith("_"):
            if name == "continuous_batching_config":
                raise _no_batches(value)
            raise unknown(_CLASS, name, DEFAULTS)
        if name == "compile_config" and value is not None and not isinstance(value, CompileConfig):
            raise InputError(f"compile_config is a {type(value).__name__}.", fix="Pass a CompileConfig.",
                             argument="compile_config")  # fmt: skip
        self.__dict__[name] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it may change

    def __repr__(self) -> str:
        return f"{_CLASS} {self.to_json_string()}"

    def to_dict(self) -> dict[str, Any]:
        """Every field; None where nothing is said."""
        return {name: copy.deepcopy(self.__dict__[name]) for name in DEFAULTS}

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in self.to_dict().items() if value is not None}

    def to_json_string(self, use_diff: bool = True) -> str:
        """As JSON text: of the fields that say something, or of all."""
        said = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(said, indent=2, sort_keys=True, default=_plain) + "\n"

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **fields: Any
    ) -> dict[str, Any]:  # fmt: skip
        """Set fields; returns what is none.

        Args:
            defaults_only: set only those that say nothing yet. allow_custom_entries: refused, see the class.
        """
        if allow_custom_entries:
            raise unsupported("allow_custom_entries", True, "a setting that nothing reads changes results in silence.",
                              "Leave it out; what is no field is returned.")  # fmt: skip
        for name, value in fields.items():
            if name in DEFAULTS and not (defaults_only and self.__dict__[name] is not None):
                setattr(self, name, value)
        return {name: value for name, value in fields.items() if name not in DEFAULTS}

    def validate(self, strict: bool = False) -> None:
        """Nothing: a value that makes no sense is refused by the call that would read it, always strictly."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **fields: Any) -> Any:
        """From a dict, with some fields changed. With `return_unused_kwargs`: a pair with those that are no fields."""
        made = cls(**{**config_dict, **{k: v for k, v in fields.items() if k in DEFAULTS}})
        unused = {k: v for k, v in fields.items() if k not in DEFAULTS}
        if unused and not return_unused_kwargs:
            raise unknown(_CLASS, next(iter(unused)), DEFAULTS)
        return (made, unused) if return_unused_kwargs else made

    @classmethod
    def from_model_config(cls, model_config: Any) -> GenerationConfig:
        """What a config.json says of generation: old files hold such fields, and all of them special tokens."""
        values = model_config if isinstance(model_config, Mapping) else model_config.to_dict()
        return cls(**{name: values[name] for name in DEFAULTS if values.get(name) is not None})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | Path, config_file_name: str | None = None, **arguments: Any
    ) -> GenerationConfig:
        """The generation_config.json of a folder, or of a model by name. arguments: of the look-up, then fields.

        Raises: ModelNotFoundError without such a file, ConfigError for one that cannot be honoured.
        """
        from pluglm_hf.loading import find_folder

        folder, fields = find_folder(pretrained_model_name, arguments)
        path = folder / (config_file_name or FILE)
        if not path.is_file():
            raise ModelNotFoundError(
                f'"{path}" does not exist.', why="the model has no generation settings of its own.",
                fix="Use GenerationConfig(…), or GenerationConfig.from_model_config(model.config).", model=str(folder),
            )  # fmt: skip
        return cls.from_dict(_read(path), **fields)  # type: ignore[no-any-return]

    def save_pretrained(self, save_directory: str | Path, config_file_name: str | None = None) -> None:
        """Write the fields that say something, where `from_pretrained` finds them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / (config_file_name or FILE)).write_text(self.to_json_string(), encoding="utf-8")


class CompileConfig:
    """How the reference would compile a forward pass. `generate` refuses it: here that is chosen when loading.

    Args: as there; kept so that an error can repeat them.
    """

    def __init__(
        self, fullgraph: bool = False, dynamic: bool | None = None, backend: str = "inductor",
        mode: str = "reduce-overhead", options: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.fullgraph, self.dynamic, self.backend = fullgraph, dynamic, backend
        self.mode, self.options = mode, options

    def to_dict(self) -> dict[str, Any]:
        """Its arguments."""
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"CompileConfig(mode={self.mode!r}, backend={self.backend!r})"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except (OSError, ValueError) as e:
        raise ConfigError(f'"{path}" is not a JSON object.', why=str(e), fix="Repair the file.", key=None,
                          path=str(path)) from e  # fmt: skip
    check_file(values, path)
    return values


def check_file(values: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError if a file holds what is no field."""
    for name in values:
        if name not in DEFAULTS and name not in RECORDS:
            raise ConfigError(
                f'"{path}" holds {name!r}, which is no generation field.',
                why="a setting that nothing reads changes results in silence.", fix="Take it out of the file.",
                key=name, path=str(path),
            )  # fmt: skip


def _plain(value: Any) -> Any:
    """What JSON does not know: configurations as the dict of their arguments."""
    if callable(getattr(value, "to_dict", None)):
        return value.to_dict()
    raise InputError(f"a {type(value).__name__} cannot be written to JSON.", fix="Set the field in the call instead.",
                     argument="generation_config")  # fmt: skip


def _no_batches(value: object) -> Exception:
    return unsupported(
        "continuous_batching_config", value, "batches that change while they run are an engine's work.",
        "Leave it out.",
    )  # fmt: skip
