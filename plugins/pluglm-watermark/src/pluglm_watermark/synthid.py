"""SynthID text: among tokens that the model holds likely, those with better secret numbers win a tournament.

Source: Dathathri et al. 2024, "Scalable watermarking for identifying large language model outputs", Nature 634: the
non-distortionary tournament of two, layer by layer (methods, "vectorized form"), with contexts that repeat left
unmarked. Hashes and tables are those of transformers 5.23, so that text that one of the two marked is recognised by
the other; a text of the Gemini app, which has keys and hashes of its own, is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pluglm_watermark.reading import check, read_rows, too_short

#: The linear congruential generator of newlib and musl, which adds one token after another to a hash.
_MULTIPLIER = 6364136223846793005


@dataclass(frozen=True)
class SynthIDTextWatermarkingConfig:
    """How text is marked; the detector needs the same.

    Attributes:
        ngram_len: a token's numbers depend on the ngram_len - 1 tokens before it and on itself; >= 2.
        keys: the secret, one integer for each layer of the tournament; the paper uses 30 layers.
        context_history_size: contexts of the text that are remembered; one that comes again is not marked.
        sampling_table_seed, sampling_table_size: of the table that turns hashes into 0 and 1.
        skip_first_ngram_calls: leave the first ngram_len - 1 new tokens unmarked, whose context is not whole.
    """

    ngram_len: int
    keys: Sequence[int]
    context_history_size: int = 1024
    sampling_table_seed: int = 0
    sampling_table_size: int = 2**16
    skip_first_ngram_calls: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", tuple(self.keys))
        check("ngram_len", self.ngram_len, self.ngram_len >= 2, "an integer >= 2")
        check("keys", self.keys, bool(self.keys), "one integer at least")
        check("context_history_size", self.context_history_size, self.context_history_size >= 1, "an integer >= 1")
        rule = "an integer from 1 to 2**24"
        check("sampling_table_size", self.sampling_table_size, 1 <= self.sampling_table_size <= 2**24, rule)

    def construct_processor(self, vocab_size: int, device: torch.device | str) -> SynthIDProcessor:
        """The logits processor of one call. vocab_size: V, which the hashes do not need. device: of the scores."""
        return SynthIDProcessor(Numbers(self, device), vocab_size)


class Numbers:
    """The secret numbers, 0 or 1, of a token after a context, one for each layer."""

    def __init__(self, config: SynthIDTextWatermarkingConfig, device: torch.device | str) -> None:
        self.config, self.device = config, torch.device(device)
        self._keys = torch.tensor(config.keys, device=self.device)
        draws = torch.Generator(device=self.device).manual_seed(config.sampling_table_seed)
        size = (config.sampling_table_size,)
        self._table = torch.randint(0, 2, size, generator=draws, device=self.device)

    def hashes(self, contexts: Tensor) -> Tensor:
        """[...] int64 of contexts [..., n]."""
        result = torch.ones(contexts.shape[:-1], dtype=torch.int64, device=self.device)
        for token in contexts.unbind(-1):
            result = _add(result, token)
        return result

    def of(self, hashes: Tensor, tokens: Tensor) -> Tensor:
        """[..., depth] of tokens [...] after contexts with these hashes [...]."""
        keyed = _add(_add(hashes, tokens)[..., None], self._keys)
        return self._table[keyed % self.config.sampling_table_size]


class SynthIDProcessor:
    """Reshapes the distribution; the scores become log-probabilities. It may be asked about any continuation of the
    width it was first shown, whose cells count as the prompt: a context holds new tokens alone, zeros before them.
    """

    def __init__(self, numbers: Numbers, vocab_size: int) -> None:
        self._numbers, self._tokens = numbers, torch.arange(vocab_size, device=numbers.device)
        self._prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V] scores. input_ids: [R, S]."""
        config, width = self._numbers.config, input_ids.shape[1]
        if self._prompt is None or width < self._prompt:
            self._prompt = width
        new = input_ids[:, self._prompt :].to(self._numbers.device)
        n = config.ngram_len - 1
        if config.skip_first_ngram_calls and new.shape[1] < n:
            return scores
        padded = torch.cat((new.new_zeros(new.shape[0], n), new), dim=1)
        hashes = self._numbers.hashes(padded.unfold(1, n, 1))  # [R, new + 1], one for each new token and the next
        now, before = hashes[:, -1:], hashes[:, n if config.skip_first_ngram_calls else 0 : -1]
        before = before[:, -config.context_history_size :]
        numbers = self._numbers.of(now, self._tokens[None])  # [R, V, depth]
        marked = _tournament(scores, numbers.to(scores.device))
        repeated = (before == now).any(1, keepdim=True).to(scores.device)
        return torch.where(repeated, scores, marked)


