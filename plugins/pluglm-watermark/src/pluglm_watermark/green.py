"""Green lists: a secret part of the vocabulary, another one after each context, is made a little more likely.

Source: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", algorithm 2 ("lefthash"), and Kirchenbauer et
al. 2024, "On the Reliability of Watermarks for Large Language Models", algorithm 1 ("selfhash"). Seeds and lists are
those of transformers 5.23 on the same kind of device, so that text that one of the two marked the other recognises.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pluglm_watermark.reading import check, read_rows, too_short

#: Numbers 0 … size - 1 in an order that the key decides; "selfhash" hashes tokens by it.
_TABLE_SIZE = 1_000_003
#: How many of the best candidates "selfhash" looks at: each needs a list of its own.
_CANDIDATES = 40
#: Lists that are kept: the same contexts come again, in a text and in its detector.
_KEPT = 512


@dataclass(frozen=True)
class WatermarkingConfig:
    """How text is marked; the detector needs the same.

    Attributes:
        greenlist_ratio: share of the vocabulary that is green, above 0 and below 1.
        bias: what is added to the scores of green tokens.
        hashing_key: the secret. The default is everyone's: choose another one.
        seeding_scheme: "lefthash": the list depends on the token before; "selfhash": on the tokens before and the
            candidate itself, which only the best candidates can afford.
        context_width: tokens that "selfhash" looks at, the candidate included. "lefthash" looks at one, and needs as
            many before it marks.
    """

    greenlist_ratio: float = 0.25
    bias: float = 2.0
    hashing_key: int = 15485863
    seeding_scheme: Literal["lefthash", "selfhash"] = "lefthash"
    context_width: int = 1

    def __post_init__(self) -> None:
        check("greenlist_ratio", self.greenlist_ratio, 0 < self.greenlist_ratio < 1, "a number between 0 and 1")
        check("bias", self.bias, math.isfinite(self.bias), "a finite number")
        check("hashing_key", self.hashing_key, 0 < self.hashing_key < 2**63, "an integer from 1 to 2**63 - 1")
        schemes = ("lefthash", "selfhash")
        check("seeding_scheme", self.seeding_scheme, self.seeding_scheme in schemes, " or ".join(map(repr, schemes)))
        check("context_width", self.context_width, self.context_width >= 1, "an integer >= 1")

    def construct_processor(self, vocab_size: int, device: torch.device | str) -> GreenListProcessor:
        """The logits processor of one call. vocab_size: V. device: of the scores; another kind has other lists."""
        return GreenListProcessor(GreenLists(self, vocab_size, device))


class GreenLists:
    """Which tokens are green after a context.

    Args:
        vocab_size: V. device: whose random numbers make the lists.
    """

    def __init__(self, config: WatermarkingConfig, vocab_size: int, device: torch.device | str) -> None:
        self.config, self.vocab_size = config, vocab_size
        self.size = int(vocab_size * config.greenlist_ratio)
        self._device = torch.device(device)
        self._draws = torch.Generator(device=self._device).manual_seed(config.hashing_key)
        self._table: Tensor | None = None
        if config.seeding_scheme == "selfhash":
            self._table = torch.randperm(_TABLE_SIZE, generator=self._draws, device=self._device).cpu()
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def after(self, context: Sequence[int]) -> Tensor:
        """[V] bool, True for green tokens. context: token ids; of "selfhash" with the candidate as the last one."""
        seed = self._seed(context)
        green = self._kept.pop(seed, None)
        if green is None:
            self._draws.manual_seed(seed)
            order = torch.randperm(self.vocab_size, generator=self._draws, device=self._device)
            green = torch.zeros(self.vocab_size, dtype=torch.bool, device=self._device)
            green[order[: self.size]] = True
        self._kept[seed] = green
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return green

    def _seed(self, context: Sequence[int]) -> int:
        key = self.config.hashing_key
        if self._table is None:
            return (key * context[-1]) % (2**64 - 1)
        hashed = (self._table[torch.tensor(context[-self.config.context_width :]) % _TABLE_SIZE] + 1).tolist()
        # Products wrap around as those of 64-bit integers do: the reference computes them so.
        return min(_wrapped(_wrapped(key * a) * hashed[-1]) for a in hashed) % (2**64 - 1)


class GreenListProcessor:
    """Adds the bias to green tokens. A row's scores depend on its own last tokens alone.

    Rows shorter than the context are left as they are. Padding on the left is not told apart from text: it enters the
    list of the first tokens of a prompt that is shorter than the context, and nothing else.
    """

    def __init__(self, lists: GreenLists) -> None:
        self._lists = lists

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V] scores. input_ids: [R, S]."""
        config = self._lists.config
        if input_ids.shape[1] < config.context_width:
            return scores
        contexts: list[list[int]] = input_ids[:, -config.context_width :].tolist()
        if config.seeding_scheme == "lefthash":
            green = torch.stack([self._lists.after(context) for context in contexts])
        else:
            green = self._own_lists(contexts, scores)
        return torch.where(green.to(scores.device), scores + config.bias, scores)

    def _own_lists(self, contexts: Sequence[list[int]], scores: Tensor) -> Tensor:
        """[R, V] bool: of each row's best candidates, those that are green in the list that they make themselves."""
        green = torch.zeros(scores.shape, dtype=torch.bool)
        best = scores.sort(dim=-1, descending=True).indices[:, :_CANDIDATES].tolist()
        for row, candidates in enumerate(best):
            for token in candidates:
                green[row, token] = bool(self._lists.after([*contexts[row], token])[token])
        return green


