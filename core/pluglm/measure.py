"""Measures the candidates of one kind on one model, in turns, and checks that they compute the same.

Each candidate decodes the same tokens after the same prompt, fed to it rather than chosen by it, so that all do the
same work. Rounds alternate between candidates: a machine that is busy for a while slows all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError, PluglmError

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.lm import LanguageModel
    from pluglm.provider import Provider

#: Kinds whose providers compute the same thing, so that the faster one is the better one.
MEASURABLE = ("attention", "cache", "executor")
#: How far logits may lie from those of the first candidate, relative to the largest one, by dtype.
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}


@dataclass
class Candidate:
    """One provider under test. rounds_ms: median time of a token of each round. problem: why it was left out."""

    provider: Provider
    lm: LanguageModel | None = None
    logits: Tensor | None = None
    rounds_ms: list[float] = field(default_factory=list)
    problem: str = ""

    @property
    def token_ms(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds_ms)


def measure(
    providers: Sequence[Provider], load: Callable[[Provider], LanguageModel], *, prompt: int = 128, tokens: int = 32,
    rounds: int = 5,
) -> list[Candidate]:  # fmt: skip
    """Measure every provider that can be loaded; fastest first, those left out last.

    Args:
        load: loads the model with one provider named. prompt: tokens before. tokens: decoded a round.
    Raises: InputError if the model's context is too short.
    """
    candidates = [Candidate(provider) for provider in providers]
    for candidate in candidates:
        try:
            candidate.lm = load(candidate.provider)
            candidate.logits = _check(candidate.lm, prompt, tokens)
        except InputError:
            raise
        except PluglmError as error:
            candidate.problem = f"{type(error).__name__}: {error.what}"
    running = [c for c in candidates if c.lm is not None and not c.problem]
    for candidate in running[1:]:
        candidate.problem = _difference(running[0], candidate)
    running = [c for c in running if not c.problem]
    for _ in range(rounds):
        for candidate in running:
            assert candidate.lm is not None
            candidate.rounds_ms.append(statistics.median(_decode(candidate.lm, prompt, tokens)))
    return sorted(candidates, key=lambda c: (bool(c.problem), c.token_ms if c.rounds_ms else 0.0))


def _check(lm: LanguageModel, prompt: int, tokens: int) -> Tensor:
    """Logits of one round, [V] of the last token; also what warms the candidate up."""
    limit = lm.model.description.max_seq_len
    if limit is not None and prompt + tokens > limit:
        raise InputError(
            f"{prompt} prompt tokens and {tokens} new ones are more than the model's context of {limit}.",
            fix="Measure with --prompt-tokens and --tokens that fit.", argument="tokens",
        )  # fmt: skip
    last: list[Tensor] = []
    list(_decode(lm, prompt, tokens, last))
    return last[-1]


def _decode(lm: LanguageModel, prompt: int, tokens: int, last: list[Any] | None = None) -> Iterator[float]:
    """Milliseconds of each decoded token."""
    import torch

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(lm.model.description.vocab_size, (1, prompt + tokens), generator=draw).to(lm.model.device)
    with torch.inference_mode():
        cache = lm.new_cache(batch_size=1, capacity=prompt + tokens)
        logits = lm.model.step(ids[:, :prompt], cache)
        _wait(logits)
        for t in range(prompt, prompt + tokens):
            start = time.perf_counter()
            logits = lm.model.step(ids[:, t : t + 1], cache)
            _wait(logits)
            yield 1000 * (time.perf_counter() - start)
        if last is not None:
            last.append(logits[0, -1].float().cpu())


def _wait(result: Tensor) -> None:
    """For the device to have computed it: one element on the host."""
    result[0, 0, 0].item()


def _difference(first: Candidate, other: Candidate) -> str:
    assert first.lm is not None and first.logits is not None and other.logits is not None
    dtype = str(first.lm.model.dtype).removeprefix("torch.")
    distance = float((other.logits - first.logits).abs().max() / first.logits.abs().max())
    if distance <= TOLERANCE.get(dtype, 1e-3):
        return ""
    return f"its logits differ from those of {first.provider.id} by {distance:.1e} of the largest one"
