"""The conformance kit for decoding strategies.

    class TestGreedy(DecodingContract):
        provider = pluglm_decoding_standard.greedy

Each test asks for what the strategy's `fields` say it honours, and is skipped where they do not.
Needs `pluglm[testing]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from pluglm.contracts import OPERATIONS, DecodingRequest, DecodingStrategy, GenerationConfig, GenerationOutput
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm.testing.scripted_model import CERTAIN, Script, ScriptedModel

#: Row 0, and a shorter row 1.
LONG, SHORT = (5, 7, 9, 11), (6, 8)
V, EOS, PAD = 23, 1, 0


def text(token_ids: Sequence[int]) -> str:
    """The kit's tokenizer: one letter a token, "a" for 0."""
    return "".join(chr(ord("a") + i) for i in token_ids)


def after(tokens: int, chosen: int) -> Script:
    """Certainly `chosen` once a row has this many real tokens; never the end token before."""
    return lambda history: {EOS: -CERTAIN, **({chosen: CERTAIN} if len(history) == tokens else {})}


def never_ends(_: tuple[int, ...]) -> dict[int, float]:
    """The end token is never chosen."""
    return {EOS: -CERTAIN}


class Recorder:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.ends = 0

    def put(self, token_ids: Tensor) -> None:
        """[B]."""
        self.steps.append(token_ids.tolist())

    def end(self) -> None:
        """Counted."""
        self.ends += 1


