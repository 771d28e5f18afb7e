"""One call of `generate`, read and checked: everything that is decided before the first forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pluglm.contracts.cache import Cache
from pluglm.contracts.decoding import Placed
from pluglm.errors import InputError
from pluglm.generation import choosing_fields, decoder_start, for_call, limited
from pluglm.grammars import read_grammars
from pluglm.healing import Healed, heal
from pluglm.planner import AUTO
from pluglm.prompts import Prompts, pad_behind, pad_left, read_prompts
from pluglm.seq2seq import Seq2SeqLM

if TYPE_CHECKING:
    from pluglm.build import LoadContext
    from pluglm.constraints import Constraints
    from pluglm.contracts.decoding import DecodingStrategy, GenerationConfig
    from pluglm.contracts.text import Tokenizer
    from pluglm.forward import CausalLM
    from pluglm.strategies import Strategies


@dataclass(frozen=True)
class Call:
    """One call of `generate`, ready to run.

    Attributes:
        input_ids: [B, T] what the strategy continues. arguments: keyword arguments of the strategy.
        source: token ids [B, Te] and mask of an encoder's input, or None.
        tails: text at the end of each prompt that the first new token repeats (`healing.py`); () where none does.
    """

    strategy: DecodingStrategy
    prompts: Prompts
    input_ids: torch.Tensor
    config: GenerationConfig
    arguments: dict[str, Any]
    source: tuple[torch.Tensor, torch.Tensor | None] | None = None
    tails: tuple[str, ...] = ()


@dataclass(frozen=True)
class CallReader:
    """Reads the calls of one loaded model.

    Attributes:
        defaults: the model's own generation settings.
    """

    model: CausalLM | Seq2SeqLM
    tokenizer: Tokenizer | None
    context: LoadContext
    defaults: GenerationConfig
    strategies: Strategies
    constraints: Constraints

    def read(self, prompt: Any, settings: Mapping[str, Any]) -> Call:
        """Sort out `settings`, choose the strategy, turn the prompt into ids, compile the grammars.

        Raises: InputError, ContextLengthError, PlanError.
        """
        settings = dict(settings)
        constraint = settings.pop("constraint", None)
        call = self._read(prompt, settings)
        return call if constraint is None else self._constrained(call, constraint)

    def _constrained(self, call: Call, constraint: Any) -> Call:
        """The call with a processor behind the caller's own that holds it to its grammars."""
        grammars = read_grammars(constraint, len(call.prompts.rows), single=call.prompts.single)
        if all(grammar is None for grammar in grammars):
            return call
        if call.tails:
            raise InputError(
                "token_healing and constraint cannot both be honoured.",
                why="the first new token of a healed prompt repeats its end, which is no part of a grammar's text.",
                fix="Leave one of them out.", argument="token_healing",
            )  # fmt: skip
        processor = self.constraints.processor(grammars, call.input_ids, call.config.eos_token_id or ())
        own = call.arguments.get("logits_processor") or ()
        arguments = {**call.arguments, "logits_processor": [*own, Placed(processor, after="user")]}
        return dataclasses.replace(call, arguments=arguments)

    def _read(self, prompt: Any, settings: dict[str, Any]) -> Call:
        """As `read`, without the constraint. Takes `settings` apart."""
        passed: dict[str, Any] = {
            k: settings.pop(k) for k in ("logits_processor", "stopping_criteria", "streamer") if k in settings
        }
        model_kwargs: dict[str, Any] = {k: settings.pop(k) for k in ("past_key_values", "use_cache") if k in settings}
        _check_passed(passed, model_kwargs.get("past_key_values"))
        check_flag("use_cache", model_kwargs.get("use_cache"))
        description = self.context.description
        start = settings.pop("decoder_start_token_id", None) if description.is_encoder_decoder else None
        wanted = self.strategies.wanted(settings.pop("decoding", None), settings.pop("custom_generate", None))
        settings["seed"] = read_seed(settings.get("seed"), settings.pop("generator", None))
        if settings["seed"] is None:
            del settings["seed"]
        honoured = self.strategies.of(wanted, ()).fields if wanted.text != AUTO else None
        config, healing = without_healing(for_call(self.defaults, settings, honoured))
        strategy = self.strategies.of(wanted, choosing_fields(config))
        prompts = read_prompts(
            prompt, self.tokenizer, vocab_size=description.vocab_size, bos_token_id=config.bos_token_id
        )
        healed = self._healed(prompts, model_kwargs) if healing else None
        prompts = healed.prompts if healed is not None else prompts
        if description.is_encoder_decoder:
            return self._seq2seq(strategy, prompts, config, start, passed, model_kwargs)
        config = limited(config, max(map(len, prompts.rows)), self._room(model_kwargs))
        pad, cache = config.pad_token_id or 0, model_kwargs.get("past_key_values")
        if cache is None:
            input_ids, mask = pad_left(prompts.rows, pad, self.model.device)
        else:
            input_ids, mask = pad_behind(prompts.rows, cache, pad, self.model.device)
        if mask is not None:
            model_kwargs["attention_mask"] = mask
        if healed is not None:
            own = passed.get("logits_processor") or ()
            first = Placed(healed.processor(input_ids.shape[1]), before="temperature")
            passed["logits_processor"] = [*own, first]
        arguments = {**passed, **model_kwargs, "generation_config": config}
        return Call(strategy, prompts, input_ids, config, arguments, tails=healed.tails if healed is not None else ())

    def _healed(self, prompts: Prompts, model_kwargs: Mapping[str, Any]) -> Healed:
        given = "past_key_values" if model_kwargs.get("past_key_values") is not None else None
        if given or self.context.description.is_encoder_decoder:
            raise InputError(
                "token_healing cannot be honoured here.",
                why="the given cache holds the token that would be taken away." if given
                else "the prompt of an encoder-decoder is not what its new text continues.",
                fix=f"Leave {given or 'token_healing'} out.", argument="token_healing",
            )  # fmt: skip
        return heal(prompts, self.tokenizer, self.context.description.vocab_size)

    def _room(self, model_kwargs: Mapping[str, Any]) -> int | None:
        """Tokens that a prompt and its completion may have together; None: any number, as with a cache that streams."""
        cache = model_kwargs.get("past_key_values")
        keeps = cache if cache is not None else self.model.layout
        if keeps is not None and keeps.streams and model_kwargs.get("use_cache") is not False:
            return None
        return self.context.description.max_seq_len

    def _seq2seq(
        self, strategy: DecodingStrategy, prompts: Prompts, config: GenerationConfig, start: Any,
        passed: Mapping[str, Any], model_kwargs: Mapping[str, Any],
    ) -> Call:  # fmt: skip
        """A call whose prompts are the encoder's; the strategy's own is one token a row. start: as the caller said."""
        file = self.context.checkpoint.generation_config
        first = decoder_start(self.context.description, file, bos=config.bos_token_id, call=start)
        cache = model_kwargs.get("past_key_values")
        assert isinstance(self.model, Seq2SeqLM)
        if cache is not None and (cache.length or self.model.held(cache) is not None):
            raise InputError(
                f"the given cache is in use: it holds {cache.length} cells of a decoder, and its encoder's input.",
                why="an encoder-decoder begins a new text for each prompt; there is nothing to continue.",
                fix="Call its reset(), or leave past_key_values out.", argument="past_key_values",
            )  # fmt: skip
        config = limited(config, 1, self.context.description.max_seq_len)
        source = pad_left(prompts.rows, config.pad_token_id or 0, self.model.device)
        input_ids = torch.full((len(prompts.rows), 1), first, device=self.model.device)
        arguments = {**passed, **model_kwargs, "generation_config": config}
        return Call(strategy, prompts, input_ids, config, arguments, source)


