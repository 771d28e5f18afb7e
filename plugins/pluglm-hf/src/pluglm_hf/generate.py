"""`generate`: a call's arguments sorted, its strategy run, and the answer in the reference's form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pluglm.contracts.decoding import GenerationOutput, Placed
from pluglm.errors import InputError
from pluglm.generation import limited
from pluglm_hf.caches import HFCache, settled
from pluglm_hf.configs import GenerationConfig
from pluglm_hf.criteria import MaxTimeCriteria, StopStringCriteria
from pluglm_hf.fields import DEFAULTS
from pluglm_hf.processors import PrefixConstrainedLogitsProcessor
from pluglm_hf.refusals import unknown, unsupported
from pluglm_hf.replacing import replaced, without
from pluglm_hf.results import answer
from pluglm_hf.settings import Said, merged, strategy_of, strategy_settings
from pluglm_hf.source import Decoder, decoder_of

if TYPE_CHECKING:
    from pluglm_hf.model import HFModel

#: Arguments of `generate` that are about the input of the model.
INPUTS = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "encoder_outputs",
    "decoder_input_ids", "decoder_attention_mask", "token_type_ids",
)  # fmt: skip
#: Further arguments that are no fields.
FURTHER = ("tokenizer", "assistant_tokenizer", "generator", "trust_remote_code", "decoding")
_NAMED = (
    "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus",
    "assistant_model", "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate",
)  # fmt: skip


@dataclass
class Call:
    """The arguments of one call, by what they are about. The names are `generate`'s."""

    inputs: dict[str, Any]
    fields: dict[str, Any]
    generation_config: GenerationConfig | None = None
    logits_processor: Sequence[Any] | None = None
    stopping_criteria: Sequence[Any] | None = None
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None
    assistant_model: Any = None
    negative: dict[str, Any] = field(default_factory=dict)
    further: dict[str, Any] = field(default_factory=dict)


def read_call(inputs: Any, named: Mapping[str, Any], arguments: Mapping[str, Any]) -> Call:
    """Sort them. Raises for what nobody knows, and for what cannot be honoured."""
    if named.get("synced_gpus"):
        raise unsupported("synced_gpus", True, "a model here runs in one process.", "Leave it out.")
    given = dict(arguments)
    if isinstance(inputs, Mapping):  # what a tokenizer returned, not unpacked
        given, inputs = {**inputs, **given}, None
    if inputs is not None:
        if given.get("input_ids") is not None:
            raise InputError("inputs and input_ids both hold the prompt.", fix="Pass one of them.", argument="inputs")
        given["input_ids"] = inputs
    for name in given:
        if name not in INPUTS and name not in FURTHER and name not in DEFAULTS:
            raise unknown("generate", name, (*INPUTS, *FURTHER, *DEFAULTS, *_NAMED))
    config = named.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise InputError(f"generation_config is a {type(config).__name__}.",
                         fix="Pass a GenerationConfig of pluglm_hf, or its fields as arguments.",
                         argument="generation_config")  # fmt: skip
    call = Call(
        {k: given[k] for k in INPUTS if given.get(k) is not None}, {k: given[k] for k in given if k in DEFAULTS},
        config, named.get("logits_processor"), named.get("stopping_criteria"), named.get("prefix_allowed_tokens_fn"),
        named.get("assistant_model"),
        {k: named[k] for k in ("negative_prompt_ids", "negative_prompt_attention_mask") if named.get(k) is not None},
        {k: given[k] for k in FURTHER if given.get(k) is not None},
    )  # fmt: skip
    if call.further.get("trust_remote_code"):
        raise unsupported("trust_remote_code", True, "no code runs because a call names it.",
                          "Leave it out; `pluglm vendor hub:org/name@<commit>` makes a package of a method, whose name "
                          "custom_generate takes.")  # fmt: skip
    if "assistant_tokenizer" in call.further:
        raise unsupported("assistant_tokenizer", "…", "an assistant brings the tokenizer of its own folder.",
                          "Leave it out: assistants with another tokenizer work.")  # fmt: skip
    if "token_type_ids" in call.inputs:
        raise unsupported("token_type_ids", "…", "no model here reads them.", "Leave it out.")
    return call


def generate(model: HFModel, inputs: Any, named: Mapping[str, Any], arguments: Mapping[str, Any]) -> Any:
    """Generate. Returns sequences [R, S], or an output with names. Whatever happens, a streamer is told the end.

    Args: of `HFModel.generate`, those that its signature names in `named`.
    """
    streamer = None if named.get("streamer") is None else _Streamed(named["streamer"])
    try:
        return _run(model, read_call(inputs, named, arguments), streamer)
    finally:
        if streamer is not None:
            streamer.end()


def _run(model: HFModel, call: Call, streamer: _Streamed | None) -> Any:
    said = merged(model.generation_config, call.generation_config, call.fields)
    decoder = decoder_of(model, said, call.inputs)
    named = call.further.get("decoding") or strategy_of(said, assisted=call.assistant_model is not None)
    strategy = model.language_model.strategy(named)
    config = strategy_settings(said, named, width=decoder.ids.shape[1], limit=decoder.limit)
    more: dict[str, Any] = dict(call.negative)
    if call.assistant_model is not None:
        more["assistant_model"] = getattr(call.assistant_model, "language_model", call.assistant_model)
    if call.prefix_allowed_tokens_fn is not None and "prefix_allowed_tokens_fn" in strategy.fields:
        more["prefix_allowed_tokens_fn"] = call.prefix_allowed_tokens_fn
    if (seed := _seed(said, call.further.get("generator"))) is not None:
        more["seed"] = seed
    config = limited(config.updated(**more), decoder.longest, decoder.limit)
    config, processors = replaced(config, _processors(said, call, strategy.fields))
    criteria = _criteria(said, call, model)
    if model.language_model.tokenizer is None and config.stop_strings:
        config = without(config, "stop_strings")
    arguments = _model_arguments(said, decoder, config.max_new_tokens or 0, named)
    if streamer is not None:
        streamer.prompt(decoder.ids)
    try:
        with torch.no_grad():
            output = strategy(
                decoder.model, decoder.ids, logits_processor=processors,
                stopping_criteria=criteria, generation_config=config, streamer=streamer, **arguments,
            )  # fmt: skip
    finally:
        if isinstance(decoder.face, HFCache):
            decoder.face.grown()
    if not isinstance(output, GenerationOutput):
        return output
    return answer(output, said, decoder)


