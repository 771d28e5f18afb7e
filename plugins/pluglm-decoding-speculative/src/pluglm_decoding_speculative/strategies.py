"""The three strategies: the fields of each, and what guesses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pluglm_decoding_blocks.failures import refused
from pluglm_decoding_blocks.prompt import Prompt

from pluglm.contracts import DecodingRequest, GenerationConfig
from pluglm.errors import InputError
from pluglm_decoding_speculative.assistant import Assistant, load_assistant, read_assistant
from pluglm_decoding_speculative.choosing import Greedy, Sampled, SpeculativeSampled
from pluglm_decoding_speculative.copies_first import CopiesFirst
from pluglm_decoding_speculative.draft import Draft
from pluglm_decoding_speculative.guessing import Chooses, Schedule
from pluglm_decoding_speculative.lookup import Lookup
from pluglm_decoding_speculative.loop import Job
from pluglm_decoding_speculative.pace import ACCELERATED, PRICES
from pluglm_decoding_speculative.proposals import NoGuesses, Proposer
from pluglm_decoding_speculative.self_draft import SelfDraft, first_layers
from pluglm_decoding_speculative.speculative import Plan, Speculative
from pluglm_decoding_speculative.spelling import Spelling
from pluglm_decoding_speculative.translated import Lookbehind, Translated

COPYING = frozenset({"prompt_lookup_num_tokens", "max_matching_ngram_size"})
GUESSING = frozenset({"num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"})

#: Of the runs of tokens that prompt lookup looks for.
LONGEST = 64


class PromptLookup(Speculative):
    """Guesses by copying: what followed the row's last tokens when they occurred before.

    Fields: prompt_lookup_num_tokens (10): tokens of a guess at most. max_matching_ngram_size (2): the longest run of
    last tokens that is looked for; shorter ones follow.

    Args:
        token_price: what a cell of a pass costs, next to a pass over none: see `pace`. 0: guess as far as may be.
    """

    name = "prompt-lookup"
    fields = Speculative.fields | COPYING

    def __init__(self, request: DecodingRequest, token_price: float | None = None) -> None:
        super().__init__(request)
        self.token_price = _price(request) if token_price is None else token_price

    def read(self, config: GenerationConfig, model: Any) -> Plan:
        """See `Speculative.read`."""
        return Plan(_lookup(config, self.token_price))


class Assisted(Speculative):
    """Guesses with a smaller model.

    Fields: assistant_model: a LanguageModel or CausalLM, instead of the strategy's own. num_assistant_tokens (20),
    num_assistant_tokens_schedule ("constant" or "heuristic"), assistant_confidence_threshold (0.4): see `Schedule`.
    target_lookbehind (10), assistant_lookbehind (10): for an assistant with another tokenizer, see `Lookbehind`.
    prompt_lookup_num_tokens: copy what the text has said before, where that is likely to hold, and ask the assistant
    elsewhere, see `CopiesFirst`; with max_matching_ngram_size (2). None: ask it always.

    Args:
        assistant: for calls that pass none.
    """

    name = "assisted"
    fields = Speculative.fields | GUESSING | COPYING | {"assistant_model", "target_lookbehind", "assistant_lookbehind"}

    def __init__(self, request: DecodingRequest, assistant: Assistant | None = None) -> None:
        super().__init__(request)
        self.assistant = assistant
        self._known: tuple[Any, Assistant] | None = None  # what a call passed, and what it is: checked once

    def read(self, config: GenerationConfig, model: Any) -> Plan:
        """See `Speculative.read`."""
        assistant = self._of_call(config.extra.get("assistant_model"))
        schedule = _schedule(config)
        back = Lookbehind(_whole(config, "target_lookbehind", 10), _whole(config, "assistant_lookbehind", 10))

        asked = config.extra.get("prompt_lookup_num_tokens") is not None
        copies = _lookup(config, _price(self._request)) if asked else None

        def guess(job: Job) -> Proposer:
            return draft(job) if copies is None else CopiesFirst(copies(job), draft(job))

        def draft(job: Job) -> Proposer:
            if max(job.limits) < 2:  # the only token is the model's own
                return NoGuesses()
            if not assistant.translates:
                return Draft(assistant, job.prompt, job.settings, job.limits, _chooses(job, schedule), schedule)
            request = self._request
            assert request.decode is not None
            assert request.encode is not None
            spelling = Spelling(request.decode, request.encode)
            texts = _real_tokens(job.prompt)
            return Translated(assistant, spelling, texts, job.settings, job.limits, schedule, back)

        # Text that was drawn as other ids has no probability among the model's: its guesses are matched.
        return Plan(guess, Sampled if assistant.translates else SpeculativeSampled)

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


class EarlyExit(Speculative):
    """Guesses with the model's own first layers.

    Fields: assistant_early_exit: how many of them; num_assistant_tokens (20), num_assistant_tokens_schedule and
    assistant_confidence_threshold (0.4): see `Schedule`.

    Args:
        layers: for calls that do not say it.
    """

    name = "early-exit"
    fields = Speculative.fields | GUESSING | {"assistant_early_exit"}
    #: Makes the draft of a model and a number of layers.
    cut = staticmethod(first_layers)

    def __init__(self, request: DecodingRequest, layers: int | None = None) -> None:
        super().__init__(request)
        self.layers = layers

    def read(self, config: GenerationConfig, model: Any) -> Plan:
        """See `Speculative.read`."""
        count, schedule = self._layers(config), _schedule(config)
        draft = self.cut(model, count)

        def guess(job: Job) -> Proposer:
            return SelfDraft(draft, job.passes.cache, _chooses(job, schedule), schedule, len(job.limits))

        return Plan(guess, SpeculativeSampled)

    def _layers(self, config: GenerationConfig) -> int:
        name = "assistant_early_exit"
        if self.layers is None and config.extra.get(name) is None:
            raise InputError(
                "it is not said after how many layers to guess.", why="a model's first layers guess for all of them.",
                fix=f"Pass {name}=…, or say it when loading: options={{'decoding': {{'{name}': …}}}}.", argument=name,
            )  # fmt: skip
        return _whole(config, name, self.layers or 1)


Strategy = PromptLookup | Assisted | EarlyExit
#: Options when loading, by strategy.
_OPTIONS = {
    PromptLookup.name: frozenset({"token_price"}), Assisted.name: frozenset({"assistant"}),
    EarlyExit.name: frozenset({"assistant_early_exit"}),
}  # fmt: skip


def build(name: str, request: DecodingRequest) -> Strategy:
    """The strategy of this name. Raises UnsupportedRequestError for a variant and for options that it does not know."""
    options = dict(request.options)
    reasons = [f"option {option!r} is not known" for option in options if option not in _OPTIONS[name]]
    if request.variant is not None:
        reasons.insert(0, f"variant {request.variant!r} is not known")
    price, layers = options.get("token_price"), options.get("assistant_early_exit")
    if price is not None and (isinstance(price, bool) or not isinstance(price, int | float) or not price >= 0):
        reasons.append(f"option 'token_price' is {price!r}, not a number >= 0")
    if layers is not None and (type(layers) is not int or layers < 1):
        reasons.append(f"option 'assistant_early_exit' is {layers!r}, not an integer >= 1")
    if reasons:
        raise refused(
            name, reasons,
            f'Write decoding="{name}"; its options: {", ".join(sorted(_OPTIONS[name]))}. The rest is said in a call.',
        )  # fmt: skip
    if name == PromptLookup.name:
        return PromptLookup(request, price)
    if name == EarlyExit.name:
        return EarlyExit(request, layers)
    named = options.get("assistant")
    return Assisted(request, load_assistant(named, request) if "assistant" in options else None)


def _chooses(job: Job, schedule: Schedule) -> Chooses:
    assert isinstance(job.choose, Greedy | SpeculativeSampled)
    return Chooses(
        job.choose, job.process, job.shape, job.texts, frozenset(job.settings.eos), schedule.confidence,
        job.prompt.ids.device,
    )  # fmt: skip


def _price(request: DecodingRequest) -> float:
    return PRICES.get(request.device.partition(":")[0], ACCELERATED)


def _lookup(config: GenerationConfig, price: float) -> Callable[[Job], Lookup]:
    """What makes the copies of a call, its fields checked."""
    count = _whole(config, "prompt_lookup_num_tokens", 10)
    longest = _whole(config, "max_matching_ngram_size", 2)
    if longest > LONGEST:
        raise InputError(
            f"max_matching_ngram_size={longest} is more than {LONGEST}.",
            why="every size has a table of the whole text, which is brought up to date for each token.",
            fix="Pass a smaller size: 2 to 5 find nearly all there is.", argument="max_matching_ngram_size",
        )  # fmt: skip

    def lookup(job: Job) -> Lookup:
        texts = _real_tokens(job.prompt)
        return Lookup(texts, count=count, longest=longest, eos=job.settings.eos, price=price)

    return lookup


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
