"""`LanguageModel`: what `load` returns. Text in, text out; the parts and the plan within reach."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pluglm.build import SKIP, Built, LoadContext, PartFailedError, build, build_strategy
from pluglm.contracts.cache import Cache
from pluglm.contracts.decoding import DecodingStrategy, FinishReason, GenerationConfig, GenerationOutput
from pluglm.contracts.quantizer import Quantizer, QuantizerRequest
from pluglm.contracts.text import Tokenizer
from pluglm.errors import InputError, PlanError
from pluglm.fingerprint import fingerprint
from pluglm.forward import CausalLM
from pluglm.generation import choosing_fields, decoder_start, defaults, for_call, limited
from pluglm.manager import Manager
from pluglm.plan import Choice, Plan
from pluglm.planner import AUTO, Demand, Planner, Wanted, wish
from pluglm.prompts import Prompts, pad_behind, pad_left, read_prompts
from pluglm.seq2seq import Seq2SeqLM
from pluglm.streaming import stream_tokens
from pluglm.text_stream import TextStream, cut_at_stop


@dataclass(frozen=True)
class Completion:
    """One answer with what is known of it.

    Attributes:
        text: of the new tokens, cut before a stop string; "" for a model without a tokenizer.
        token_ids: the new tokens. num_prompt_tokens: before them, padding not counted.
        finish_reason: "eos", "length" or "stop" (a stop string or a criterion); None: the strategy does not say.
        logprobs: of the new tokens, if asked for with `return_logprobs=True`.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    finish_reason: FinishReason | None
    logprobs: tuple[float, ...] | None = None


