"""Self-speculation: the model's own first layers guess, the whole of it checks.

The draft is the model cut after some layers, followed by the final norm and the head. It reads and writes the model's
own cache: the keys of its layers are those that the model has computed, so there is no second cache and no second
prefill. What it writes is taken back before the model checks the guesses, and the model writes all layers of them.

Source: Elhoushi et al. 2024, "LayerSkip: enabling early exit inference and self-speculative decoding", section 4.3,
cache reuse included; the name of the setting as in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pluglm_decoding_blocks.failures import refused

from pluglm.contracts import Cache, ForwardInput, ForwardOutput
from pluglm.errors import InputError
from pluglm.forward import CausalLM
from pluglm_decoding_speculative.guessing import Chooses, Counts, Guesses, Schedule
from pluglm_decoding_speculative.passes import Passes
from pluglm_decoding_speculative.proposals import Proposal


class SelfDraft:
    """The proposer of early exit.

    Args:
        first_layers: called as the model, over its caches. cache: of the model, with every row's text but the last
            token. rows: of the batch.
    """

    def __init__(self, first_layers: Any, cache: Cache, how: Chooses, schedule: Schedule, rows: int) -> None:
        self._passes = Passes(first_layers, cache, how.device)
        self._how, self._rows = how, rows
        self._counts = Counts(schedule, rows)
        self._guessed = [0] * rows

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Proposal]:
        """One pass of the first layers a token, until no row guesses further."""
        wanted = self._counts.wanted(room)
        if not wanted:
            return {}
        guesses = Guesses(self._how, wanted, self._rows)
        feed = [self._how.texts.new[row][-1:] if row in wanted else [] for row in range(self._rows)]
        cells = 0
        while feed:
            feed = guesses.grow(self._passes.feed(feed)[:, 0])
            cells += 1
        self._passes.take_back([cells] * self._rows)
        for row, tokens in guesses.tokens.items():
            self._guessed[row] = len(tokens)
        return guesses.proposals()

    def learn(self, row: int, tokens: Sequence[int], matched: int) -> None:
        """Note how well the guess did."""
        self._counts.learn(row, self._guessed[row], matched)
        self._guessed[row] = 0


class _Module:
    """Runs a module by calling it: executors are built for whole models."""

    name = "early-exit"

    def __init__(self, module: Any) -> None:
        self._forward = module.forward

    def run(self, inputs: ForwardInput) -> ForwardOutput:
        """One forward pass."""
        output: ForwardOutput = self._forward(inputs)
        return output


def first_layers(model: Any, count: int) -> CausalLM:
    """The first `count` layers of a model, then its final norm and head; nothing is copied and nothing of it changed.

    Raises: UnsupportedRequestError for a model that is not built from a program; InputError for no layer, and for all.
    """
    program = model.description.program if isinstance(model, CausalLM) else None
    cut = getattr(getattr(model, "module", None), "first_layers", None)
    if program is None or cut is None:
        raise refused(
            "early-exit",
            ("this model is not built from a program, so it is not known where its layers begin and end",),
            'Name decoding="assisted" with a smaller model, or decoding="prompt-lookup".',
        )
    layers = len(program.layers)
    if not 1 <= count < layers:
        raise InputError(
            f"assistant_early_exit={count} leaves nothing to check or nothing to guess with.",
            why=f"the model has {layers} layers.",
            fix=f"Choose a number from 1 to {layers - 1}; a fourth of the layers is a good first try."
            if layers > 1 else "Name another strategy.",
            argument="assistant_early_exit",
        )  # fmt: skip
    module = cut(count)
    return CausalLM(module, _Module(module), model.layout, model.description, model.config)
