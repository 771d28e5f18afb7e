"""Greedy decoding and sampling: how a token is chosen, in a call of one's own and for an engine's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pluglm_decoding_blocks.ahead import make_ahead
from pluglm_decoding_blocks.best import most_likely
from pluglm_decoding_blocks.criteria import call_criteria
from pluglm_decoding_blocks.draw import draw
from pluglm_decoding_blocks.failures import no_token, not_honoured, refused
from pluglm_decoding_blocks.feed import make_feed
from pluglm_decoding_blocks.loop import Choose, Job, run
from pluglm_decoding_blocks.processors import Processors, known_best
from pluglm_decoding_blocks.prompt import Prompt, read_prompt
from pluglm_decoding_blocks.rng import Uniforms, call_seeds, uniforms
from pluglm_decoding_blocks.settings import (
    COMMON_FIELDS,
    GUIDANCE_FIELDS,
    OUTPUT_FIELDS,
    SAMPLING_FIELDS,
    WATERMARK_FIELDS,
    Settings,
    read_settings,
)
from pluglm_decoding_blocks.source import encoder_source
from pluglm_decoding_blocks.warpers import Warpers
from torch import Tensor

from pluglm.contracts import (
    DecodingRequest,
    Draw,
    GenerationConfig,
    GenerationOutput,
    LogitsProcessor,
    StoppingCriterion,
    Streamer,
)
from pluglm_decoding_standard.guidance import make_guidance

#: Stages that an executor which chooses tokens has, too.
_DRAWN = frozenset({"temperature", "top_k", "top_p", "min_p"})
#: Fields that need a call's whole text or a second pass of the model, neither of which an engine's `select` is given.
_CALLS_ONLY = GUIDANCE_FIELDS | WATERMARK_FIELDS


class _Way(NamedTuple):
    """How tokens are chosen: here, and, where `ahead` is true, as well by an executor that is told `draw`."""

    choose: Choose
    ahead: bool
    draw: Draw | None = None


class _Standard:
    """What both strategies share: reading the call, and the checks of an engine's rows."""

    name: str
    fields: frozenset[str] = COMMON_FIELDS | OUTPUT_FIELDS | GUIDANCE_FIELDS | WATERMARK_FIELDS
    needs: frozenset[str] = frozenset()

    def __init__(self, request: DecodingRequest) -> None:
        self._request = request
        self._checked: tuple[GenerationConfig, ...] = ()

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
        """Generate, without gradients. See `DecodingStrategy`; `model_kwargs` may hold attention_mask, past_key_values,
        use_cache and position_ids, and whatever else the model's forward call takes."""
        config = generation_config or GenerationConfig()
        try:
            with torch.no_grad():
                criteria = call_criteria(config, stopping_criteria)  # its time begins now
                settings = self._settings(config, model_kwargs)
                prompt = read_prompt(
                    input_ids, model_kwargs.pop("attention_mask", None), bos=settings.bos,
                    vocab_size=self._request.vocab_size,
                )  # fmt: skip
                return run(
                    self._job(model, prompt, config, settings, logits_processor, criteria, streamer, model_kwargs)
                )
        finally:
            if streamer is not None:
                streamer.end()

    def _settings(self, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Settings:
        """The call's settings, checked; hidden states may be asked for by either way in."""
        request = self._request
        settings = read_settings(config, self.name, self.fields, vocab_size=request.vocab_size, decode=request.decode)
        self._check(config)
        if settings.hidden_states or model_kwargs.get("output_hidden_states"):
            settings = replace(settings, hidden_states=True)
            model_kwargs["output_hidden_states"] = True
        return settings

    def _job(
        self, model: Any, prompt: Prompt, config: GenerationConfig, settings: Settings,
        processors: Sequence[LogitsProcessor] | None, criteria: Sequence[StoppingCriterion], streamer: Streamer | None,
        model_kwargs: Mapping[str, Any],
    ) -> Job:  # fmt: skip
        """Everything that a call needs to run, built. prompt: one row a prompt."""
        limits, vocab_size = settings.limits(prompt.lengths), self._request.vocab_size
        feed = make_feed(model, prompt, settings, prompt.width + max(limits), model_kwargs)
        guidance = make_guidance(config, model, prompt, settings, limits, model_kwargs, vocab_size=vocab_size)
        rows = prompt.repeated(settings.copies)
        device = rows.ids.device
        process = Processors(
            config, processors, prompt_length=rows.width, mask=rows.mask, device=device, source=encoder_source(model),
            warpers=self._warpers([config], device), guidance=guidance,
        )  # fmt: skip
        way = self._way(config, rows, process)
        ahead = make_ahead(model, feed, settings, criteria, streamer, way.draw) if way.ahead else None
        return Job(
            settings, rows, settings.limits(rows.lengths), feed, way.choose, criteria, streamer, self._request.decode,
            looks_back=not process.idle, ahead=ahead,
        )  # fmt: skip

    def _check(self, config: GenerationConfig) -> None:
        """Refuse what only this strategy refuses."""

    def _warpers(self, configs: Sequence[GenerationConfig], device: torch.device) -> Warpers | None:
        """What reshapes the distribution, of a strategy that draws."""
        return None

    def _way(self, config: GenerationConfig, prompt: Prompt, process: Processors) -> _Way:
        raise NotImplementedError

    def _new_rows(self, configs: Sequence[GenerationConfig]) -> bool:
        """Are these others than at the last call of `select`? Then their fields are checked."""
        if len(configs) == len(self._checked) and all(a is b for a, b in zip(configs, self._checked, strict=True)):
            return False
        for config in configs:
            said = config.set_fields()
            if set(said) - (self.fields - _CALLS_ONLY):
                raise not_honoured(self.name, said, self.fields - _CALLS_ONLY)
        self._checked = tuple(configs)
        return True


class Greedy(_Standard):
    """Always the most likely token; of equal ones the first. A seed changes nothing and is accepted."""

    name = "greedy"

    def _check(self, config: GenerationConfig) -> None:
        if (config.num_return_sequences or 1) > 1:
            raise refused(
                self.name,
                (f"num_return_sequences={config.num_return_sequences}: all of a prompt's sequences would be the same",),
                'Name decoding="sampling", or ask for one sequence.',
            )

    def _way(self, config: GenerationConfig, prompt: Prompt, process: Processors) -> _Way:
        def choose(logits: Tensor, sequences: Tensor, _: int) -> tuple[Tensor, Tensor, Tensor]:
            scores, raw = process(sequences, logits)
            best, tokens = most_likely(scores)
            return tokens, known_best(best, raw), scores

        return _Way(choose, ahead=process.idle)

    def select(self, logits: Tensor, configs: Sequence[GenerationConfig], seeds: Tensor, positions: Tensor) -> Tensor:
        """One token for each row of an engine's batch; see `TokenSelector`."""
        self._new_rows(configs)
        best, tokens = most_likely(logits)
        _require_finite(best, positions)
        return tokens


class Sampling(_Standard):
    """A draw from the model's distribution, reshaped by the fields of `Warpers`; each is off by default.

    The draw for new token i of a row depends on the row's seed, i and its scores alone.
    """

    name = "sampling"
    fields = _Standard.fields | SAMPLING_FIELDS

    def __init__(self, request: DecodingRequest) -> None:
        super().__init__(request)
        self._warp: Warpers | None = None

    def _warpers(self, configs: Sequence[GenerationConfig], device: torch.device) -> Warpers | None:
        return Warpers(configs, device)

    def _way(self, config: GenerationConfig, prompt: Prompt, process: Processors) -> _Way:
        seeds = call_seeds(config.seed, prompt.ids.shape[0], prompt.ids.device)
        numbers = Uniforms(seeds)

        def choose(logits: Tensor, sequences: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
            scores, raw = process(sequences, logits)
            scores = scores.float()
            return draw(scores, numbers.at(count)), known_best(scores.amax(-1), raw), scores

        told = Draw(
            tuple(seeds.tolist()), 0, config.temperature or 1.0, config.top_k or 0,
            1.0 if config.top_p is None else config.top_p, config.min_p or 0.0,
        )  # fmt: skip
        return _Way(choose, process.names <= _DRAWN, told)

    def select(self, logits: Tensor, configs: Sequence[GenerationConfig], seeds: Tensor, positions: Tensor) -> Tensor:
        """One token for each row of an engine's batch; see `TokenSelector`. seeds: as `rng.row_seeds` gives them."""
        if self._new_rows(configs) or self._warp is None:
            self._warp = Warpers(configs, logits.device)
        scores = self._warp(logits.float())
        _require_finite(scores.amax(-1), positions)
        return draw(scores, uniforms(seeds, positions))


_STRATEGIES: dict[str, Callable[[DecodingRequest], Greedy | Sampling]] = {"greedy": Greedy, "sampling": Sampling}


def build(name: str, request: DecodingRequest) -> Greedy | Sampling:
    """The strategy of this name. Raises UnsupportedRequestError for a variant or option: there are none."""
    reasons = [f"option {option!r} is not known" for option, _ in request.options]
    if request.variant is not None:
        reasons.insert(0, f"variant {request.variant!r} is not known")
    if reasons:
        raise refused(name, reasons, f'Write decoding="{name}"; settings are arguments of the call.')
    return _STRATEGIES[name](request)


def _require_finite(best: Tensor, positions: Tensor) -> None:
    finite = best.isfinite()
    if not bool(finite.all()):
        failed = {row: float(best[row]) for row in (~finite).nonzero()[:, 0].tolist()}
        raise no_token(failed, int(positions[min(failed)]))