def without_healing(config: GenerationConfig) -> tuple[GenerationConfig, bool]:
    """`config` without `token_healing`, which is done before a strategy is called, and whether it was set."""
    healing = config.extra.get("token_healing", False)
    check_flag("token_healing", healing)
    extra = {name: value for name, value in config.extra.items() if name != "token_healing"}
    return (dataclasses.replace(config, extra=extra) if "token_healing" in config.extra else config), healing


def read_seed(seed: Any, generator: Any) -> Any:
    """The seed of a call: its own, or one drawn from a `torch.Generator`, which goes on by one number.

    Raises: InputError for both at once, and for a generator that is none.
    """
    if generator is None:
        return seed
    if seed is not None:
        raise InputError("seed and generator both say how to draw.", fix="Leave one of them out.", argument="generator")
    if not isinstance(generator, torch.Generator):
        raise InputError(
            f"generator is a {type(generator).__name__}.", fix="Pass a torch.Generator, or seed=… with an integer.",
            argument="generator",
        )  # fmt: skip
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device, dtype=torch.int64))


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True, False nor None: `use_cache="no"` would be taken for True."""
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name}={value!r} makes no sense: it must be True or False.", argument=name)


def _check_passed(passed: Mapping[str, Any], cache: Any) -> None:
    """Refuse what cannot be a list of callables, a streamer, or a cache."""
    for name in ("logits_processor", "stopping_criteria"):
        functions = passed.get(name)
        if functions is not None and not (isinstance(functions, Sequence) and all(map(callable, functions))):
            raise InputError(
                f"{name} is {functions!r}.", why="it must be a list of callables.", fix=f"Write {name}=[function].",
                argument=name,
            )  # fmt: skip
    streamer = passed.get("streamer")
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise InputError(
            f"streamer is a {type(streamer).__name__}.", why="it needs the methods put and end.",
            fix="Pass an object with put(token_ids) and end(), or iterate over lm.stream(…).", argument="streamer",
        )  # fmt: skip
    if cache is not None and not isinstance(cache, Cache):
        raise InputError(
            f"past_key_values is a {type(cache).__name__}, not a cache of pluglm.",
            fix="Make one with lm.new_cache().", argument="past_key_values",
        )  # fmt: skip
