"""The stock preparation of a call: special tokens, mask, positions, lengths, cache, processors, criteria.

What is prepared, in which order and under which names follows `GenerationMixin.generate` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import Placed
from pluglm.errors import InputError
from pluglm_hf import criteria as c
from pluglm_hf import processors as p
from pluglm_hf import warpers as w
from pluglm_hf.cache_face import CacheFace
from pluglm_hf.recipes.config import RecipeConfig
from pluglm_hf.recipes.failures import unclear
from pluglm_hf.refusals import unsupported
from pluglm_hf.surface import GenerationSurface

#: New tokens where neither the call nor the model's files say how many; the reference's number.
DEFAULT_NEW_TOKENS = 20
#: Cells beyond the last token that a loop may look ahead.
_SPARE = 32


@dataclass(frozen=True)
class Prepared:
    """What a callable is handed.

    Attributes:
        input_ids: [R, S], R prompts times their copies. config: lengths and special tokens filled in.
        model_kwargs: of the forward calls.
    """

    input_ids: Tensor
    config: RecipeConfig
    processors: p.LogitsProcessorList
    criteria: c.StoppingCriteriaList
    model_kwargs: dict[str, Any]


def prepare(
    model: GenerationSurface, input_ids: Tensor | None, config: RecipeConfig, *,
    logits_processor: Sequence[Any] | None = None, stopping_criteria: Sequence[Any] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None, tokenizer: Any = None,
    model_kwargs: Mapping[str, Any],
) -> Prepared:  # fmt: skip
    """Prepare one call.

    Args:
        input_ids: [B, S]; None: one BOS token. tokenizer: anything with `decode`, or such a function, for stop strings.
        model_kwargs: attention_mask, position_ids, past_key_values, use_cache …, as the caller gave them.
    Raises: InputError, RecipeError for what makes no sense; UnsupportedRequestError for what cannot be honoured.
    """
    _refuse(config)
    config = config.updated()
    said_pad = config.pad_token_id
    _special_tokens(config, model.device)
    if input_ids is None:
        input_ids = _begin(config, model.device)
    if input_ids.ndim != 2:
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be [B, S].",
            fix="Pass one prompt as input_ids[None].", argument="input_ids",
        )  # fmt: skip
    kwargs = {name: value for name, value in model_kwargs.items() if value is not None}
    _cache(model, kwargs, config)
    _mask_and_positions(kwargs, input_ids, config, said_pad if model.infers_padding else None)
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    if copies > 1:
        input_ids, kwargs = _expanded(input_ids, kwargs, copies)
    _lengths(config, input_ids.shape[1])
    kwargs.setdefault("logits_to_keep", 1)
    if kwargs["use_cache"] and "past_key_values" not in kwargs:
        kwargs["past_key_values"] = CacheFace(_new_cache(model, input_ids.shape[0], config.max_length))
    built = _processors(config, input_ids, kwargs["attention_mask"], prefix_allowed_tokens_fn)
    chosen = c.StoppingCriteriaList(_merged(_criteria(config, tokenizer, input_ids.shape[1]), stopping_criteria))
    own = _merged(built, [x.process if isinstance(x, Placed) else x for x in logits_processor or ()])
    return Prepared(input_ids, config, p.LogitsProcessorList([*own, *_warpers(config)]), chosen, kwargs)


def _refuse(config: RecipeConfig) -> None:
    for name, why, fix in (
        ("token_healing", "the prompt is healed before a method is called, by lm.generate.", "Leave it out."),
        ("guidance_scale", "the second prompt would need a model of its own inside a recipe.", "Leave it out."),
        ("watermarking_config", "no watermark is made inside a recipe.", "Leave it out."),
        ("compile_config", "how a model is run is chosen when it is loaded.", "Load it with executor=…."),
        ("output_attentions", "attention backends do not keep their weights.", "Leave it out."),
    ):
        if getattr(config, name, None) not in (None, False, 1, 1.0):
            raise unsupported(name, getattr(config, name), why, fix)
    if config.cache_implementation not in (None, "dynamic"):
        raise unsupported(
            "cache_implementation", config.cache_implementation, "the cache was chosen when the model was loaded.",
            "Load the model with cache=….",
        )  # fmt: skip


def _special_tokens(config: RecipeConfig, device: torch.device) -> None:
    eos = config.eos_token_id
    ends = [eos] if isinstance(eos, int) else list(eos) if eos is not None else []
    if config.pad_token_id is None and ends:
        config.pad_token_id = ends[0]
    config._eos_token_tensor = torch.tensor(ends, device=device) if ends else None
    for name in ("pad", "bos"):
        value = getattr(config, f"{name}_token_id")
        setattr(config, f"_{name}_token_tensor", None if value is None else torch.tensor(value, device=device))


def _begin(config: RecipeConfig, device: torch.device) -> Tensor:
    if config.bos_token_id is None:
        raise InputError("there is no prompt, and the model has no BOS token that could stand for it.",
                         fix="Pass input_ids.", argument="input_ids")  # fmt: skip
    return torch.tensor([[config.bos_token_id]], device=device)


def _cache(model: GenerationSurface, kwargs: dict[str, Any], config: RecipeConfig) -> None:
    """Decide whether there is one, and wrap a caller's."""
    use = kwargs.get("use_cache", config.use_cache)
    kwargs["use_cache"] = bool(use is not False and model.lm.layout is not None)
    given = kwargs.get("past_key_values")
    if given is not None and not kwargs["use_cache"]:
        raise InputError("past_key_values is given and use_cache=False says not to use it.",
                         fix="Leave one of them out.", argument="use_cache")  # fmt: skip
    if given is not None and not isinstance(given, CacheFace):
        kwargs["past_key_values"] = CacheFace(given)


