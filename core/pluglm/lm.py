"""`LanguageModel`: what `load` returns. Text in, text out; the parts and the plan within reach."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pluglm.build import SKIP, Built, LoadContext, build, build_executor
from pluglm.calls import Call, CallReader, check_flag
from pluglm.completions import Completion, completions
from pluglm.constraints import Constraints
from pluglm.contracts.decoding import DecodingStrategy, GenerationConfig, GenerationOutput
from pluglm.contracts.quantizer import Quantizer, QuantizerRequest, UnpackingQuantizer
from pluglm.contracts.runtime import Executor
from pluglm.contracts.text import Tokenizer
from pluglm.errors import InputError, PlanError, PluglmError
from pluglm.fingerprint import fingerprint
from pluglm.forward import CausalLM, Unable
from pluglm.generation import defaults
from pluglm.manager import Manager
from pluglm.plan import Choice, Plan
from pluglm.planner import Demand, Planner, Wanted, wish
from pluglm.row_texts import Piece, pieces
from pluglm.seq2seq import Seq2SeqLM
from pluglm.strategies import Strategies
from pluglm.streaming import in_background, stream_tokens
from pluglm.token_bar import TokenBar


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
        self, manager: Manager, context: LoadContext, built: Built, decoding: Wanted, constraint: Wanted,
        excluded: Mapping[str, str],
    ) -> None:  # fmt: skip
        """Called by `pluglm.load`.

        Args:
            decoding, constraint: what the user said of these. excluded: providers that failed while loading, with why.
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
        self._quantizer = None if isinstance(parts.quantizer, UnpackingQuantizer) else parts.quantizer
        planned = (built.plan["decoding"], parts.strategy)
        self._strategies = Strategies(manager, context, t, decoding, planned, excluded)
        constraints = Constraints(manager, context, t, constraint, excluded)
        self._calls = CallReader(self.model, t, context, self.generation, self._strategies, constraints)

    def __repr__(self) -> str:
        return f"<LanguageModel {self.plan.model} ({self.plan.model_type}), {self.plan.dtype} on {self.plan.device}>"

    def generate(self, prompt: Any, **settings: Any) -> str | list[str]:
        """Complete a prompt.

        Args:
            prompt: a text, messages ({"role": …, "content": …}), token ids, or a list of any of these.
            **settings: fields of GenerationConfig (max_new_tokens, temperature, seed, stop_strings, …), do_sample,
                `decoding` (a strategy for this call) or `custom_generate` (a function of the Hub's shape, the name or
                the folder of a vendored method), constraint (a grammar: {"json_schema": …}, {"json": True},
                {"regex": …}, {"choice": […]} or {"lark": …}; or a list, one a prompt), past_key_values, use_cache,
                logits_processor, stopping_criteria, streamer, generator (a torch.Generator that gives the seed),
                token_healing, progress=True (a bar over the tokens on a terminal), and what the strategy knows. For an
                encoder-decoder also decoder_start_token_id; the prompt is its encoder's input, and limits, penalties
                and grammars are about the decoder's tokens.
        Returns: the new text; a list for a list of prompts or several sequences each.
        Raises: InputError, ContextLengthError, PlanError.
        """
        done = self.complete(prompt, **settings)
        return done.text if isinstance(done, Completion) else [completion.text for completion in done]

    def complete(self, prompt: Any, **settings: Any) -> Completion | list[Completion]:
        """As `generate`, with token ids, finish reason and log-probabilities."""
        progress = settings.pop("progress", False)
        check_flag("progress", progress)
        call = self._calls.read(prompt, settings)
        if progress:
            rows = len(call.prompts.rows) * (call.config.num_return_sequences or 1)
            call.arguments["streamer"] = TokenBar(rows, call.config.max_new_tokens, call.arguments.get("streamer"))
        done = completions(self._run(call), call, self.tokenizer)
        return done[0] if call.prompts.single and len(done) == 1 else done

    def stream(self, prompt: Any, **settings: Any) -> Generator[str, None, None]:
        """The new text of one prompt, in pieces as it is made; joined they are what `generate` returns.

        Closing the iterator stops the generation. Takes the arguments of `generate`. A strategy that searches (beams)
        gives what is certain, which may be all of it at the end.
        """
        call = self._streamed(prompt, settings)
        if len(call.prompts.rows) != 1 or (call.config.num_return_sequences or 1) != 1:
            raise InputError(
                "a stream carries one completion.", why=f"{len(call.prompts.rows)} prompts were passed, with "
                f"num_return_sequences={call.config.num_return_sequences or 1}.",
                fix="Use stream_batch, whose pieces name their row.", argument="prompt",
            )  # fmt: skip
        return self._texts(call)

    def stream_batch(self, prompt: Any, **settings: Any) -> Generator[Piece, None, None]:
        """As `stream`, for several prompts, or several sequences of one: pieces of text with the row they belong to.

        Rows are counted as in the list that `generate` returns; of a search with several sequences of a prompt, the
        best one is streamed.
        """
        return self._pieces(self._streamed(prompt, settings))

    def astream(self, prompt: Any, **settings: Any) -> AsyncGenerator[str, None]:
        """As `stream`, for `async for`. The prompt is read at once, the model runs in a thread."""
        return in_background(self.stream(prompt, **settings))

    def astream_batch(self, prompt: Any, **settings: Any) -> AsyncGenerator[Piece, None]:
        """As `stream_batch`, for `async for`."""
        return in_background(self.stream_batch(prompt, **settings))

    def strategy(self, decoding: str | None = None) -> DecodingStrategy:
        """The strategy of a name or id, as calls of this model use it; None: that of the plan."""
        return self._strategies.of(self._strategies.wanted(decoding), ())

    def _streamed(self, prompt: Any, settings: Mapping[str, Any]) -> Call:
        if settings.get("streamer") is not None:
            raise InputError("a stream brings its own streamer.", fix="Leave streamer out, or use generate.",
                             argument="streamer")  # fmt: skip
        self._need_tokenizer()
        return self._calls.read(prompt, settings)

    def _pieces(self, call: Call) -> Generator[Piece, None, None]:
        tokenizer = self._need_tokenizer()
        steps = stream_tokens(call.strategy, self._decoder(call), call.input_ids, call.arguments)
        config = call.config
        found = pieces(
            steps, tokenizer.decode, stop=config.stop_strings or (), ends=frozenset(config.eos_token_id or ()),
            silent=tokenizer.special_ids, tails=call.tails,
        )  # fmt: skip
        try:
            yield from found
        finally:
            steps.close()

    def _texts(self, call: Call) -> Generator[str, None, None]:
        found = self._pieces(call)
        try:
            for piece in found:
                yield piece.text
        finally:
            found.close()

    def _run(self, call: Call) -> GenerationOutput | torch.Tensor:
        with torch.no_grad():
            return call.strategy(self._decoder(call), call.input_ids, **call.arguments)

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
        Raises: PlanError if the model is packed already or no layer was taken; and if its executor cannot run packed
            layers. Then every later call raises the same, since the plain weights are gone.
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
        self._build_executor_anew()
        return count

    def save(self, path: str | Path) -> None:
        """Write a folder that `load` reads back: weights as they are now, config, tokenizer.

        Raises: SaveError; what was at `path` before is then intact.
        """
        from pluglm.checkpoint import atomic_folder
        from pluglm.saving import write_model

        checkpoint = self._context.checkpoint
        with atomic_folder(path) as folder:
            write_model(folder, self.model.module, self._context, self._quantizer)
            if checkpoint.generation_config is not None:
                text = json.dumps(checkpoint.generation_config, indent=2)
                (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")
            if self.tokenizer is not None:
                self.tokenizer.save(folder)

    def _build_executor_anew(self) -> None:
        """It may have laid out the weights that were there before, and would run those."""
        executor: Executor
        try:
            executor = build_executor(
                self._manager, self.plan, self._context, self.model.layout, self.model.module
            )  # fmt: skip
        except PluglmError as e:
            executor = Unable(PlanError(
                f"the model is packed now, and its executor {self.plan['executor'].provider} cannot run it.",
                why=f"{e.what} {e.why}".strip(), fix='Load it again, with quantizer=… or with executor="eager".',
            ))  # fmt: skip
            self.model.run_by(executor)
            raise executor.error from e
        self.model.run_by(executor)

    def _replan(self, changed: Choice) -> None:
        choices = tuple(changed if c.kind == changed.kind else c for c in self.plan.choices)
        self.plan = replace(self.plan, choices=choices)

    def _decoder(self, call: Call) -> CausalLM:
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
