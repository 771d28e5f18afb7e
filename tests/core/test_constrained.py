"""The processor that follows any texts: what it allows depends on a row's text alone, and the usual step costs one token."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pluglm.constrained import ConstraintProcessor, shared
from pluglm.contracts import Matcher
from pluglm.errors import GenerationError, GrammarError, InputError

V, W = 71, 3
EOS = (0, 65)
PAD = 5


class Counted:
    """A grammar of token ids, made to depend on the whole text, that counts what is asked of it."""

    def __init__(self, salt: int, counts: Counter[str], text: tuple[int, ...] = ()) -> None:
        self.salt, self.counts, self.text = salt, counts, text

    def allowed(self) -> set[int]:
        mixed = self.salt + sum((i + 3) * token for i, token in enumerate(self.text))
        texts = {t for t in range(V) if (mixed + t * t) % 3 and t not in (*EOS, PAD)}
        return texts | (set(EOS) if self.accepting else set())

    @property
    def accepting(self) -> bool:
        return len(self.text) % 2 == 1

    @property
    def finished(self) -> bool:
        return False

    def allow(self, masks: Tensor, row: int) -> None:
        self.counts["allow"] += 1
        words = [0] * W
        for token in self.allowed():
            words[token // 32] |= 1 << token % 32
        masks[row] = torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)

    def accept(self, token_id: int) -> None:
        self.counts["accept"] += 1
        if token_id not in self.allowed() or token_id in EOS:
            raise GrammarError("no")
        self.text = (*self.text, token_id)

    def rollback(self, count: int) -> None:
        self.counts["rollback"] += 1
        if count > len(self.text):
            raise InputError("no")
        self.text = self.text[: len(self.text) - count]

    def fork(self) -> Matcher:
        self.counts["fork"] += 1
        return Counted(self.salt, self.counts, self.text)


def expected(salt: int, text: Sequence[int]) -> set[int]:
    """What may come after a text, by following it from its beginning."""
    matcher = Counted(salt, Counter())
    for token in text:
        if token in EOS:
            return set(range(V))
        try:
            matcher.accept(token)
        except GrammarError:
            return set()
    return matcher.allowed()


def kept(scores: Tensor) -> list[set[int]]:
    return [{i for i, score in enumerate(row) if score != -torch.inf} for row in scores.tolist()]


def ask(
    processor: ConstraintProcessor, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]
) -> list[set[int]]:
    ids = torch.tensor([[*p, *t] for p, t in zip(prompts, texts, strict=True)])
    out = processor(ids, torch.zeros(len(texts), V))
    assert not out[out > -torch.inf].any(), "what is allowed keeps its score"
    return kept(out)


def grown(salt: int, text: list[int], draw: random.Random) -> int:
    return draw.choice(sorted(expected(salt, text) - set(EOS)) or [PAD])


def test_the_usual_step_accepts_one_token_a_row_and_copies_nothing() -> None:
    counts: Counter[str] = Counter()
    root, draw = Counted(1, counts), random.Random(3)
    processor = ConstraintProcessor([root, root], torch.tensor([[7, 8], [8, 7]]), EOS)
    texts: list[list[int]] = [[], []]
    ask(processor, [[7, 8], [8, 7]], texts)
    assert counts == {"fork": 2, "allow": 2}
    for _ in range(150):  # beyond what is reserved at first
        counts.clear()
        for text in texts:
            text.append(grown(1, text, draw))
        assert ask(processor, [[7, 8], [8, 7]], texts) == [expected(1, text) for text in texts]
        assert counts == {"accept": 2, "allow": 2}
    assert root.text == ()


def test_rows_that_a_beam_search_moves_cost_one_copy_for_each_double() -> None:
    counts: Counter[str] = Counter()
    root, draw = Counted(1, counts), random.Random(3)
    processor = ConstraintProcessor([root], torch.tensor([[7]]), EOS)
    texts: list[list[int]] = [[]] * 5
    ask(processor, [[7]] * 5, texts)
    for _ in range(30):
        places = [draw.randrange(5) for _ in range(5)]
        texts = [[*texts[place], grown(1, texts[place], draw)] for place in places]
        counts.clear()
        assert ask(processor, [[7]] * 5, texts) == [expected(1, text) for text in texts]
        assert counts["accept"] == 5
        assert counts["fork"] <= 5 - len(set(places))
        assert counts["rollback"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_shown_a_row_gets_what_its_text_allows(seed: int) -> None:
    """Rows grow, jump, go back, end, show padding and foreign tokens; some calls show some of the rows only."""
    draw = random.Random(seed)
    salts, prompts = [1, 2, 1], [[7, 7, 3], [PAD, 7, 3], [PAD, PAD, 9]]
    one, two = Counted(1, Counter()), Counted(2, Counter())
    processor = ConstraintProcessor([one, two, one], torch.tensor(prompts), EOS)
    texts: list[list[int]] = [[], [], []]
    for _ in range(90):
        n = len(texts[0])
        move = draw.choice(["grow", "grow", "grow", "back", "jump", "odd"])
        for row, text in enumerate(texts):
            if move == "back":
                del text[draw.randrange(n + 1) if row == 0 else len(texts[0]) :]
            elif move == "jump" and n:
                texts[row] = texts[draw.choice([r for r in range(3) if salts[r] == salts[row]])].copy()
            else:
                strange = draw.choice([*EOS, PAD, 66]) if move == "odd" and row == 1 else None
                text.append(grown(salts[row], text, draw) if strange is None else strange)
        rows = [0, 1, 2] if draw.random() < 0.8 else sorted(draw.sample(range(3), draw.choice([1, 2])))
        found = ask(processor, [prompts[row] for row in rows], [texts[row] for row in rows])
        assert found == [expected(salts[row], texts[row]) for row in rows]
    assert one.text == two.text == ()


def test_rows_belong_to_prompts_by_place_where_prompts_are_equal() -> None:
    one, two = Counted(1, Counter()), Counted(2, Counter())
    prompts = [[7], [7]]
    processor = ConstraintProcessor([one, two], torch.tensor(prompts), EOS)
    assert ask(processor, [[7]] * 4, [[]] * 4) == [expected(salt, []) for salt in (1, 1, 2, 2)]
    with pytest.raises(GenerationError, match=r"row 0 whose grammar is not known[\s\S]*equal to its own") as caught:
        ask(processor, [[7]] * 2, [[4]] * 2)
    assert caught.value.rows == (0,)


def test_a_row_of_a_foreign_prompt_is_refused() -> None:
    one, two = Counted(1, Counter()), Counted(2, Counter())
    processor = ConstraintProcessor([one, two], torch.tensor([[7], [8]]), EOS)
    assert ask(processor, [[8], [7], [8]], [[]] * 3) == [expected(salt, []) for salt in (2, 1, 2)]
    with pytest.raises(GenerationError, match=r"row 1 whose grammar is not known[\s\S]*none of the call's") as caught:
        ask(processor, [[7], [9]], [[2], [2]])
    assert (caught.value.rows, caught.value.step) == ((1,), 1)


def test_rows_without_a_grammar_are_left_alone() -> None:
    processor = ConstraintProcessor([None, Counted(2, Counter())], torch.tensor([[7], [8]]), EOS)
    everything = set(range(V))
    assert ask(processor, [[7], [8]], [[], []]) == [everything, expected(2, [])]
    assert ask(processor, [[7], [8]], [[66], [PAD]]) == [everything, set()]


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [([], [], 0), ([1], [], 0), ([1, 2, 3], [1, 2, 4, 5], 2), ([1, 2], [1, 2, 3], 2), ([2], [1], 0)],
)
def test_shared_counts_the_equal_tokens_at_the_beginning(a: list[int], b: list[int], common: int) -> None:
    assert shared(a, b) == shared(b, a) == common
    long = list(range(100))
    for i in range(100):
        assert shared(long, [*long[:i], -1, *long[i:]]) == i
