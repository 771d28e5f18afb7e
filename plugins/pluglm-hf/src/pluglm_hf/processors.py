"""What changes scores, under the names and constructors of transformers 5.23; the numbers are those of every strategy.

A processor is called as `process(input_ids [B, S], scores [B, V])` and returns scores [B, V]. Those that a caller makes
by hand know of no padding: all cells of `input_ids` are text to them, as in the reference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pluglm_decoding_blocks.allowed import PrefixAllowed, Suppress, remove_invalid
from pluglm_decoding_blocks.biases import SequenceBias, bad_words
from pluglm_decoding_blocks.lengths import AtCounts, MinNewTokens
from pluglm_decoding_blocks.ngrams import NoCopy, NoRepeat
from pluglm_decoding_blocks.penalties import ExponentialDecay, RepetitionPenalty, SourcePenalty
from pluglm_decoding_blocks.texts import Texts
from torch import Tensor

from pluglm.errors import InputError

TokenIds = int | Iterable[int] | Tensor
#: All cells are text, from the first one on.
_ALL = Texts(0, None)


class LogitsProcessor:
    """Base of all processors."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """To be written by a subclass."""
        raise NotImplementedError(f"{type(self).__name__} does not say what to do with scores: it has no __call__.")


class LogitsProcessorList(list[Any]):
    """Several processors, one after the other. What each takes is looked up once, not for each token."""

    _seen: tuple[Any, ...] = ()
    _further: tuple[tuple[str, ...], ...] = ()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """[B, V]. kwargs: for processors that take more than ids and scores.

        Raises: InputError if one of them is not there.
        """
        if len(self._seen) != len(self) or any(a is not b for a, b in zip(self._seen, self, strict=True)):
            self._seen, self._further = tuple(self), tuple(_further(process) for process in self)
        for process, names in zip(self._seen, self._further, strict=True):
            if not names:
                scores = process(input_ids, scores)
                continue
            missing = [name for name in names if name not in kwargs]
            if missing:
                raise InputError(
                    f"{type(process).__name__} needs {', '.join(missing)}.",
                    why=f"the caller passes {', '.join(kwargs) or 'nothing but ids and scores'}.",
                    fix="Use it with the method that it was written for.", argument=missing[0],
                )  # fmt: skip
            scores = process(input_ids, scores, **kwargs)
        return scores


def _further(process: Callable[..., Tensor]) -> tuple[str, ...]:
    """Names of the parameters beyond ids and scores."""
    return tuple(inspect.signature(process).parameters)[2:]


class _Wrapped(LogitsProcessor):
    """Scores go through `self._process`, which a subclass makes."""

    _process: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]."""
        return self._process(input_ids, scores)


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """CTRL's penalty on tokens that occurred.

    Args:
        penalty: > 0. prompt_ignore_length: cells at the start that do not count, of all rows, or [B] of each.
    """

    def __init__(self, penalty: float, prompt_ignore_length: int | Tensor | None = None) -> None:
        self.penalty = positive("penalty", penalty)
        self.prompt_ignore_length = prompt_ignore_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]. Rows may have moved since the last call, as in searches, so ids are looked at anew."""
        if self.prompt_ignore_length is None:
            return RepetitionPenalty(self.penalty, incremental=False)(input_ids, scores)
        cells = torch.arange(input_ids.shape[1], device=input_ids.device)
        ignored = torch.as_tensor(self.prompt_ignore_length, device=input_ids.device).reshape(-1, 1)
        counts = (cells >= ignored).expand(input_ids.shape)
        penalised = RepetitionPenalty(self.penalty, counts.long(), incremental=False)(input_ids, scores)
        return torch.where(counts.any(1, keepdim=True), penalised, scores)


class EncoderRepetitionPenaltyLogitsProcessor(_Wrapped):
    """Tokens of the source gain. encoder_input_ids: [B, Te]."""

    def __init__(self, penalty: float, encoder_input_ids: Tensor) -> None:
        self.penalty = positive("penalty", penalty)
        self._process = SourcePenalty(penalty, encoder_input_ids, None, length=encoder_input_ids.shape[1])


class MinLengthLogitsProcessor(_Wrapped):
    """No end token before `min_length` cells, prompt included."""

    def __init__(self, min_length: int, eos_token_id: TokenIds, device: Any = "cpu") -> None:
        self.min_length, self.eos_token_id = count("min_length", min_length), token_ids(eos_token_id, device)
        self._process = MinNewTokens(0, self.min_length, self.eos_token_id)


class MinNewTokensLengthLogitsProcessor(_Wrapped):
    """No end token before `min_new_tokens` tokens after a prompt of `prompt_length_to_skip` cells."""

    def __init__(
        self, prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: TokenIds, device: Any = "cpu"
    ) -> None:  # fmt: skip
        self.prompt_length_to_skip = count("prompt_length_to_skip", prompt_length_to_skip)
        self.min_new_tokens = count("min_new_tokens", min_new_tokens)
        self.eos_token_id = token_ids(eos_token_id, device)
        self._process = MinNewTokens(self.prompt_length_to_skip, self.min_new_tokens, self.eos_token_id)


class NoRepeatNGramLogitsProcessor(_Wrapped):
    """No run of `ngram_size` tokens twice."""

    def __init__(self, ngram_size: int) -> None:
        self.ngram_size = count("ngram_size", ngram_size, least=1)
        self._process = NoRepeat(_ALL, ngram_size)


class EncoderNoRepeatNGramLogitsProcessor(_Wrapped):
    """No run of `encoder_ngram_size` tokens that the source holds. encoder_input_ids: [B, Te]."""

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: Tensor) -> None:
        self.ngram_size = count("encoder_ngram_size", encoder_ngram_size, least=1)
        self._process = NoCopy(_ALL, encoder_ngram_size, encoder_input_ids, None)


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Adds to the token that completes a sequence. sequence_bias: [[ids, number], …], or {ids: number}."""

    def __init__(self, sequence_bias: Sequence[Any] | Mapping[tuple[int, ...], float]) -> None:
        pairs = sequence_bias.items() if isinstance(sequence_bias, Mapping) else sequence_bias
        self._biases = {tuple(ids): float(bias) for ids, bias in pairs}
        if not self._biases or not all(self._biases):
            raise senseless("sequence_bias", sequence_bias, "sequences of a token or more, each with a number")
        self._process: SequenceBias | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]."""
        if self._process is None:
            self._process = SequenceBias(_ALL, self._biases, scores.device)
        return self._process(input_ids, scores)


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Forbids sequences; an end token alone stays allowed. Nothing is left to forbid: does nothing."""

    def __init__(self, bad_words_ids: Sequence[Sequence[int]], eos_token_id: TokenIds | None = None) -> None:
        if not bad_words_ids or not all(bad_words_ids):
            raise senseless("bad_words_ids", bad_words_ids, "a list of lists of token ids, none of them empty")
        ends = token_ids(eos_token_id, "cpu").tolist() if eos_token_id is not None else ()
        self._biases = bad_words(bad_words_ids, ends)
        self._process = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]."""
        return super().__call__(input_ids, scores) if self._biases else scores


class PrefixConstrainedLogitsProcessor(_Wrapped):
    """Only the tokens that a function names after the text.

    Args:
        prefix_allowed_tokens_fn: (number of the prompt, ids [S]) -> allowed ids. num_beams: rows of each prompt.
    """

    def __init__(self, prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]], num_beams: int) -> None:
        self._process = PrefixAllowed(_ALL, prefix_allowed_tokens_fn, num_beams)


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """The only token after the first one."""

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]."""
        return AtCounts(_ALL, [1], token_ids(self.bos_token_id, scores.device), only=True)(input_ids, scores)


