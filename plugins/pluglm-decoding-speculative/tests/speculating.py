"""Scripted models that repeat themselves, assistants that are often right, and calls on them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

import pluglm_decoding_speculative
import pluglm_decoding_standard
import torch
from pluglm_decoding_speculative.assistant import Assistant
from pluglm_decoding_speculative.spelling import Spelling
from pluglm_decoding_speculative.strategies import Assisted, EarlyExit, PromptLookup, Strategy

from pluglm.contracts import DecodingRequest, GenerationConfig, GenerationOutput
from pluglm.testing.decoding import text
from pluglm.testing.scripted_model import ScriptedModel

V, EOS, PAD = 23, 1, 0
LIKELY = 4.0


def repeats(history: tuple[int, ...]) -> dict[int, float]:
    """A text in which each token is mostly followed by the same one; no end token."""
    return {EOS: -1000.0, 2 + (5 * sum(history[-1:]) + 3) % 17: LIKELY}  # the sum: padding has no history


class Remembering(ScriptedModel):
    """Computes the scores of a text once for all tests."""

    known: ClassVar[dict[Any, list[float]]] = {}

    def scores(self, history: tuple[int, ...]) -> list[float]:
        key = self.vocab_size, self._script, history
        if key not in self.known:
            self.known[key] = super().scores(history)
        return self.known[key]


class Leaning(Remembering):
    """An assistant whose distribution is never the model's."""

    def scores(self, history: tuple[int, ...]) -> list[float]:
        scores = super().scores(history)
        return [0.4 * score + 0.6 * other for score, other in zip(scores, scores[1:] + scores[:1], strict=True)]


class Blurred(Remembering):
    """An assistant: after two texts in three its scores are those of `script`, else others."""

    def scores(self, history: tuple[int, ...]) -> list[float]:
        scores = super().scores(history)
        return scores if zlib.crc32(repr((history, "blur")).encode()) % 3 else scores[::-1]


class Helped:
    """As the entry point `assisted`, with an assistant of every strategy's own."""

    def __init__(self, assistant: ScriptedModel | None = None) -> None:
        self.assistant = assistant or Blurred(V, repeats)

    def pluglm_build_decoding(self, request: DecodingRequest) -> Assisted:
        strategy = pluglm_decoding_speculative.assisted.pluglm_build_decoding(request=request)
        assert isinstance(strategy, Assisted)
        strategy.assistant = Assistant(self.assistant, self.assistant.vocab_size, None)
        return strategy


class Exiting:
    """As the entry point `early-exit`, for models that have no layers: what they would say after some is scripted."""

    def pluglm_build_decoding(self, request: DecodingRequest) -> EarlyExit:
        strategy = pluglm_decoding_speculative.early_exit.pluglm_build_decoding(request=request)
        assert isinstance(strategy, EarlyExit)
        strategy.layers = 1
        strategy.cut = lambda model, count: Blurred(V, repeats)  # type: ignore[method-assign, assignment, return-value]
        return strategy


#: Options with which a strategy guesses as far as it may, whatever the price.
FREE: dict[str, Any] = {"options": (("token_price", 0.0),)}


def build(name: str, **changes: Any) -> Strategy:
    """The strategy of a name; prompt lookup guesses as far as it may, so that there is much to check."""
    own = FREE if name == "prompt-lookup" else {}
    request = DecodingRequest(**{"vocab_size": V, "device": "cpu", "decode": text, **own, **changes})
    if name == "assisted":
        return Helped().pluglm_build_decoding(request)
    if name == "early-exit":
        return Exiting().pluglm_build_decoding(request)
    strategy = pluglm_decoding_speculative.prompt_lookup.pluglm_build_decoding(request=request)
    assert isinstance(strategy, PromptLookup)
    return strategy