class LanguageModel:
    """A loaded model. Made by `pluglm.load`.

    Attributes:
        plan: what was chosen, from which package, and why.
        model: the forward contract, `model(input_ids, past_key_values=…, use_cache=True)`; of an encoder-decoder,
            `model(input_ids, decoder_input_ids=…)`.
        tokenizer: text <-> ids; None for a model without one.
        generation: the model's own generation settings.
    """

    plan: Plan
    model: CausalLM | Seq2SeqLM
    tokenizer: Tokenizer | None
    generation: GenerationConfig

    def __init__(
        self, manager: Manager, context: LoadContext, built: Built, decoding: Wanted, excluded: Mapping[str, str]
    ) -> None:
        """Called by `pluglm.load`.

        Args:
            decoding: what the user said of the strategy. excluded: providers that failed while loading, with why.
        """
        parts = built.parts
        self.plan = built.plan
        self.tokenizer = parts.tokenizer
        t = self.tokenizer
        facade = Seq2SeqLM if context.description.is_encoder_decoder else CausalLM
        self.model = facade(built.module, built.executor, parts.layout, context.description, context.checkpoint.config)
        self.generation = defaults(
            context.description, context.checkpoint.generation_config,
            eos=t.eos_token_id if t else None, bos=t.bos_token_id if t else None, pad=t.pad_token_id if t else None,
        )  # fmt: skip
        self._manager, self._context = manager, context
        self._decoding, self._excluded = decoding, dict(excluded)
        self._quantizer = parts.quantizer
        self._strategies: dict[str, DecodingStrategy] = {built.plan["decoding"].provider or "": parts.strategy}

    def __repr__(self) -> str:
        return f"<LanguageModel {self.plan.model} ({self.plan.model_type}), {self.plan.dtype} on {self.plan.device}>"

    def generate(self, prompt: Any, **settings: Any) -> str | list[str]:
        """Complete a prompt.

        Args:
            prompt: a text, messages ({"role": …, "content": …}), token ids, or a list of any of these.
            **settings: fields of GenerationConfig (max_new_tokens, temperature, seed, stop_strings, …), do_sample,
                `decoding` (a strategy for this call), past_key_values, use_cache, logits_processor, stopping_criteria,
                and what the strategy knows. For an encoder-decoder also decoder_start_token_id; the prompt is its
                encoder's input, and limits and penalties are about the decoder's tokens.
        Returns: the new text; a list for a list of prompts or several sequences each.
        Raises: InputError, ContextLengthError, PlanError.
        """
        done = self.complete(prompt, **settings)
        return done.text if isinstance(done, Completion) else [completion.text for completion in done]

    def complete(self, prompt: Any, **settings: Any) -> Completion | list[Completion]:
        """As `generate`, with token ids, finish reason and log-probabilities."""
        call = self._prepare(prompt, settings)
        with torch.no_grad():
            output = call.strategy(self._decoder(call), call.input_ids, **call.arguments)
        done = self._completions(output, call)
        return done[0] if call.prompts.single and len(done) == 1 else done

    def stream(self, prompt: Any, **settings: Any) -> Iterator[str]:
        """The new text of one prompt, in pieces as it is made; joined they are what `generate` returns.

        Closing the iterator stops the generation. Takes the arguments of `generate`.
        """
        call = self._prepare(prompt, settings)
        tokenizer = self._need_tokenizer()
        if len(call.prompts.rows) != 1 or (call.config.num_return_sequences or 1) != 1:
            raise InputError(
                "a stream carries one completion.", why=f"{len(call.prompts.rows)} prompts were passed, with "
                f"num_return_sequences={call.config.num_return_sequences or 1}.",
                fix="Stream them one by one, or use generate.", argument="prompt",
            )  # fmt: skip
        eos = frozenset(call.config.eos_token_id or ()) | tokenizer.special_ids
        text = TextStream(lambda ids: tokenizer.decode(ids), stop=call.config.stop_strings or ())
        return self._pieces(call, text, eos)

    def _pieces(self, call: _Call, text: TextStream, silent: frozenset[int]) -> Iterator[str]:
        for token_id in stream_tokens(call.strategy, self._decoder(call), call.input_ids, call.arguments):
            if token_id not in silent and (piece := text.push(token_id)):
                yield piece
        if piece := text.finish():
            yield piece

    def new_cache(self, *, batch_size: int = 1, capacity: int | None = None) -> Any:
        """An empty cache of the planned layout, to keep between calls: `generate(ids, past_key_values=cache)`."""
        return self.model.new_cache(batch_size=batch_size, capacity=capacity)

    def fingerprint(self) -> str:
        """A name for what this model computes, 64 hex digits: for `cache.save(path, fingerprint=…)` and prefix stores.

        Equal wherever weights, config and dtype are equal, on any device; another one as soon as a bit of a weight
        differs. Reads every weight: about a second for each 1 to 2 GB and core. Ask once, and again after a change.
        """
        quantizer = self.plan["quantizer"]
        packing = repr((quantizer.provider, quantizer.variant, quantizer.options))
        return fingerprint(self.model.module, self.plan.fingerprint, self.plan.dtype, packing)

    def quantize(self, quantizer: str, *, skip: tuple[str, ...] = (), options: Mapping[str, Any] = {}) -> int:
        """Pack the linear layers of this loaded model, one at a time. Returns how many were replaced.

        Args:
            quantizer: a provider, `name:variant` or its id. skip: patterns of module names to leave as they are.
            options: keyword options of the quantizer.
        Raises: PlanError if the model is packed already or no layer was taken.
        """
        from pluglm.weight_packing import quantize_module

        if self._quantizer is not None:
            raise PlanError(
                f"this model is packed already, by {self._quantizer.name}.", fix="Load it again without a quantizer."
            )
        planner = Planner(self._manager)
        demand = Demand(self.plan.device, self.plan.dtype)
        planned = {**options, SKIP: tuple(skip)} if skip else options
        wanted = wish("quantizer", quantizer, tuple(sorted(planned.items())))
        choice = planner.single("quantizer", wanted, demand, "packs the linear layers of the loaded model")
        part: Quantizer = build(self._manager, choice, "pluglm_build_quantizer", request=QuantizerRequest(
            self.plan.device, self.plan.dtype, skip=skip, variant=choice.variant,
            options=tuple(sorted(options.items())),
        ))  # fmt: skip
        count = quantize_module(self.model.module, part, skip)
        if count == 0:
            raise PlanError(
                f"{choice.provider} took none of the linear layers.", fix="Look at `skip` and at its README."
            )
        self._quantizer = part
        self._replan(choice)
        return count

    def save(self, path: str | Path) -> None:
        """Write a folder that `load` reads back: weights as they are now, config, tokenizer.

        Raises: SaveError; what was at `path` before is then intact.
        """
        from pluglm.checkpoint import atomic_folder, write_safetensors
        from pluglm.weights import export_weights

        checkpoint = self._context.checkpoint
        config = {k: v for k, v in checkpoint.config.items() if k not in ("torch_dtype", "quantization_config")}
        config["dtype"] = self.plan.dtype
        if self._quantizer is not None:
            config["quantization_config"] = self._quantizer.config()
        with atomic_folder(path) as folder:
            weights = export_weights(self.model.module, self._context.description.weights, self._quantizer)
            write_safetensors(folder, weights, {"format": "pt"})
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if checkpoint.generation_config is not None:
                text = json.dumps(checkpoint.generation_config, indent=2)
                (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")
            if self.tokenizer is not None:
                self.tokenizer.save(folder)

    def _replan(self, changed: Choice) -> None:
        choices = tuple(changed if c.kind == changed.kind else c for c in self.plan.choices)
        self.plan = replace(self.plan, choices=choices)

    def _decoder(self, call: _Call) -> CausalLM:
        """What the call's strategy runs. The encoder of an encoder-decoder is run here, once."""
        if call.source is None:
            assert isinstance(self.model, CausalLM)
            return self.model
        assert isinstance(self.model, Seq2SeqLM)
        with torch.no_grad():
            return self.model.conditioned(*call.source)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "this model came without a tokenizer, so there is no text to stream.",
                fix="Use complete(), which gives token ids, or put tokenizer.json into the folder.",
                argument="prompt",
            )
        return self.tokenizer

    def _prepare(self, prompt: Any, settings: Mapping[str, Any]) -> _Call:
        """Everything that is decided before the first forward pass of a call."""
        settings = dict(settings)
        passed: dict[str, Any] = {
            k: settings.pop(k) for k in ("logits_processor", "stopping_criteria") if k in settings
        }
        model_kwargs: dict[str, Any] = {k: settings.pop(k) for k in ("past_key_values", "use_cache") if k in settings}
        _check_passed(passed, model_kwargs.get("past_key_values"))
        seq2seq = self._context.description.is_encoder_decoder
        start = settings.pop("decoder_start_token_id", None) if seq2seq else None
        named = settings.pop("decoding", None)
        wanted = wish("decoding", named) if named is not None else self._decoding
        honoured = None
        if wanted.text != AUTO:
            honoured = self._strategy(wanted, ()).fields
        config = for_call(self.generation, settings, honoured)
        strategy = self._strategy(wanted, choosing_fields(config))
        prompts = read_prompts(
            prompt, self.tokenizer, vocab_size=self._context.description.vocab_size, bos_token_id=config.bos_token_id
        )
        if seq2seq:
            return self._seq2seq_call(strategy, prompts, config, start, passed, model_kwargs)
        config = limited(config, max(map(len, prompts.rows)), self._room(model_kwargs))
        pad, cache = config.pad_token_id or 0, model_kwargs.get("past_key_values")
        if cache is None:
            input_ids, mask = pad_left(prompts.rows, pad, self.model.device)
        else:
            input_ids, mask = pad_behind(prompts.rows, cache, pad, self.model.device)
        if mask is not None:
            model_kwargs["attention_mask"] = mask
        return _Call(strategy, prompts, input_ids, config, {**passed, **model_kwargs, "generation_config": config})

    def _room(self, model_kwargs: Mapping[str, Any]) -> int | None:
        """Tokens that a prompt and its completion may have together; None: any number, as with a cache that streams."""
        cache = model_kwargs.get("past_key_values")
        keeps = cache if cache is not None else self.model.layout
        if keeps is not None and keeps.streams and model_kwargs.get("use_cache") is not False:
            return None
        return self._context.description.max_seq_len

    def _seq2seq_call(
        self, strategy: DecodingStrategy, prompts: Prompts, config: GenerationConfig, start: Any,
        passed: Mapping[str, Any], model_kwargs: Mapping[str, Any],
    ) -> _Call:  # fmt: skip
        """A call whose prompts are the encoder's; the strategy's own is one token a row. start: as the caller said."""
        file = self._context.checkpoint.generation_config
        first = decoder_start(self._context.description, file, bos=config.bos_token_id, call=start)
        cache = model_kwargs.get("past_key_values")
        assert isinstance(self.model, Seq2SeqLM)
        if cache is not None and (cache.length or self.model.held(cache) is not None):
            raise InputError(
                f"the given cache is in use: it holds {cache.length} cells of a decoder, and its encoder's input.",
                why="an encoder-decoder begins a new text for each prompt; there is nothing to continue.",
                fix="Call its reset(), or leave past_key_values out.", argument="past_key_values",
            )  # fmt: skip
        config = limited(config, 1, self._context.description.max_seq_len)
        source = pad_left(prompts.rows, config.pad_token_id or 0, self.model.device)
        input_ids = torch.full((len(prompts.rows), 1), first, device=self.model.device)
        arguments = {**passed, **model_kwargs, "generation_config": config}
        return _Call(strategy, prompts, input_ids, config, arguments, source)

    def _strategy(self, wanted: Wanted, fields: Sequence[str]) -> DecodingStrategy:
        """The strategy of a call, built once for each provider."""
        planner = Planner(self._manager, self._excluded)
        while True:
            choice = planner.decoding(wanted, fields, device=self.plan.device)
            key = (choice.provider or "") + (f":{choice.variant}" if choice.variant else "")
            planned = self.plan["decoding"]
            if (planned.provider, planned.variant) == (choice.provider, choice.variant):
                key = planned.provider or ""
            if key not in self._strategies:
                try:
                    self._strategies[key] = build_strategy(self._manager, choice, self._context, self.tokenizer)
                except PartFailedError as e:
                    planner.excluded[e.provider] = e.reason
                    continue
            return self._strategies[key]

    def _completions(self, output: GenerationOutput | torch.Tensor, call: _Call) -> list[Completion]:
        width = call.input_ids.shape[1]
        if isinstance(output, torch.Tensor):  # a strategy in the Hub's style: bare sequences
            output = GenerationOutput(output, width, (output.shape[1] - width,) * output.shape[0], ())
        copies = output.sequences.shape[0] // len(call.prompts.rows)
        done = []
        for row in range(output.sequences.shape[0]):
            ids = tuple(output.completion(row))
            text = self.tokenizer.decode(ids) if self.tokenizer is not None else ""
            text = cut_at_stop(text, call.config.stop_strings or ())
            done.append(Completion(
                text, ids, len(call.prompts.rows[row // copies]),
                output.finish_reasons[row] if output.finish_reasons else None,
                output.logprobs[row] if output.logprobs is not None else None,
            ))  # fmt: skip
        return done


@dataclass(frozen=True)
class _Call:
    """One call of `generate`, ready to run.

    Attributes:
        input_ids: [B, T] what the strategy continues. arguments: keyword arguments of the strategy.
        source: token ids [B, Te] and mask of an encoder's input, or None.
    """

    strategy: DecodingStrategy
    prompts: Prompts
    input_ids: torch.Tensor
    config: GenerationConfig
    arguments: dict[str, Any]
    source: tuple[torch.Tensor, torch.Tensor | None] | None = None


def _check_passed(passed: Mapping[str, Any], cache: Any) -> None:
    """Refuse what cannot be a list of callables, or a cache."""
    for name, functions in passed.items():
        if functions is not None and not (isinstance(functions, Sequence) and all(map(callable, functions))):
            raise InputError(
                f"{name} is {functions!r}.", why="it must be a list of callables.", fix=f"Write {name}=[function].",
                argument=name,
            )  # fmt: skip
    if cache is not None and not isinstance(cache, Cache):
        raise InputError(
            f"past_key_values is a {type(cache).__name__}, not a cache of pluglm.",
            fix="Make one with lm.new_cache().", argument="past_key_values",
        )  # fmt: skip
