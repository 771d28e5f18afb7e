"""What a model's files and the arguments of loading say of generation, and a configuration that must be its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError
from pluglm_hf.configs import FILE, GenerationConfig, check_file
from pluglm_hf.refusals import unsupported

if TYPE_CHECKING:
    from pluglm.lm import LanguageModel
    from pluglm_hf.loading import Wishes
    from pluglm_hf.model_config import PretrainedConfig


def own_settings(lm: LanguageModel, wishes: Wishes) -> GenerationConfig:
    """What the model's files say, what loading said, and special tokens that only a config or tokenizer names."""
    if wishes.generation_config is not None:
        if not isinstance(wishes.generation_config, GenerationConfig):
            raise InputError(f"generation_config is a {type(wishes.generation_config).__name__}.",
                             fix="Pass a GenerationConfig of pluglm_hf.", argument="generation_config")  # fmt: skip
        config = GenerationConfig(**wishes.generation_config.to_diff_dict())
    else:
        config = _of_file(lm)
    own = lm.generation
    eos = own.eos_token_id
    known: dict[str, Any] = {
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "bos_token_id": own.bos_token_id, "pad_token_id": own.pad_token_id,
        "decoder_start_token_id": lm.model.description.decoder_start_token_id,
    }  # fmt: skip
    config.update(defaults_only=True, **known)
    config.update(**wishes.generation)
    return config


def _of_file(lm: LanguageModel) -> GenerationConfig:
    said = lm._context.checkpoint.generation_config  # what was loaded: see `layouts`
    if said is None:
        return GenerationConfig()
    check_file(said, lm._context.checkpoint.path / FILE)
    return GenerationConfig.from_dict({k: v for k, v in said.items() if v is not None})  # type: ignore[no-any-return]


def check_config(passed: Any, own: PretrainedConfig) -> None:
    """A configuration passed to `from_pretrained` must be the model's: nothing else is built of it."""
    if passed is None:
        return
    said: Mapping[str, Any] = passed if isinstance(passed, Mapping) else passed.to_dict()
    has = own.to_dict()
    changed = [k for k, v in said.items() if k in has and has[k] != v and k != "is_encoder_decoder"]
    if changed:
        raise unsupported(f"config.{changed[0]}", said[changed[0]],
                          f"the model's config.json says {has[changed[0]]!r}.",
                          "Change config.json, or leave config out.")  # fmt: skip