def _model_arguments(said: Said, decoder: Decoder, new: int, strategy: str) -> dict[str, Any]:
    """attention_mask, position_ids, use_cache and past_key_values of the strategy's call.

    A cache that the answer shall hold is made here, where the strategy leaves it with the answer's rows.
    """
    arguments: dict[str, Any] = {}
    if decoder.mask is not None:
        arguments["attention_mask"] = decoder.mask
    if decoder.position_ids is not None:
        arguments["position_ids"] = decoder.position_ids
    if said["use_cache"] is False:
        arguments["use_cache"] = False
    kept = strategy in ("greedy", "sampling", "assisted", "prompt-lookup")
    # With hidden states every step is a call of the whole contract, which cannot leave out rows that have ended.
    kept = kept and not (
        said["output_hidden_states"] and decoder.ids.shape[0] * (said["num_return_sequences"] or 1) > 1
    )
    wanted = said["return_dict_in_generate"] and said["use_cache"] is not False and decoder.model.layout is not None
    room = max(decoder.ids.shape[1] + new, int(said["max_cache_len"] or 0))
    if decoder.face is None and wanted and kept:
        decoder.make_face(room)
    if decoder.face is not None:
        arguments["past_key_values"] = settled(decoder.face, decoder.model, decoder.layouts, decoder.ids.shape[0], room)
    return arguments


def _seed(said: Said, generator: Any) -> Any:
    """The seed of a call that draws: its own, its generator's, or torch's, so that `torch.manual_seed` repeats it."""
    from pluglm.calls import read_seed

    if not said.sampled:
        return said["seed"] if generator is None else read_seed(said["seed"], generator)
    if said["seed"] is None and generator is None:
        generator = torch.default_generator
    return read_seed(said["seed"], generator)


def _processors(said: Said, call: Call, honoured: frozenset[str]) -> list[Any]:
    found: list[Any] = []
    if call.prefix_allowed_tokens_fn is not None and "prefix_allowed_tokens_fn" not in honoured:
        allowed = PrefixConstrainedLogitsProcessor(call.prefix_allowed_tokens_fn, said["num_beams"])
        found.append(Placed(allowed, before="forced_bos"))
    found += _functions(call.logits_processor, "logits_processor")
    return found


def _criteria(said: Said, call: Call, model: HFModel) -> list[Any]:
    found = [_rowwise(criterion) for criterion in _functions(call.stopping_criteria, "stopping_criteria")]
    if said["max_time"] is not None:
        if type(said["max_time"]) not in (int, float):
            raise InputError(f"max_time={said['max_time']!r} makes no sense: it must be a number of seconds.",
                             argument="max_time")  # fmt: skip
        found.append(MaxTimeCriteria(float(said["max_time"])))
    if said["stop_strings"] and model.language_model.tokenizer is None:
        tokenizer = call.further.get("tokenizer")
        if tokenizer is None:
            raise InputError(
                "stop_strings need a tokenizer.", why="this model's folder has none, and they are looked for in text.",
                fix="Pass tokenizer=….", argument="stop_strings",
            )  # fmt: skip
        found.append(StopStringCriteria(tokenizer, said["stop_strings"]))
    return found


def _functions(value: Any, name: str) -> list[Any]:
    """A list of callables; one alone is a list of it."""
    if value is None:
        return []
    if callable(value) and not isinstance(value, Sequence):
        value = [value]
    if not (isinstance(value, Sequence) and all(map(callable, value))):
        raise InputError(f"{name} is {value!r}.", why="it must be a list of callables.",
                         fix=f"Write {name}=[function].", argument=name)  # fmt: skip
    return list(value)


def _rowwise(criterion: Callable[..., Any]) -> Callable[..., Any]:
    """A criterion that says one word for all rows, as older ones do, says it for each."""

    def each(input_ids: Tensor, scores: Any) -> Any:
        said = criterion(input_ids, scores)
        return torch.full((len(input_ids),), said, device=input_ids.device) if isinstance(said, bool) else said

    return each


class _Streamed:
    """A streamer of the reference's protocol behind pluglm's: told of the prompt first, of tensors on the host."""

    def __init__(self, streamer: Any) -> None:
        for name in ("put", "end"):
            if not callable(getattr(streamer, name, None)):
                raise InputError(f"streamer is a {type(streamer).__name__}.", why=f"it has no method {name}.",
                                 fix="Pass a TextStreamer, or an object with put(ids) and end().",
                                 argument="streamer")  # fmt: skip
        self._streamer, self._ended = streamer, False

    def prompt(self, ids: Tensor) -> None:
        """[B, S]."""
        self._streamer.put(ids.cpu())

    def put(self, token_ids: Tensor) -> None:
        """[B]."""
        self._streamer.put(token_ids.cpu())

    def end(self) -> None:
        """Once, whoever says so."""
        if not self._ended:
            self._ended = True
            self._streamer.end()