@dataclass(frozen=True)
class Detection:
    """What a detector found, one entry a row.

    Attributes:
        num_tokens_scored: [B] int64. num_green_tokens: [B] int64. green_fraction: [B] float64, their ratio.
        z_score: [B] float64, standard deviations above what unmarked text has. p_value: [B] float64, the chance of as
            many in unmarked text. prediction: [B] bool, z_score above the threshold. confidence: 1 - p_value.
    """

    num_tokens_scored: Tensor
    num_green_tokens: Tensor
    green_fraction: Tensor
    z_score: Tensor
    p_value: Tensor
    prediction: Tensor

    @property
    def confidence(self) -> Tensor:
        """[B] float64."""
        return 1 - self.p_value


class WatermarkDetector:
    """Counts green tokens (Kirchenbauer et al. 2023, section 3, equation 3).

    Args:
        config: as the text was marked with. vocab_size: V of the model. device: of the kind that marked.
        bos_token_id: left out where a row begins with it.
        ignore_repeated_ngrams: count each context with its token once.
    """

    def __init__(
        self, config: WatermarkingConfig, *, vocab_size: int, device: torch.device | str = "cpu",
        bos_token_id: int | None = None, ignore_repeated_ngrams: bool = False,
    ) -> None:  # fmt: skip
        self._lists = GreenLists(config, vocab_size, device)
        self._bos, self._once = bos_token_id, ignore_repeated_ngrams

    def __call__(
        self, token_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None = None, *,
        z_threshold: float = 3.0,
    ) -> Detection:  # fmt: skip
        """Look at rows of text without their prompts.

        Args:
            token_ids: [B, S], or a list of rows of any lengths. attention_mask: [B, S], 0 for padding; None: none.
        Raises: InputError for a row that is too short to score one token.
        """
        rows = read_rows(token_ids, attention_mask)
        counted = [self._count(row, number) for number, row in enumerate(rows)]
        scored, green = (torch.tensor(column) for column in zip(*counted, strict=True))
        share = self._lists.config.greenlist_ratio
        z = (green - share * scored) / (scored * share * (1 - share)).double().sqrt()
        p = 0.5 * torch.special.erfc(z / math.sqrt(2))
        return Detection(scored, green, green.double() / scored, z, p, z > z_threshold)

    def _count(self, row: list[int], number: int) -> tuple[int, int]:
        """Tokens of one row that were scored, and how many of them are green."""
        if row and row[0] == self._bos:
            row = row[1:]
        # A context of "selfhash" holds the token itself.
        before = self._lists.config.context_width - (self._lists.config.seeding_scheme == "selfhash")
        if len(row) <= before:
            raise too_short(number, row, before)
        grams = [tuple(row[i - before : i + 1]) for i in range(before, len(row))]
        if self._once:
            grams = list(dict.fromkeys(grams))
        return len(grams), sum(self._is_green(gram) for gram in grams)

    def _is_green(self, gram: Sequence[int]) -> bool:
        selfhash = self._lists.config.seeding_scheme == "selfhash"
        return bool(self._lists.after(gram if selfhash else gram[:-1])[gram[-1]])


def _wrapped(number: int) -> int:
    """As a signed integer of 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