def _tournament(scores: Tensor, numbers: Tensor) -> Tensor:
    """[R, V] log-probabilities after a tournament of two in each layer. numbers: [R, V, depth] of 0 and 1."""
    p = scores.softmax(-1)
    for layer in numbers.unbind(-1):
        winning = (layer * p).sum(-1, keepdim=True)
        p = p * (1 + layer - winning)
    return p.log().clamp(min=torch.finfo(p.dtype).min)


@dataclass(frozen=True)
class SynthIDDetection:
    """What a detector found, one entry a row.

    Attributes:
        num_tokens_scored: [B] int64, whose context is whole and new. score: [B] float64, the weighted mean of their
            numbers: 0.5 in unmarked text. z_score: [B] float64, its standard deviations above that.
        p_value: [B] float64, the chance of such a score in unmarked text. prediction: [B] bool.
    """

    num_tokens_scored: Tensor
    score: Tensor
    z_score: Tensor
    p_value: Tensor
    prediction: Tensor


class SynthIDTextWatermarkDetector:
    """The weighted mean of the secret numbers (Dathathri et al. 2024, supplement, "weighted mean score").

    Early layers decide more of the tournament and weigh more: weights fall evenly from 10 to 1. Unmarked text has
    numbers that are fair coins, so the score has a known distribution and no training is needed. (The reference's
    Bayesian detector learns its own from marked and unmarked text of one model.)

    Args:
        config: as the text was marked with. eos_token_id: what follows it is left out. device: that marked.
    """

    def __init__(
        self, config: SynthIDTextWatermarkingConfig, *, eos_token_id: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self._numbers, self._eos = Numbers(config, device), eos_token_id
        weights = torch.linspace(10, 1, len(config.keys), dtype=torch.float64)
        self._weights = weights / weights.sum()

    def numbers(self, row: Sequence[int]) -> Tensor:
        """[tokens, depth] of the tokens of one row that are scored."""
        config = self._numbers.config
        n = config.ngram_len
        if self._eos is not None and self._eos in row:
            row = row[: list(row).index(self._eos)]
        if len(row) < n:
            return torch.zeros(0, len(config.keys), dtype=torch.int64)
        ids = torch.tensor(row, device=self._numbers.device)
        grams = ids.unfold(0, n, 1)  # [tokens, n]
        hashes = self._numbers.hashes(grams[:, :-1])
        seen, new = set(), []
        for i, value in enumerate(hashes.tolist()):
            if value not in seen:
                new.append(i)
            seen.add(value)
        kept = torch.tensor(new, device=ids.device)
        return self._numbers.of(hashes, grams[:, -1])[kept].cpu()

    def __call__(
        self, token_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None = None, *,
        z_threshold: float = 3.0,
    ) -> SynthIDDetection:  # fmt: skip
        """Look at rows of text without their prompts.

        Args:
            token_ids: [B, S], or a list of rows of any lengths. attention_mask: [B, S], 0 for padding; None: none.
        Raises: InputError for a row that is too short to score one token.
        """
        rows = read_rows(token_ids, attention_mask)
        counts, scores = [], []
        for number, row in enumerate(rows):
            numbers = self.numbers(row)
            if not numbers.shape[0]:
                raise too_short(number, row, self._numbers.config.ngram_len - 1)
            counts.append(numbers.shape[0])
            scores.append((numbers.double() @ self._weights).mean())
        scored, score = torch.tensor(counts), torch.stack(scores)
        # The variance of a fair coin is 1/4; coins of different tokens and layers are independent.
        spread = 0.5 * self._weights.square().sum().sqrt() / scored.double().sqrt()
        z = (score - 0.5) / spread
        return SynthIDDetection(scored, score, z, 0.5 * torch.special.erfc(z / math.sqrt(2)), z > z_threshold)


def _add(hashes: Tensor, numbers: Tensor) -> Tensor:
    """One step of the hash, in integers of 64 bits that wrap around."""
    return (hashes + numbers) * _MULTIPLIER + 1