class Merging:
    """A tokenizer of letters and of some runs of letters; the longest one that fits is taken."""

    def __init__(self, *runs: str) -> None:
        self.texts = [*map(chr, range(ord("a"), ord("a") + V)), *runs]
        self._ids = {text: i for i, text in enumerate(self.texts)}
        self._longest = max(map(len, self.texts))
        self.spelling = Spelling(self.decode, self.encode)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.texts[i] for i in ids)

    def encode(self, spelt: str) -> list[int]:
        ids = []
        while spelt:
            size = next(n for n in range(self._longest, 0, -1) if spelt[:n] in self._ids)
            ids.append(self._ids[spelt[:size]])
            spelt = spelt[size:]
        return ids


class Foreign(ScriptedModel):
    """An assistant with a tokenizer of its own. It knows what the model says, but after one text in five."""

    def __init__(self, tokenizer: Merging) -> None:
        super().__init__(len(tokenizer.texts))
        self.tokenizer = tokenizer

    def scores(self, history: tuple[int, ...]) -> list[float]:
        spelt = self.tokenizer.decode(history)
        letters, said = tuple(ord(letter) - ord("a") for letter in spelt), ""
        for _ in range(3):
            best = max(range(V), key=Remembering(V, repeats).scores(letters).__getitem__)
            letters, said = (*letters, best), said + chr(ord("a") + best)
        wrong = zlib.crc32(spelt.encode()) % 5 == 0
        scores = [0.0] * self.vocab_size
        scores[self.tokenizer.encode(said)[0] if not wrong else 3] = 9.0
        return scores


def foreign(tokenizer: Merging, max_seq_len: int | None = None) -> Assistant:
    """An assistant that `Assisted` can use as it is."""
    model = Foreign(tokenizer)
    return Assistant(
        model, model.vocab_size, max_seq_len, tokenizer.decode, tokenizer.spelling, ends=frozenset({EOS}),
        translates=True,
    )  # fmt: skip


ARGUMENTS = (
    "logits_processor",
    "stopping_criteria",
    "streamer",
    "past_key_values",
    "use_cache",
    "position_ids",
    "mood",
)


def batch(rows: Sequence[Sequence[int]], side: str = "left") -> dict[str, torch.Tensor]:
    """Rows padded on one side: input_ids and, where it says something, attention_mask."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        fill, ones = [PAD] * (width - len(row)), [1] * len(row)
        ids.append([*fill, *row] if side == "left" else [*row, *fill])
        mask.append([*fill, *ones] if side == "left" else [*ones, *fill])
    found = {"input_ids": torch.tensor(ids)}
    return found if all(map(all, mask)) else {**found, "attention_mask": torch.tensor(mask)}


def call(
    strategy: Any, model: ScriptedModel, rows: Sequence[Sequence[int]], *, side: str = "left", **said: Any
) -> GenerationOutput:
    """One call of any strategy; what is no argument of the call is a field."""
    arguments = {name: said.pop(name) for name in list(said) if name in ARGUMENTS}
    config = GenerationConfig(pad_token_id=PAD, eos_token_id=(EOS,)).updated(**{"max_new_tokens": 12, **said})
    output = strategy(model, generation_config=config, **batch(rows, side), **arguments)
    assert isinstance(output, GenerationOutput)
    return output


def plain(rows: Sequence[Sequence[int]], model: ScriptedModel | None = None, **said: Any) -> GenerationOutput:
    """The same call by plain greedy decoding or sampling."""
    sampling = any(name in said for name in ("temperature", "top_k", "top_p", "min_p"))
    name = "sampling" if sampling else "greedy"
    provider = getattr(pluglm_decoding_standard, name)
    strategy = provider.pluglm_build_decoding(request=DecodingRequest(V, "cpu", text))
    return call(strategy, model or Remembering(V, repeats), rows, **said)


def same(a: GenerationOutput, b: GenerationOutput) -> bool:
    """Whether two outputs say the same, row for row."""
    return (
        torch.equal(a.sequences, b.sequences)
        and a.num_new_tokens == b.num_new_tokens
        and a.finish_reasons == b.finish_reasons
    )