class DecodingContract:
    """Subclass it in a test file, as `Test…`. A test may be weakened only by `xfail(reason=…)`.

    Attributes:
        provider: what the entry point names: an object or module with `pluglm_build_decoding`.
        tells_each_token: a streamer hears of each token at once. False for searches, which tell what is certain.
    """

    provider: ClassVar[Any]
    tells_each_token: ClassVar[bool] = True

    def build(self, **changes: Any) -> DecodingStrategy:
        """The strategy, for the kit's vocabulary and tokenizer."""
        arguments: dict[str, Any] = {"vocab_size": V, "device": "cpu", "decode": text, **changes}
        strategy: DecodingStrategy = self.provider.pluglm_build_decoding(request=DecodingRequest(**arguments))
        return strategy

    def run(
        self, model: ScriptedModel, rows: Sequence[Sequence[int]] = (LONG,), *, side: str = "left", **call: Any
    ) -> GenerationOutput:
        """One call on rows that are padded on `side`. Keywords that are fields go to the GenerationConfig."""
        strategy = self.build()
        width = max(map(len, rows))
        ids, mask = [], []
        for row in rows:
            fill, ones = [PAD] * (width - len(row)), [1] * len(row)
            ids.append([*fill, *row] if side == "left" else [*row, *fill])
            mask.append([*fill, *ones] if side == "left" else [*ones, *fill])
        arguments = {name: call.pop(name) for name in list(call) if name in _ARGUMENTS}
        if any(0 in row for row in mask):
            arguments["attention_mask"] = torch.tensor(mask)
        config = GenerationConfig(eos_token_id=(EOS,), pad_token_id=PAD).updated(**{"max_new_tokens": 6, **call})
        if missing := set(call) - {"max_new_tokens"} - strategy.fields:
            pytest.skip(f"does not honour {', '.join(sorted(missing))}")
        output = strategy(model, torch.tensor(ids), generation_config=config, **arguments)
        assert isinstance(output, GenerationOutput)
        return output

    def seeded(self, *seeds: int) -> dict[str, Any]:
        """One seed a row, where the strategy draws."""
        return {"seed": seeds} if "seed" in self.build().fields else {}

    def test_it_says_what_it_is(self) -> None:
        strategy = self.build()
        assert isinstance(strategy, DecodingStrategy)
        assert strategy.name
        assert "max_new_tokens" in strategy.fields
        assert strategy.needs <= set(OPERATIONS)

    def test_options_that_it_does_not_know_are_refused(self) -> None:
        with pytest.raises(UnsupportedRequestError, match="no_such_option"):
            self.build(options=(("no_such_option", 1),))

    def test_without_an_end_token_it_makes_exactly_max_new_tokens(self) -> None:
        output = self.run(ScriptedModel(V, never_ends), max_new_tokens=7)
        assert output.num_new_tokens == (7,)
        assert output.finish_reasons == ("length",)
        assert output.sequences.shape == (1, len(LONG) + 7)
        assert output.sequences[0, : output.prompt_length].tolist() == list(LONG)

    def test_zero_new_tokens_give_the_prompt(self) -> None:
        output = self.run(ScriptedModel(V), max_new_tokens=0)
        assert output.sequences.tolist() == [list(LONG)]
        assert output.completion(0) == []

    def test_an_end_token_ends_its_row_and_the_rest_is_padding(self) -> None:
        output = self.run(ScriptedModel(V, after(len(LONG) + 2, EOS)), [LONG, SHORT], max_new_tokens=5)
        assert output.num_new_tokens[0] == 3
        assert output.finish_reasons[0] == "eos"
        assert output.completion(0)[-1] == EOS
        assert output.num_new_tokens[1] == 5
        assert set(output.sequences[0, len(LONG) + 3 :].tolist()) == {PAD}

    def test_a_stop_string_over_several_tokens_ends_its_row(self) -> None:
        script: Script = lambda h: {EOS: -CERTAIN, len(h) + 10: CERTAIN}  # noqa: E731 - o, p, q, r …
        output = self.run(ScriptedModel(V, script), max_new_tokens=6, stop_strings=("pqr", "zz"))
        assert text(output.completion(0)) == "opqr"
        assert output.finish_reasons == ("stop",)

    def test_a_stop_string_in_the_prompt_does_not_count(self) -> None:
        output = self.run(ScriptedModel(V, after(len(LONG), 12)), stop_strings=(text(LONG), text([LONG[-1], 12])))
        assert output.finish_reasons == ("length",)

    def test_the_callers_criterion_ends_a_row(self) -> None:
        def three_new(ids: Tensor, _: Tensor | None) -> Tensor:
            return torch.tensor([ids.shape[1] >= len(LONG) + 3])

        output = self.run(ScriptedModel(V, never_ends), stopping_criteria=[three_new])
        assert output.num_new_tokens == (3,)
        assert output.finish_reasons == ("stop",)

    def test_the_callers_processor_changes_what_is_chosen(self) -> None:
        def only_twenty(_: Tensor, scores: Tensor) -> Tensor:
            assert scores.dtype == torch.float32
            return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([20]), 0.0)

        output = self.run(ScriptedModel(V), logits_processor=[only_twenty], max_new_tokens=3)
        assert output.completion(0) == [20, 20, 20]

    def test_the_same_call_gives_the_same_tokens(self) -> None:
        first, second = (self.run(ScriptedModel(V, never_ends), **self.seeded(3)) for _ in range(2))
        assert first.completion(0) == second.completion(0)

    @pytest.mark.parametrize("side", ("left", "right"))
    def test_a_row_of_a_padded_batch_gets_the_tokens_it_gets_alone(self, side: str) -> None:
        batch = self.run(ScriptedModel(V), [LONG, SHORT, (2,)], side=side, max_new_tokens=9, **self.seeded(3, 4, 5))
        for row, prompt in enumerate((LONG, SHORT, (2,))):
            alone = self.run(ScriptedModel(V), [prompt], max_new_tokens=9, **self.seeded(3 + row))
            assert batch.completion(row) == alone.completion(0)
            assert batch.finish_reasons[row] == alone.finish_reasons[0]

    def test_every_token_goes_through_the_model_once(self) -> None:
        model = ScriptedModel(V, never_ends)
        self.run(model, max_new_tokens=5)
        assert sum(model.fed) <= len(LONG) + 5
        for cache in model.caches:
            assert cache.length <= len(LONG) + 5

    def test_a_given_cache_holds_what_was_seen_and_can_be_continued(self) -> None:
        model = ScriptedModel(V, never_ends)
        cache = model.new_cache(batch_size=1)
        output = self.run(model, max_new_tokens=3, past_key_values=cache)
        assert cache.length == output.sequences.shape[1] - 1
        assert cache.history(0, cache.length) == tuple(output.sequences[0, :-1].tolist())
        more = (*output.sequences[0].tolist(), 4)
        self.run(model, [more], max_new_tokens=2, past_key_values=cache)
        assert cache.history(0, len(more)) == more

    def test_chunks_of_the_prompt_change_nothing(self) -> None:
        whole = self.run(ScriptedModel(V), [LONG, SHORT], side="right", **self.seeded(1, 2))
        parts = self.run(ScriptedModel(V), [LONG, SHORT], side="right", prefill_chunk_size=1, **self.seeded(1, 2))
        assert torch.equal(whole.sequences, parts.sequences)

    def test_a_streamer_is_told_every_token_and_the_end(self) -> None:
        streamer = Recorder()
        output = self.run(ScriptedModel(V, after(len(LONG) + 1, EOS)), [LONG, SHORT], streamer=streamer)
        told = torch.tensor(streamer.steps).T  # [B, T]
        for row, count in enumerate(output.num_new_tokens):
            assert told[row, :count].tolist() == output.completion(row)
            assert (told[row, count:] == -1).all(), "a row that has ended is told as -1, which is no token"
        assert streamer.ends == 1

    def test_a_streamer_is_told_the_end_when_something_fails(self) -> None:
        def fails(*_: Tensor) -> Tensor:
            raise ZeroDivisionError

        streamer = Recorder()
        with pytest.raises(ZeroDivisionError):
            self.run(ScriptedModel(V), logits_processor=[fails], streamer=streamer)
        assert streamer.ends == 1

    def test_a_field_that_it_does_not_honour_is_refused_with_those_it_does(self) -> None:
        strategy = self.build()
        config = GenerationConfig(max_new_tokens=1, extra={"no_such_field": 1})
        with pytest.raises(UnsupportedRequestError, match="no_such_field") as caught:
            strategy(ScriptedModel(V), torch.tensor([LONG]), generation_config=config)
        assert caught.value.reasons
        assert "max_new_tokens" in str(caught.value)

    def test_a_row_of_padding_alone_is_refused(self) -> None:
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
        with pytest.raises(InputError, match="row 1"):
            self.build()(
                ScriptedModel(V), torch.tensor([LONG, LONG]), attention_mask=mask,
                generation_config=GenerationConfig(max_new_tokens=1),
            )  # fmt: skip

    def test_scores_that_are_no_numbers_give_an_error_and_no_token(self) -> None:
        def script(h: tuple[int, ...]) -> dict[int, float]:
            return {**never_ends(h), **({4: float("nan")} if len(h) == len(LONG) + 1 else {})}

        streamer = Recorder()
        with pytest.raises(Exception, match=r"NaN|not finite") as caught:
            self.run(ScriptedModel(V, script), [SHORT, LONG], streamer=streamer, max_new_tokens=3)
        assert getattr(caught.value, "rows", None) == (1,)
        assert len(streamer.steps) == (1 if self.tells_each_token else 0)

    def test_nothing_is_inspected_while_tokens_are_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def looked_up(tokens: int) -> int:
            calls: list[int] = []
            real = inspect.signature

            def counted(*args: Any, **kwargs: Any) -> inspect.Signature:
                calls.append(1)
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(inspect, "signature", counted)
                self.run(ScriptedModel(V, never_ends), max_new_tokens=tokens)
            return len(calls)

        looked_up(2)
        assert looked_up(2) == looked_up(12)


_ARGUMENTS = (
    "logits_processor", "stopping_criteria", "streamer", "past_key_values", "use_cache", "position_ids",
)  # fmt: skip
