"""The two strategies: how a call is read, and what guesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pluglm_decoding_blocks.failures import refused
from pluglm_decoding_blocks.feed import CachedFeed, further_arguments
from pluglm_decoding_blocks.processors import Processors
from pluglm_decoding_blocks.prompt import Prompt, read_prompt
from pluglm_decoding_blocks.rng import call_seeds
from pluglm_decoding_blocks.settings import COMMON_FIELDS, Settings, read_settings
from torch import Tensor

from pluglm.contracts import (
    DecodingRequest,
    GenerationConfig,
    GenerationOutput,
    LogitsProcessor,
    StoppingCriterion,
    Streamer,
)
from pluglm.errors import InputError
from pluglm_decoding_speculative.assistant import Assistant, check_rollback, load_assistant, read_assistant
from pluglm_decoding_speculative.choosing import Chooser, Greedy, Sampled, SpeculativeSampled
from pluglm_decoding_speculative.draft import Draft, Schedule
from pluglm_decoding_speculative.lookup import Lookup
from pluglm_decoding_speculative.loop import Job, Statistics, Texts, run
from pluglm_decoding_speculative.passes import Passes
from pluglm_decoding_speculative.proposals import Proposer

SAMPLING = frozenset({"temperature", "top_k", "top_p", "min_p"})


class _Speculative:
    """What both strategies share. Greedy, unless a field that reshapes the distribution is set: then tokens are drawn.

    Attributes:
        statistics: of the last call that ended; for measurements.
    """

    name: str
    fields: frozenset[str] = COMMON_FIELDS | SAMPLING
    needs: frozenset[str] = frozenset({"rollback"})

    def __init__(self, request: DecodingRequest) -> None:
        self._request = request
        self.statistics = Statistics(0, 0, 0)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriterion] | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: Streamer | None = None,
        **model_kwargs: Any,
    ) -> GenerationOutput:
        """Generate, without gradients. See `DecodingStrategy`; `model_kwargs` may hold attention_mask, past_key_values
        and position_ids. A processor must depend on its arguments alone: it is asked about guesses, too."""
        config = generation_config or GenerationConfig()
        try:
            with torch.no_grad():
                settings = read_settings(
                    config, self.name, self.fields, vocab_size=self._request.vocab_size, decode=self._request.decode
                )
                plan = self._read(config)
                prompt = read_prompt(
                    input_ids, model_kwargs.pop("attention_mask", None), bos=settings.bos,
                    vocab_size=self._request.vocab_size,
                )  # fmt: skip
                copies = prompt.repeated(settings.copies)
                limits = settings.limits(copies.lengths)
                choose = self._chooser(config, copies)
                feed = _feed(model, prompt, settings, limits, model_kwargs, self.name, choose)
                process = Processors(
                    config, logits_processor, prompt_length=copies.width, mask=copies.mask, device=copies.ids.device,
                    incremental=False,
                )  # fmt: skip
                seen = not process.idle or bool(stopping_criteria)
                texts = Texts(copies, max(limits), settings.pad, wanted=seen)
                passes = Passes(model, feed.cache, copies.ids.device)
                job = Job(
                    settings, copies, limits, feed, passes, process, choose, tuple(stopping_criteria or ()), streamer,
                    self._request.decode, texts,
                )  # fmt: skip
                output, self.statistics = run(job, plan(job))
                return output
        finally:
            if streamer is not None:
                streamer.end()

    def _read(self, config: GenerationConfig) -> Callable[[Job], Proposer]:
        """Check the fields that only this strategy has; returns what makes the call's proposer."""
        raise NotImplementedError

    def _chooser(self, config: GenerationConfig, prompt: Prompt) -> Chooser:
        """prompt: copies included."""
        if any(getattr(config, name) is not None for name in SAMPLING):
            seeds = call_seeds(config.seed, len(prompt.lengths), prompt.ids.device)
            return self._sampler(config, seeds)
        if (config.num_return_sequences or 1) > 1:
            reason = f"num_return_sequences={config.num_return_sequences}: all of them would be the same"
            raise refused(self.name, (reason,), "Set temperature (1.0 changes nothing), or ask for one sequence.")
        return Greedy()

    def _sampler(self, config: GenerationConfig, seeds: Tensor) -> Sampled:
        return Sampled(config, seeds)


