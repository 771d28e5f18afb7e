"""Generation settings: what a model's files say, what a call says, and who wins.

A call's own arguments win over the strategy the user named, which wins over `generation_config.json`, which wins over
`config.json`. Sampling fields of a file count only if the file also says `do_sample`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pluglm.contracts.decoding import GenerationConfig
from pluglm.contracts.model import ModelDescription
from pluglm.errors import ConfigError, ContextLengthError, InputError, PluglmError

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
#: Fields of `extra` that mean nothing unless tokens are drawn.
EXTRA_SAMPLING = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
#: New tokens if neither the call nor the model's files say how many; less if the context has less room.
DEFAULT_NEW_TOKENS = 256

#: Keys of generation_config.json that say nothing about how tokens are chosen here, with the reason.
NEUTRAL_KEYS: Mapping[str, str] = {
    "transformers_version": "says who wrote the file",
    "_from_model_config": "says how the file was made",
    "use_cache": "a call decides",
    "cache_implementation": "the plan chooses the cache",
    "cache_config": "the plan chooses the cache",
    "return_dict_in_generate": "the shape of an answer is the caller's choice",
    "output_scores": "the shape of an answer is the caller's choice",
    "output_logits": "the shape of an answer is the caller's choice",
    "output_attentions": "the shape of an answer is the caller's choice",
    "output_hidden_states": "the shape of an answer is the caller's choice",
    "trust_remote_code": "no code is taken from a model",
    "decoder_start_token_id": "only encoder-decoders start so; `decoder_start` reads it for them",
}
#: Values at which a field changes nothing.
NEUTRAL_VALUES: Mapping[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "diversity_penalty": 0.0, "min_length": 0, "early_stopping": False,
    "renormalize_logits": False, "remove_invalid_values": False, "token_healing": False, "is_assistant": False,
    "max_length": 20, "low_memory": False, "guidance_scale": 1.0,
}  # fmt: skip


def defaults(
    description: ModelDescription, file: Mapping[str, Any] | None, *, eos: int | None, bos: int | None, pad: int | None
) -> GenerationConfig:
    """The model's own settings: generation_config.json over config.json over the tokenizer's special tokens.

    Raises: ConfigError for a value that makes no sense.
    """
    said = {k: v for k, v in (file or {}).items() if v is not None and k not in NEUTRAL_KEYS}
    said = {k: v for k, v in said.items() if not (k in NEUTRAL_VALUES and v == NEUTRAL_VALUES[k])}
    sample = said.pop("do_sample", False)
    if not isinstance(sample, bool):
        raise _senseless(f"do_sample={sample!r}: it must be true or false.", "do_sample")
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        ids = said.get(name)
        if name != "eos_token_id" and isinstance(ids, int) and ids < 0:
            del said[name]  # how some files say that there is none
            continue
        for i in ids if isinstance(ids, list) else [ids]:
            if isinstance(i, int) and not 0 <= i < description.vocab_size:
                raise _senseless(f"{name}={ids!r} is outside the vocabulary of {description.vocab_size}.", name)
    if not sample:
        for name in (*SAMPLING, *EXTRA_SAMPLING):
            said.pop(name, None)
    elif not any(name in said for name in (*SAMPLING, *EXTRA_SAMPLING)):
        said["temperature"] = 1.0
    said.setdefault("eos_token_id", list(description.eos_token_ids) or ([eos] if eos is not None else None))
    said.setdefault("bos_token_id", description.bos_token_id if description.bos_token_id is not None else bos)
    said.setdefault("pad_token_id", description.pad_token_id if description.pad_token_id is not None else pad)
    try:
        return GenerationConfig().updated(**said)
    except (PluglmError, TypeError) as e:
        raise _senseless(getattr(e, "what", str(e)), getattr(e, "argument", None)) from e


def decoder_start(
    description: ModelDescription, file: Mapping[str, Any] | None, *, bos: int | None, call: Any = None
) -> int:
    """The token that an encoder-decoder's decoder begins with: the call's, else generation_config.json's, else
    config.json's, else BOS.

    Args:
        bos: the BOS token by the files and the tokenizer. call: `decoder_start_token_id` of the call, or None.
    Raises: InputError if nobody names one, or for a call's that makes no sense; ConfigError for a file's.
    """
    name, V = "decoder_start_token_id", description.vocab_size
    said = (file or {}).get(name)
    found = next((i for i in (call, said, description.decoder_start_token_id, bos) if i is not None), None)
    if found is None:
        raise InputError(
            "nothing says which token this model's decoder begins with.",
            why="neither generation_config.json nor config.json has decoder_start_token_id, and there is no BOS token.",
            fix=f"Pass {name}=… (T5: the padding token), or add it to config.json.", argument=name,
        )  # fmt: skip
    if type(found) is not int or not 0 <= found < V:
        why = f"{name}={found!r} is no id of this vocabulary of {V}."
        raise (
            InputError(why, fix="Pass the id of one token.", argument=name)
            if call is not None
            else _senseless(why, name)
        )
    return found


def _senseless(why: str, key: str | None) -> ConfigError:
    return ConfigError(
        "generation_config.json holds a setting that makes no sense.", why=why, fix="Correct the file.", key=key
    )


def for_call(base: GenerationConfig, call: Mapping[str, Any], honoured: frozenset[str] | None) -> GenerationConfig:
    """Settings of one call: `call` over `base`.

    Args:
        honoured: fields of a strategy that the user named; settings of `base` that it does not know give way to it.
            None: the strategy will be chosen by the fields.
    Raises: InputError for a value that makes no sense or a contradiction.
    """
    call = dict(call)
    given = call.pop("generation_config", None)
    if given is not None:
        if not isinstance(given, GenerationConfig):
            raise InputError(
                f"generation_config is a {type(given).__name__}.",
                fix="Pass a pluglm.GenerationConfig, or its fields as arguments.",
                argument="generation_config",
            )
        call = {**given.set_fields(), **call}
    # A value that changes nothing asks no strategy for anything; it takes back what the files say.
    for name, value in call.items():
        if name not in _FIELDS and (honoured is None or name not in honoured) and _is_neutral(name, value):
            call[name] = None
    sample = call.pop("do_sample", None)
    if sample is not None and not isinstance(sample, bool):
        raise InputError(f"do_sample={sample!r} makes no sense: it must be True or False.", argument="do_sample")
    if sample is False:
        clash = [name for name in (*SAMPLING, *EXTRA_SAMPLING) if call.get(name) is not None]
        if clash:
            raise InputError(
                f"do_sample=False contradicts {clash[0]}={call[clash[0]]!r}.",
                fix=f"Leave out {clash[0]}, or leave out do_sample.",
                argument=clash[0],
            )
        call.update(dict.fromkeys((*SAMPLING, *EXTRA_SAMPLING)))
    result = base
    if honoured is not None:
        foreign = [f.name for f in fields(base) if f.name != "extra" and f.name not in honoured]
        keep = {k: v for k, v in base.extra.items() if k in honoured}
        cleared = {name: None for name in foreign if name not in ("eos_token_id", "bos_token_id", "pad_token_id")}
        result = _replace(base, cleared, keep)
    result = result.updated(**{k: v for k, v in call.items() if v is not None})
    if removed := [k for k, v in call.items() if v is None]:
        result = _replace(result, {k: None for k in removed if k in _FIELDS}, {
            k: v for k, v in result.extra.items() if k not in removed
        })  # fmt: skip
    if sample is True and not set(result.set_fields()) & {*SAMPLING, *EXTRA_SAMPLING}:
        result = result.updated(temperature=1.0)
    return result


def limited(config: GenerationConfig, prompt_tokens: int, limit: int | None) -> GenerationConfig:
    """`config` with the number of new tokens filled in, and a pad token: any does, where the files name none.

    Args:
        prompt_tokens: that the new ones follow, of the longest row. limit: of both together; None: unbounded.
    Raises: ContextLengthError if there is no room for them.
    """
    if config.pad_token_id is None:
        config = config.updated(pad_token_id=(config.eos_token_id or (0,))[0])
    room = limit - prompt_tokens if limit is not None else None
    if room is not None and room <= 0:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens, the model's context holds {limit}.",
            why="there is no room for a new token; nothing is cut off in silence.",
            fix=f"Shorten the prompt to fewer than {limit} tokens.",
            tokens=prompt_tokens,
            limit=limit,
        )
    new = config.max_new_tokens
    if new is None and config.max_length is not None:
        new = config.max_length - prompt_tokens
        if new <= 0:
            raise ContextLengthError(
                f"max_length={config.max_length} leaves no room after a prompt of {prompt_tokens} tokens.",
                fix="Raise max_length, or use max_new_tokens.",
                tokens=prompt_tokens,
                limit=config.max_length,
            )
    if new is None:
        return config.updated(max_new_tokens=min(DEFAULT_NEW_TOKENS, room) if room is not None else DEFAULT_NEW_TOKENS)
    if room is not None and new > room:
        raise ContextLengthError(
            f"{prompt_tokens} prompt tokens and {new} new ones are more than the model's context of {limit}.",
            fix=f"Ask for at most {room} new tokens, or shorten the prompt.",
            tokens=prompt_tokens + new, limit=limit,
        )  # fmt: skip
    return config


def choosing_fields(config: GenerationConfig) -> tuple[str, ...]:
    """The set fields that a strategy must honour (token ids of special tokens are told to all)."""
    told = ("eos_token_id", "bos_token_id", "pad_token_id")
    return tuple(sorted(name for name in config.set_fields() if name not in told))


def _is_neutral(name: str, value: Any) -> bool:
    known = NEUTRAL_VALUES.get(name)
    return known is not None and type(value) in (type(known), int) and value == known


_FIELDS = frozenset(f.name for f in fields(GenerationConfig)) - {"extra"}


def _replace(config: GenerationConfig, changed: Mapping[str, Any], extra: Mapping[str, Any]) -> GenerationConfig:
    import dataclasses

    return dataclasses.replace(config, **changed, extra=dict(extra))
