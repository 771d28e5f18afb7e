"""The second table: each decoding strategy with every cache layout on every type of layer, over `eager` attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import cells
from programs import PROGRAMS

from pluglm.errors import PluglmError
from pluglm.lm import LanguageModel

#: Prompts and new tokens: together longer than windows, chunks and pages.
NEW = 10
#: What a call says besides its strategy's name. "greedy" and "sampling" are in the first table.
SAID: dict[str, dict[str, Any]] = {
    "beam": {"num_beams": 3},
    "beam-sampling": {"num_beams": 3, "temperature": 0.9, "seed": 5},
    "diverse-beam": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    "constrained-beam": {"num_beams": 3, "force_words_ids": [[7, 9]]},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"num_assistant_tokens": 3},
    "early-exit": {"assistant_early_exit": 1, "num_assistant_tokens": 3},
    "contrastive-search": {"penalty_alpha": 0.6, "top_k": 3},
    "dola": {"dola_layers": "high"},
}


@dataclass(frozen=True)
class Outcome:
    """tokens: new ones of each row; None: refused, with the reason."""

    tokens: tuple[tuple[int, ...], ...] | None
    reason: str = ""


@cache
def assistant() -> LanguageModel:
    """A model of the same vocabulary that guesses well for none of them."""
    return cells.load("eager", "dynamic", "full")


@cache
def model(layout: str, layers: str) -> LanguageModel | None:
    """None where the layout itself is refused: the first table says why."""
    return cells.attempt("eager" if cells.has_attention(layers) else "none", layout, layers)[1]


def run(lm: LanguageModel, strategy: str, rows: list[list[int]]) -> Outcome:
    """One call. Any error but a typed one is the test's failure."""
    said = dict(SAID[strategy])
    if strategy == "assisted":
        said["assistant_model"] = assistant()
    try:
        done = lm.complete(rows, decoding=strategy, max_new_tokens=NEW, eos_token_id=(), **said)
    except PluglmError as error:
        return Outcome(None, " ".join(line.strip() for line in (error.why or error.what).splitlines()))
    assert isinstance(done, list)
    return Outcome(tuple(completion.token_ids for completion in done))


@cache
def outcome(strategy: str, layout: str, layers: str) -> Outcome | None:
    """A ragged batch; None where the layout does not make this type of layer."""
    lm = model(layout, layers)
    return None if lm is None else run(lm, strategy, cells.prompts())


def refused(strategy: str, layout: str) -> dict[str, str]:
    """Type of layer -> why this strategy does not work with this layout on it."""
    found = {layers: outcome(strategy, layout, layers) for layers in PROGRAMS}
    return {layers: o.reason for layers, o in found.items() if o is not None and o.tokens is None}
