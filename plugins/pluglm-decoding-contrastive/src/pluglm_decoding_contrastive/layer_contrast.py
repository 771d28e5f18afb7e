"""DoLa: the token whose probability has grown most since an earlier layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pluglm_decoding_blocks.draw import draw
from pluglm_decoding_blocks.feed import make_feed
from pluglm_decoding_blocks.loop import Choose
from pluglm_decoding_blocks.processors import Processors, known_best
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.rng import Uniforms, call_seeds
from pluglm_decoding_blocks.settings import SAMPLING_FIELDS, Settings
from pluglm_decoding_blocks.warpers import Warpers
from torch import Tensor

from pluglm.contracts import GenerationConfig
from pluglm_decoding_contrastive.call import ContrastiveStrategy, Prepared, all_the_same
from pluglm_decoding_contrastive.layers import LayerFeed, contrast, read_layers
from pluglm_decoding_contrastive.watched import LayerLogits

#: (scores [R, V] float32, number of new tokens so far) -> tokens [R].
Pick = Callable[[Tensor, int], Tensor]


class DoLa(ContrastiveStrategy):
    """Scores are log p of the last layer less log q of an inner one; greedy, or drawn if a sampling field is set.

    The inner layer is, anew for each token of each row, the candidate whose distribution is least like the last
    layer's. Without a sampling field a seed changes nothing and is accepted.

    Source: Chuang et al. 2023, "DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models",
    section 2.
    """

    name = "dola"
    fields = ContrastiveStrategy.fields | SAMPLING_FIELDS | {"dola_layers"}

    def _prepare(
        self, model: Any, prompt: Prompt, config: GenerationConfig, settings: Settings, model_kwargs: dict[str, Any]
    ) -> Prepared:
        sampling = bool(SAMPLING_FIELDS & set(config.set_fields()))
        if settings.copies > 1 and not sampling:
            raise all_the_same(self.name, settings.copies, "Set temperature to draw them, or ask for one sequence.")
        layers = read_layers(config.extra.get("dola_layers", "low"), model.description)
        heads = LayerLogits(model, layers, model.logits_of)
        room = prompt.width + max(settings.limits(prompt.lengths))
        if settings.hidden_states:
            model_kwargs["output_hidden_states"] = True
        feed = LayerFeed(make_feed(heads, prompt, settings, room, model_kwargs), self._request.vocab_size)
        rows, device = prompt.repeated(settings.copies), prompt.ids.device
        if not sampling:
            return Prepared(feed, rows, lambda process: _chooser(feed, process, _best))
        pick = _drawn(call_seeds(config.seed, rows.ids.shape[0], device))
        return Prepared(feed, rows, lambda process: _chooser(feed, process, pick), Warpers([config], device))


def _chooser(feed: LayerFeed, process: Processors, pick: Pick) -> Choose:
    def choose(logits: Tensor, sequences: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        scores, raw = process(sequences, contrast(logits, feed.inner))
        if not process.idle and bool((stuck := scores.amax(-1) == -torch.inf).any()):
            among = _possible(process, sequences, logits) | ~stuck[:, None]
            scores, raw = process(sequences, contrast(logits, feed.inner, among))
        return pick(scores, count), known_best(scores.amax(-1), raw), scores

    return choose


def _possible(process: Processors, sequences: Tensor, logits: Tensor) -> Tensor:
    """[R, V] what the processors leave of the last layer's own tokens.

    Where they forbid all that is plausible (a grammar may well), what is plausible is asked of the others.
    """
    scores, _ = process(sequences, logits.float().log_softmax(-1))
    return scores > -torch.inf


def _best(scores: Tensor, _: int) -> Tensor:
    return scores.argmax(-1)


def _drawn(seeds: Tensor) -> Pick:
    """seeds: [R]."""
    numbers = Uniforms(seeds)
    return lambda scores, count: draw(scores, numbers.at(count))
