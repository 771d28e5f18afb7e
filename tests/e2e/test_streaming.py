"""Text as it is made: one prompt, batches, event loops; and what else a call may bring: generators, bars, healing."""

from __future__ import annotations

import asyncio
import io
import re
from collections import defaultdict
from collections.abc import Iterable

import pytest
import torch

import pluglm
from pluglm import InputError, Piece, token_bar
from pluglm.checkpoint import progress

PROMPTS = ["the cat", "hello world , how are you", "a book"]


def joined(pieces: Iterable[Piece]) -> dict[int, str]:
    texts: dict[int, str] = defaultdict(str)
    for piece in pieces:
        assert piece.text, "no empty pieces"
        texts[piece.row] += piece.text
    return texts


def test_the_pieces_of_each_row_of_a_batch_are_what_generate_returns(lm: pluglm.LanguageModel) -> None:
    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    texts = joined(lm.stream_batch(PROMPTS, **settings))
    assert [texts[row] for row in range(3)] == lm.generate(PROMPTS, **settings)


def test_rows_that_end_early_get_no_more_pieces(lm: pluglm.LanguageModel) -> None:
    plain = lm.generate(PROMPTS, max_new_tokens=8)
    stop = plain[0][3:5]  # a stop string of one row, which others may hold later or never
    settings = {"max_new_tokens": 8, "stop_strings": [stop], "pad_token_id": 60}
    whole = lm.generate(PROMPTS, **settings)
    assert len({len(text) for text in whole}) > 1
    texts = joined(lm.stream_batch(PROMPTS, **settings))
    assert [texts[row] for row in range(3)] == whole


def test_several_sequences_of_one_prompt_are_rows_of_their_own(lm: pluglm.LanguageModel) -> None:
    settings = {"max_new_tokens": 9, "temperature": 1.0, "seed": 5, "num_return_sequences": 3}
    texts = joined(lm.stream_batch("the cat", **settings))
    assert [texts[row] for row in range(3)] == lm.generate("the cat", **settings)