class ForcedEOSTokenLogitsProcessor(_Wrapped):
    """The only tokens at `max_length`."""

    def __init__(self, max_length: int, eos_token_id: TokenIds, device: Any = "cpu") -> None:
        self.max_length, self.eos_token_id = max_length, token_ids(eos_token_id, device)
        self._process = AtCounts(_ALL, [max_length - 1], self.eos_token_id, only=True)


class ExponentialDecayLengthPenalty(_Wrapped):
    """End tokens gain with length. exponential_decay_length_penalty: (new tokens before it starts, factor)."""

    def __init__(
        self, exponential_decay_length_penalty: tuple[int, float], eos_token_id: TokenIds, input_ids_seq_length: int
    ) -> None:  # fmt: skip
        start, factor = exponential_decay_length_penalty
        self.eos_token_id = token_ids(eos_token_id, "cpu")
        self._decay = (Texts(input_ids_seq_length, None), start, factor)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]."""
        self.eos_token_id = self.eos_token_id.to(scores.device)
        return ExponentialDecay(*self._decay, self.eos_token_id)(input_ids, scores)


class SuppressTokensAtBeginLogitsProcessor(_Wrapped):
    """These tokens not at cell `begin_index`."""

    def __init__(self, begin_suppress_tokens: TokenIds, begin_index: int, device: Any = "cpu") -> None:
        self.begin_index = begin_index
        self._process = AtCounts(_ALL, [begin_index], token_ids(begin_suppress_tokens, device), only=False)


class SuppressTokensLogitsProcessor(_Wrapped):
    """These tokens never."""

    def __init__(self, suppress_tokens: TokenIds, device: Any = "cpu") -> None:
        self._process = Suppress(token_ids(suppress_tokens, device))


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """Scores become finite numbers."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]."""
        return remove_invalid(scores)


class LogitNormalization(LogitsProcessor):
    """Log-softmax: scores whose exponentials sum to one."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V]."""
        return scores.log_softmax(-1)


def token_ids(value: TokenIds, device: Any) -> Tensor:
    """[E] int64. Raises InputError for what are no ids."""
    listed = [value] if isinstance(value, int) else value if isinstance(value, Tensor) else list(value)
    ids = torch.as_tensor(listed, dtype=torch.int64, device=device).reshape(-1)
    if not ids.numel() or bool((ids < 0).any()):
        raise senseless("token ids", value, "an id or several")
    return ids


def count(name: str, value: Any, *, least: int = 0) -> int:
    """An integer >= least, or InputError."""
    if type(value) is not int or value < least:
        raise senseless(name, value, f"an integer >= {least}")
    return value


def positive(name: str, value: Any) -> float:
    """A number > 0, or InputError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise senseless(name, value, "a number > 0")
    return float(value)


def senseless(name: str, value: object, rule: str) -> InputError:
    """The error for a value that breaks its rule."""
    return InputError(f"{name}={value!r} makes no sense: it must be {rule}.", argument=name)