def _new_cache(model: GenerationSurface, rows: int, max_length: int) -> Any:
    limit = model.lm.description.max_seq_len
    wanted = max_length + _SPARE
    return model.lm.new_cache(batch_size=rows, capacity=wanted if limit is None else min(wanted, limit))


def _mask_and_positions(kwargs: dict[str, Any], ids: Tensor, config: RecipeConfig, pad: int | None) -> None:
    """The mask over the whole sequence, None if all are tokens; and positions of the whole sequence, [B, W]."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = ids.new_ones(ids.shape[0], _whole(kwargs.get("past_key_values"), ids))
        ends = config._eos_token_tensor
        is_end = ends is not None and pad is not None and bool((ends == pad).any())
        if pad is not None and not is_end and mask.shape == ids.shape and bool((ids == pad).any()):
            mask = (ids != pad).long()
    elif mask.ndim != 2:
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}; it must be [B, S].", argument="attention_mask")
    if "position_ids" not in kwargs:
        kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    config._mask_length = mask.shape[1]
    kwargs["attention_mask"] = None if bool((mask == 1).all()) else mask


def _whole(cache: CacheFace | None, ids: Tensor) -> int:
    """Cells of the sequence whose last ones `ids` are, for a caller who gave no mask."""
    held, S = cache.get_seq_length() if cache is not None else 0, ids.shape[1]
    if not held or cache is None:
        return S
    if cache.remembers:
        return S if held < S and cache.starts(ids) else held + S
    if held >= S:
        raise unclear(S, held, "there is neither a mask nor a record of what the cache holds.")
    return S


def _expanded(ids: Tensor, kwargs: dict[str, Any], copies: int) -> tuple[Tensor, dict[str, Any]]:
    """Every row `copies` times."""
    rows = ids.shape[0]
    more = {
        name: value.repeat_interleave(copies, 0) if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
        for name, value in kwargs.items()
    }
    cache = more.get("past_key_values")
    if isinstance(cache, CacheFace) and cache.batch_size == rows:
        cache.batch_repeat_interleave(copies)
    return ids.repeat_interleave(copies, 0), more


def _lengths(config: RecipeConfig, S: int) -> None:
    """`max_length` and `max_new_tokens` say the same; so do the two minima."""
    if config.max_new_tokens is not None:
        config.max_length = S + config.max_new_tokens
    elif config.max_length is None:
        config.max_length = S + DEFAULT_NEW_TOKENS
    if config.max_length <= S and config.max_new_tokens != 0:
        raise InputError(
            f"max_length={config.max_length} leaves no room after a prompt of {S} tokens.",
            fix="Raise max_length, or use max_new_tokens.", argument="max_length",
        )  # fmt: skip
    config.max_new_tokens = config.max_length - S
    if config.min_new_tokens is not None:
        config.min_length = S + config.min_new_tokens


def _processors(
    config: RecipeConfig, ids: Tensor, mask: Tensor | None, prefix: Callable[[int, Tensor], Sequence[int]] | None
) -> list[Any]:
    """Those that stand before the caller's, in the reference's order."""
    S, device, eos = ids.shape[1], ids.device, config._eos_token_tensor
    made: list[Any] = []
    if config.sequence_bias is not None:
        made.append(p.SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.encoder_repetition_penalty not in (None, 1.0):
        made.append(p.EncoderRepetitionPenaltyLogitsProcessor(config.encoder_repetition_penalty, ids))
    if config.repetition_penalty not in (None, 1.0):
        padding = None if mask is None else (mask != 0).int().argmax(1)
        made.append(p.RepetitionPenaltyLogitsProcessor(config.repetition_penalty, padding))
    if config.no_repeat_ngram_size:
        made.append(p.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size:
        made.append(p.EncoderNoRepeatNGramLogitsProcessor(config.encoder_no_repeat_ngram_size, ids))
    if config.bad_words_ids is not None:
        made.append(p.NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if config.min_length and eos is not None:
        made.append(p.MinLengthLogitsProcessor(config.min_length, eos, device))
    if config.min_new_tokens and eos is not None:
        made.append(p.MinNewTokensLengthLogitsProcessor(S, config.min_new_tokens, eos, device))
    if prefix is not None:
        made.append(p.PrefixConstrainedLogitsProcessor(prefix, config.num_beams or 1))
    if config.forced_bos_token_id is not None:
        made.append(p.ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        made.append(p.ForcedEOSTokenLogitsProcessor(config.max_length, config.forced_eos_token_id, device))
    if config.remove_invalid_values:
        made.append(p.InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        made.append(p.ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, eos, S))
    if config.suppress_tokens is not None:
        made.append(p.SuppressTokensLogitsProcessor(config.suppress_tokens, device))
    if config.begin_suppress_tokens is not None:
        late = int(S == 1 and config.forced_bos_token_id is not None)
        made.append(p.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, S + late, device))
    return made


def _warpers(config: RecipeConfig) -> list[Any]:
    """Those that stand after the caller's."""
    made: list[Any] = []
    if config.do_sample:
        keep = len(config._eos_token_tensor) + 1 if config._eos_token_tensor is not None else 2
        keep = keep if (config.num_beams or 1) > 1 else 1
        if config.temperature not in (None, 1.0):
            made.append(w.TemperatureLogitsWarper(config.temperature))
        if config.top_h is not None:
            made.append(w.TopHLogitsWarper(config.top_h))
        if config.top_k:
            made.append(w.TopKLogitsWarper(config.top_k, min_tokens_to_keep=keep))
        for warper, value, neutral in (
            (w.TopPLogitsWarper, config.top_p, 1.0), (w.MinPLogitsWarper, config.min_p, 0.0),
            (w.TypicalLogitsWarper, config.typical_p, 1.0), (w.EpsilonLogitsWarper, config.epsilon_cutoff, 0.0),
            (w.EtaLogitsWarper, config.eta_cutoff, 0.0),
        ):  # fmt: skip
            if value not in (None, neutral):
                made.append(warper(value, min_tokens_to_keep=keep))
    if config.renormalize_logits:
        made.append(p.LogitNormalization())
    return made


def _criteria(config: RecipeConfig, tokenizer: Any, start: int) -> list[Any]:
    made: list[Any] = [c.MaxLengthCriteria(config.max_length)]
    if config.max_time is not None:
        made.append(c.MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise InputError(
                "stop_strings cannot be honoured without a tokenizer.", why="they are looked for in the text.",
                fix="Pass tokenizer=….", argument="stop_strings",
            )  # fmt: skip
        made.append(c.StopStringCriteria(tokenizer, config.stop_strings, start=start))
    if config._eos_token_tensor is not None:
        made.append(c.EosTokenCriteria(config._eos_token_tensor))
    if config.is_assistant and config.assistant_confidence_threshold:
        made.append(c.ConfidenceCriteria(config.assistant_confidence_threshold))
    return made


def _merged(made: list[Any], own: Sequence[Any] | None) -> list[Any]:
    """Ours, then the caller's; one of the caller's takes the place of ours of the same class."""
    own = list(own or ())
    kept = [next((x for x in own if type(x) is type(item)), item) for item in made]
    return [*kept, *(x for x in own if not any(x is item for item in kept))]