def test_closing_a_stream_of_a_batch_stops_it(lm: pluglm.LanguageModel) -> None:
    fed: list[int] = []

    def count(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        fed.append(ids.shape[1])
        return scores

    pieces = lm.stream_batch(PROMPTS, max_new_tokens=150, eos_token_id=(), logits_processor=[count])
    next(pieces)
    pieces.close()
    assert len(fed) < 150


def test_an_event_loop_gets_the_same_text(lm: pluglm.LanguageModel) -> None:
    async def main() -> tuple[str, dict[int, str]]:
        one = [piece async for piece in lm.astream("the cat", max_new_tokens=7)]
        many = [piece async for piece in lm.astream_batch(PROMPTS, max_new_tokens=7)]
        return "".join(one), joined(many)

    one, many = asyncio.run(main())
    assert one == lm.generate("the cat", max_new_tokens=7)
    assert [many[row] for row in range(3)] == lm.generate(PROMPTS, max_new_tokens=7)


def test_a_stream_of_several_prompts_is_told_where_to_go(lm: pluglm.LanguageModel) -> None:
    with pytest.raises(InputError, match=r"(?s)carries one completion.*stream_batch") as caught:
        lm.stream(PROMPTS, max_new_tokens=3)
    assert caught.value.argument == "prompt"


def test_a_stream_refuses_a_streamer(lm: pluglm.LanguageModel) -> None:
    with pytest.raises(InputError, match="brings its own streamer"):
        lm.stream("the cat", max_new_tokens=3, streamer=Columns())


class Columns:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.ends = 0

    def put(self, token_ids: torch.Tensor) -> None:
        """[B]."""
        self.steps.append(token_ids.tolist())

    def end(self) -> None:
        """Count."""
        self.ends += 1


def test_a_streamer_of_the_callers_own_is_told_every_token(lm: pluglm.LanguageModel) -> None:
    streamer = Columns()
    done = lm.complete("the cat", max_new_tokens=5, streamer=streamer)
    assert isinstance(done, pluglm.Completion)
    assert [token for (token,) in streamer.steps] == list(done.token_ids)
    assert streamer.ends == 1


def test_what_is_no_streamer_is_refused(lm: pluglm.LanguageModel) -> None:
    with pytest.raises(InputError, match=r"(?s)streamer is a list.*put and end"):
        lm.generate("the cat", streamer=[])


# Draws


def test_a_torch_generator_gives_the_seed_and_goes_on(lm: pluglm.LanguageModel) -> None:
    def run(generator: torch.Generator) -> str | list[str]:
        return lm.generate("the cat", max_new_tokens=12, temperature=1.0, generator=generator)

    first, again = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    texts = [run(first), run(first)]
    assert [run(again), run(again)] == texts
    assert texts[0] != texts[1]


def test_seed_and_generator_together_are_refused(lm: pluglm.LanguageModel) -> None:
    with pytest.raises(InputError, match="seed and generator"):
        lm.generate("the cat", temperature=1.0, seed=1, generator=torch.Generator())
    with pytest.raises(InputError, match=r"generator is a int"):
        lm.generate("the cat", temperature=1.0, generator=3)


# A bar


def test_a_bar_counts_the_tokens_of_a_long_batch(lm: pluglm.LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress.sys, "stderr", screen)
    monkeypatch.setattr(token_bar, "WAIT_S", -1.0)
    streamer = Columns()
    text = lm.generate(PROMPTS, max_new_tokens=6, eos_token_id=(), progress=True, streamer=streamer)
    assert text == lm.generate(PROMPTS, max_new_tokens=6, eos_token_id=())
    assert "generating 3 rows" in screen.getvalue()
    assert re.search(r"6/6", screen.getvalue())
    assert len(streamer.steps) == 6
    assert streamer.ends == 1


def test_nothing_is_drawn_where_nobody_looks(lm: pluglm.LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    lm.generate(PROMPTS, max_new_tokens=3, progress=True)
    assert capsys.readouterr() == ("", "")


# Which strategy


def test_a_call_that_names_the_strategy_twice_is_refused(lm: pluglm.LanguageModel) -> None:
    with pytest.raises(InputError, match="both name what chooses"):
        lm.generate("the cat", decoding="greedy", custom_generate="greedy")


def test_a_repository_is_no_method_before_it_was_vendored(lm: pluglm.LanguageModel) -> None:
    with pytest.raises(InputError, match=r"pluglm vendor hub:acme/dream@<commit>") as caught:
        lm.generate("the cat", custom_generate="acme/dream")
    assert caught.value.argument == "custom_generate"


def test_the_strategy_of_a_call_is_within_reach(lm: pluglm.LanguageModel) -> None:
    assert lm.strategy("sampling").name == "sampling"
    assert lm.strategy("sampling") is lm.strategy("sampling")
    assert lm.strategy().name == "greedy"


# Token healing


def test_a_healed_prompt_is_continued_as_if_tokenised_whole(lm: pluglm.LanguageModel) -> None:
    tokenizer = lm.tokenizer
    assert tokenizer is not None
    texts = tokenizer.token_bytes()
    healed = lm.complete("the ca", max_new_tokens=5, token_healing=True)
    assert isinstance(healed, pluglm.Completion)
    ids = tokenizer.encode("the ca")
    tail = texts[ids[-1]]
    first = texts[healed.token_ids[0]]
    assert tail is not None
    assert first is not None
    assert first.startswith(tail)
    assert healed.num_prompt_tokens == len(ids) - 1
    assert tokenizer.decode(healed.token_ids) == tail.decode() + healed.text


def test_healing_rows_of_a_batch_is_healing_each_alone(lm: pluglm.LanguageModel) -> None:
    prompts = ["the ca", "hello wor", "a"]
    alone = [lm.generate(prompt, max_new_tokens=6, token_healing=True) for prompt in prompts]
    assert lm.generate(prompts, max_new_tokens=6, token_healing=True) == alone
    texts = joined(lm.stream_batch(prompts, max_new_tokens=6, token_healing=True))
    assert [texts[row] for row in range(3)] == alone


def test_healing_is_refused_where_it_cannot_be(lm: pluglm.LanguageModel) -> None:
    with pytest.raises(InputError, match=r"given cache holds the token"):
        lm.generate("the ca", token_healing=True, past_key_values=lm.new_cache())
    with pytest.raises(InputError, match=r"token_healing=1 makes no sense"):
        lm.generate("the ca", token_healing=1)