class PromptLookup(_Speculative):
    """Guesses by copying: what followed the row's last tokens when they occurred before.

    Fields: prompt_lookup_num_tokens (10): tokens of a guess at most. max_matching_ngram_size (2): the longest run of
    last tokens that is looked for; shorter ones follow.
    """

    name = "prompt-lookup"
    fields = _Speculative.fields | {"prompt_lookup_num_tokens", "max_matching_ngram_size"}

    def _read(self, config: GenerationConfig) -> Callable[[Job], Proposer]:
        count = _whole(config, "prompt_lookup_num_tokens", 10)
        longest = _whole(config, "max_matching_ngram_size", 2)

        def lookup(job: Job) -> Proposer:
            texts = _real_tokens(job.prompt)
            return Lookup(texts, count=count, longest=longest, eos=job.settings.eos)

        return lookup


class Assisted(_Speculative):
    """Guesses with a smaller model of the same vocabulary.

    Fields: assistant_model: a LanguageModel or CausalLM, instead of the strategy's own. num_assistant_tokens (20),
    num_assistant_tokens_schedule ("constant" or "heuristic"), assistant_confidence_threshold (0.4): see `Schedule`.

    Args:
        assistant: for calls that pass none.
    """

    name = "assisted"
    fields = _Speculative.fields | {
        "assistant_model", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    }  # fmt: skip

    def __init__(self, request: DecodingRequest, assistant: Assistant | None = None) -> None:
        super().__init__(request)
        self.assistant = assistant
        self._known: tuple[Any, Assistant] | None = None  # what a call passed, and what it is: checked once

    def _read(self, config: GenerationConfig) -> Callable[[Job], Proposer]:
        assistant = self._of_call(config.extra.get("assistant_model"))
        schedule = _schedule(config)

        def draft(job: Job) -> Proposer:
            assert isinstance(job.choose, Greedy | SpeculativeSampled)
            if max(job.limits) < 2:  # the only token is the model's own
                return Lookup([[]] * len(job.limits), count=1, longest=1, eos=())
            return Draft(
                assistant, job.prompt, job.settings, job.limits, job.choose, job.process, job.texts, schedule
            )  # fmt: skip

        return draft

    def _sampler(self, config: GenerationConfig, seeds: Tensor) -> Sampled:
        return SpeculativeSampled(config, seeds)

    def _of_call(self, given: Any) -> Assistant:
        if given is None:
            if self.assistant is None:
                raise InputError(
                    "there is no assistant.", why="assisted decoding guesses with a second, smaller model.",
                    fix='Pass assistant_model=…, or name one when loading: options={"decoding": {"assistant": "…"}}.',
                    argument="assistant_model",
                )  # fmt: skip
            return self.assistant
        if self._known is None or self._known[0] is not given:
            self._known = (given, read_assistant(given, self._request))
        return self._known[1]


def build(name: str, request: DecodingRequest) -> PromptLookup | Assisted:
    """The strategy of this name. Raises UnsupportedRequestError for a variant and for options that it does not know."""
    options = dict(request.options)
    known = {"assistant"} if name == Assisted.name else set()
    reasons = [f"option {option!r} is not known" for option in options if option not in known]
    if request.variant is not None:
        reasons.insert(0, f"variant {request.variant!r} is not known")
    if reasons:
        raise refused(name, reasons, f'Write decoding="{name}"; settings are arguments of the call.')
    if name == PromptLookup.name:
        return PromptLookup(request)
    named = options.get("assistant")
    return Assisted(request, load_assistant(named, request) if "assistant" in options else None)


def _feed(
    model: Any, prompt: Prompt, settings: Settings, limits: Sequence[int], model_kwargs: dict[str, Any], name: str,
    choose: Chooser,
) -> CachedFeed:  # fmt: skip
    """What runs the prompt, with a cache that has room for holes. limits: of all rows, copies included."""
    extra = further_arguments(model_kwargs)
    given = model_kwargs.get("past_key_values")
    if model_kwargs.get("use_cache") is False:
        raise InputError("use_cache=False cannot be combined with speculation.",
                         why="guesses are run behind what a cache holds, and taken back from it.",
                         fix='Leave use_cache out, or name decoding="greedy" or "sampling".',
                         argument="use_cache")  # fmt: skip
    if others := sorted(set(extra) - {"position_ids"}):
        raise InputError(
            f"{', '.join(others)} cannot be combined with speculation.",
            why="a pass runs several tokens of each row, some of which never count.",
            fix='Leave it out, or name decoding="greedy" or "sampling".', argument=others[0],
        )  # fmt: skip
    room = prompt.width + max(limits)
    # In the worst case every kept cell holds a token of one row only. Tokens that are drawn against a guess depend on
    # where it ends, so nothing of other rows may cut it short: then there is room for that case. Otherwise rows share
    # as many cells as they need, and as many again; `Run.room` shortens guesses once these are used up.
    holes = sum(limits) - max(limits)
    if not isinstance(choose, SpeculativeSampled) and given is None:
        holes = min(holes, max(limits))
    if given is None or isinstance(choose, SpeculativeSampled):
        room += holes
    cache = given
    if given is not None and len(limits) > 1:
        _check_alignable(given)
    feed = CachedFeed(model, prompt, settings, room=room, given=cache, extra=extra)
    check_rollback(feed.cache, "model", name)
    return feed


def _check_alignable(cache: Any) -> None:
    """Can a caller's cache of several rows be left without the holes that speculation makes?"""
    kinds = sorted({slot.kind for slot in cache.slots} - {"kv", "latent", "cross", "shared"})
    if kinds or "crop" not in cache.operations:
        raise InputError(
            f"the given cache ({cache.layout}) of several rows cannot be used by speculation.",
            why="rows that go ahead by different numbers of tokens leave holes, and to close them it must go back to "
            f"the end of the prompt; slots of kind {', '.join(kinds) or '?'} cannot.",
            fix="Pass one row at a time, or leave past_key_values out.", argument="past_key_values",
        )  # fmt: skip


def _real_tokens(prompt: Prompt) -> list[list[int]]:
    """Each row's prompt without padding."""
    rows: list[list[int]] = prompt.ids.tolist()
    if prompt.mask is None:
        return rows
    masks = prompt.mask.tolist()
    return [
        [token for token, real in zip(row, mask, strict=True) if real]
        for row, mask in zip(rows, masks, strict=True)
    ]  # fmt: skip


def _schedule(config: GenerationConfig) -> Schedule:
    name = "num_assistant_tokens_schedule"
    kind = config.extra.get(name, "constant")
    if kind not in ("constant", "heuristic"):
        raise InputError(f'{name}={kind!r} makes no sense: it must be "constant" or "heuristic".', argument=name)
    name = "assistant_confidence_threshold"
    least = config.extra.get(name, 0.4)
    if isinstance(least, bool) or not isinstance(least, int | float) or not 0 <= least < 1:
        raise InputError(f"{name}={least!r} makes no sense: it must be a number from 0 to below 1.", argument=name)
    return Schedule(_whole(config, "num_assistant_tokens", 20), kind == "heuristic", float(least))


def _whole(config: GenerationConfig, name: str, default: int) -> int:
    value = config.extra.get(name, default)
    if type(value) is not int or value < 1:
        raise InputError(f"{name}={value!r} makes no sense: it must be an integer >= 1.", argument=name)
    return value
