"""What a call may say, what is refused, and what comes back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pluglm_decoding_standard
import pytest
import torch
from pluglm_decoding_blocks import criteria, loop
from pluglm_decoding_blocks.rng import row_seeds
from pluglm_decoding_blocks.rows import DeviceRows

from pluglm.contracts import DecodingRequest, GenerationConfig, GenerationOutput, Placed
from pluglm.errors import ContextLengthError, GenerationError, InputError, UnsupportedRequestError
from pluglm.testing.decoding import LONG, SHORT, Recorder, after, never_ends, text
from pluglm.testing.scripted_model import CERTAIN, ScriptedModel

V = 23


def build(name: str, **changes: Any) -> Any:
    provider = getattr(pluglm_decoding_standard, name)
    return provider.pluglm_build_decoding(
        request=DecodingRequest(**{"vocab_size": V, "device": "cpu", "decode": text, **changes})
    )


def run(name: str, model: Any = None, ids: Sequence[Sequence[int]] = (LONG,), **call: Any) -> GenerationOutput:
    arguments = {k: call.pop(k) for k in list(call) if k in ARGUMENTS}
    config = GenerationConfig().updated(**{"max_new_tokens": 5, "pad_token_id": 0, **call})
    output = build(name)(
        model or ScriptedModel(V, never_ends),
        torch.tensor(ids, dtype=torch.int64),
        generation_config=config,
        **arguments,
    )
    assert isinstance(output, GenerationOutput)
    return output


ARGUMENTS = (
    "attention_mask", "past_key_values", "use_cache", "position_ids", "streamer", "logits_processor", "stopping_criteria",
    "inputs_embeds", "a_hint",
)  # fmt: skip


def test_greedy_takes_the_best_token_each_time() -> None:
    model = ScriptedModel(V)
    history = LONG
    for token in run("greedy", model).completion(0):
        scores = model.scores(history)
        assert token == scores.index(max(scores))
        history = (*history, token)


def test_greedy_refuses_what_sampling_honours_and_names_it() -> None:
    with pytest.raises(UnsupportedRequestError) as caught:
        run("greedy", temperature=0.5, top_k=3, num_beams=2)
    assert (
        'temperature=0.5 is not honoured: it always takes the most likely token; decoding="sampling" honours it'
        in str(caught.value)
    )
    assert len(caught.value.reasons) == 3
    assert "max_new_tokens" in caught.value.fix


def test_greedy_refuses_several_sequences_of_one_prompt() -> None:
    with pytest.raises(UnsupportedRequestError, match="would be the same"):
        run("greedy", num_return_sequences=2)


def test_a_seed_on_greedy_changes_nothing() -> None:
    assert run("greedy", seed=1).completion(0) == run("greedy", seed=2).completion(0) == run("greedy").completion(0)


def test_a_misspelt_field_is_answered_with_the_right_one() -> None:
    with pytest.raises(UnsupportedRequestError, match='did you mean "stop_strings"'):
        run("sampling", stop_string="x")


@pytest.mark.parametrize(
    ("call", "said"),
    (
        ({"max_new_tokens": None}, "how long the completion may be"),
        ({"min_new_tokens": 9}, "min_new_tokens=9 is more than max_new_tokens=5"),
        ({"stop_strings": [""]}, "a stop string is empty"),
        ({"eos_token_id": V}, f"eos_token_id=.*outside the vocabulary of {V}"),
        ({"pad_token_id": -1}, "pad_token_id=-1 is outside"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size=0 makes no sense"),
        ({"return_logprobs": "yes"}, "return_logprobs='yes' makes no sense"),
        ({"max_new_tokens": None, "max_length": 4}, "max_length=4 leaves no room: the prompt of row 0 has 4 tokens"),
        ({"ids": [[V]]}, f"token id {V} is outside the vocabulary of {V}"),
        ({"ids": [[]]}, "the prompt is empty"),
        ({"ids": [1, 2]}, r"input_ids has shape \(2,\)"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\) for input_ids of shape \(1, 4\)"),
        ({"attention_mask": torch.full((1, 4), 2)}, "with 1 for a token and 0 for padding"),
        ({"inputs_embeds": torch.ones(1, 4, 2)}, "inputs_embeds cannot be continued from"),
        ({"use_cache": False, "prefill_chunk_size": 2}, "prefill_chunk_size needs a cache"),
        ({"use_cache": False, "past_key_values": 1}, "use_cache=False says not to use it"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense_is_refused(call: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run("sampling", **call)


def test_options_and_variants_are_refused() -> None:
    with pytest.raises(UnsupportedRequestError, match="variant 'fast' is not known"):
        build("greedy", variant="fast")


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        build("greedy", decode=None)(
            ScriptedModel(V),
            torch.tensor([LONG]),
            generation_config=GenerationConfig(max_new_tokens=1, stop_strings=("x",)),
        )


def test_an_empty_prompt_starts_with_bos() -> None:
    output = run("greedy", ids=[[]], bos_token_id=2)
    assert output.sequences[0, 0] == 2
    assert output.prompt_length == 1


def test_max_length_counts_each_rows_own_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    output = run("greedy", ids=[LONG, (0, 0, *SHORT)], attention_mask=mask, max_new_tokens=None, max_length=6)
    assert output.num_new_tokens == (2, 4)
    assert output.finish_reasons == ("length", "length")


def test_min_new_tokens_holds_back_end_tokens_and_stop_strings() -> None:
    output = run("greedy", ScriptedModel(V, lambda h: {1: CERTAIN}), eos_token_id=1, min_new_tokens=3, max_new_tokens=9)
    assert output.num_new_tokens == (4,)
    assert 1 not in output.completion(0)[:3]
    output = run("greedy", ScriptedModel(V, lambda h: {len(h): CERTAIN}), stop_strings="e", min_new_tokens=3)
    assert text(output.completion(0)) == "efg"
    assert output.finish_reasons == ("stop",)


def test_logprobs_are_the_models_own() -> None:
    model = ScriptedModel(V, never_ends)
    output = run("sampling", model, temperature=0.3, top_k=4, repetition_penalty=1.5, seed=3, return_logprobs=True)
    history = LONG
    assert output.logprobs is not None
    for token, logprob in zip(output.completion(0), output.logprobs[0], strict=True):
        assert logprob == pytest.approx(float(torch.tensor(model.scores(history)).log_softmax(-1)[token]), abs=1e-5)
        history = (*history, token)


@pytest.mark.parametrize("operations", (frozenset({"repeat"}), frozenset()))
def test_sequences_of_one_prompt_differ_and_are_those_of_its_repetition(operations: frozenset[str]) -> None:
    model = ScriptedModel(V, never_ends, operations=operations)
    several = run("sampling", model, ids=[LONG, LONG[::-1]], num_return_sequences=3, seed=5)
    repeated = run("sampling", ids=[LONG] * 3 + [LONG[::-1]] * 3, seed=5)
    assert torch.equal(several.sequences, repeated.sequences)
    assert len({tuple(several.completion(row)) for row in range(3)}) == 3


def test_a_row_can_be_drawn_again_alone_with_the_seed_derived_for_it() -> None:
    batch = run("sampling", ids=[LONG] * 4, seed=11)
    for row, seed in enumerate(row_seeds(11, 4)):
        assert run("sampling", seed=(seed % 2**64,)).completion(0) == batch.completion(row)


def test_as_many_seeds_as_rows_are_needed() -> None:
    with pytest.raises(InputError, match="there are 2 seeds for 1 rows"):
        run("sampling", seed=(1, 2))


@pytest.mark.parametrize("name", ("greedy", "sampling"))
@pytest.mark.parametrize("side", (1, -1))
def test_without_a_cache_the_tokens_are_the_same(name: str, side: int) -> None:
    rows, mask = [LONG, (0, 0, *SHORT)], torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    if side == 1:
        rows, mask = [LONG, (*SHORT, 0, 0)], torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    cached = run(name, ids=rows, attention_mask=mask, seed=(1, 2))
    plain = run(name, ids=rows, attention_mask=mask, seed=(1, 2), use_cache=False)
    assert torch.equal(cached.sequences, plain.sequences)


def test_a_cache_that_leaves_nothing_to_feed_is_refused() -> None:
    model = ScriptedModel(V, never_ends)
    cache = model.new_cache(batch_size=1)
    run("greedy", model, past_key_values=cache, max_new_tokens=3)
    with pytest.raises(InputError, match="holds 6 cells and input_ids has 4: no new token is left to feed"):
        run("greedy", model, past_key_values=cache)


def test_caches_that_do_not_fit_are_refused() -> None:
    model = ScriptedModel(V, never_ends)
    with pytest.raises(InputError, match="holds 2 rows, the prompt has 1"):
        run("greedy", model, past_key_values=model.new_cache(batch_size=2))
    with pytest.raises(ContextLengthError, match="holds 5 cells a row; prompt and new tokens need 8"):
        run("greedy", model, past_key_values=model.new_cache(batch_size=1, capacity=5))
    run("greedy", model, past_key_values=model.new_cache(batch_size=1, capacity=8))
    with pytest.raises(InputError, match="cannot repeat its rows"):
        run(
            "sampling",
            model,
            past_key_values=ScriptedModel(V, operations=frozenset()).new_cache(batch_size=1),
            num_return_sequences=2,
        )


def test_a_row_that_brings_only_padding_to_a_given_cache_is_refused() -> None:
    model = ScriptedModel(V, never_ends)
    cache = model.new_cache(batch_size=2)
    run("greedy", model, ids=[LONG, LONG], past_key_values=cache, max_new_tokens=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    with pytest.raises(InputError, match="row 1 has no token after the 4 cells"):
        run("greedy", model, ids=[(*LONG, 3), (*LONG, 0)], attention_mask=mask, past_key_values=cache)


def test_rows_that_ended_leave_holes_in_a_given_cache_and_can_go_on() -> None:
    model = ScriptedModel(V, after(len(LONG) + 1, 1))
    cache = model.new_cache(batch_size=2)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    output = run(
        "greedy", model, ids=[LONG, (0, 0, *SHORT)], attention_mask=mask, past_key_values=cache, eos_token_id=1
    )
    kept = [(*LONG, *output.completion(0)), (*SHORT, *output.completion(1)[:-1])]
    assert [cache.history(row, cache.length) for row in range(2)] == kept
    assert cache.length == output.sequences.shape[1] - 1


def test_further_arguments_reach_every_forward_pass() -> None:
    seen = []

    class Curious(ScriptedModel):
        def __call__(self, *args: Any, a_hint: bool = False, **kwargs: Any) -> Any:
            seen.append(a_hint)
            return super().__call__(*args, **kwargs)

    output = run("greedy", Curious(V, never_ends), a_hint=True)
    assert seen == [True] * 5
    assert output.completion(0) == run("greedy").completion(0)


def test_position_ids_of_the_prompt_are_passed_on_in_chunks() -> None:
    output = run("greedy", position_ids=torch.tensor([[2, 3, 4, 5]]), prefill_chunk_size=3)
    assert output.completion(0) == run("greedy").completion(0)


def test_all_tokens_forbidden_is_an_error_of_its_own() -> None:
    with pytest.raises(GenerationError, match=r"every token is forbidden for row 0 at new token 0") as caught:
        run("sampling", logits_processor=[lambda ids, scores: scores.fill_(-torch.inf)])
    assert caught.value.rows == (0,)


def test_a_processor_cannot_hide_that_logits_are_no_numbers() -> None:
    def hides(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.nan_to_num(0.0)

    for name in ("greedy", "sampling"):
        with pytest.raises(GenerationError, match="not finite numbers, so no token was chosen"):
            run(name, ScriptedModel(V, lambda h: {3: float("nan")}), logits_processor=[hides])


@pytest.mark.parametrize("name", ("greedy", "sampling"))
def test_engines_rows_get_the_tokens_of_their_own_calls(name: str) -> None:
    settings = (
        [
            {"eta_cutoff": 0.2, "top_h": 0.7},
            {"temperature": 0.6, "top_k": 7},
            {"top_p": 0.8, "typical_p": 0.7},
            {"min_p": 0.1, "temperature": 1.5, "epsilon_cutoff": 0.05},
        ]
        if name == "sampling"
        else [{}] * 4
    )
    prompts = [LONG, SHORT, (2, 3, 4), (9,)]
    expected = [
        run(name, ids=[prompt], seed=100 + row, max_new_tokens=8, **said).completion(0)
        for row, (prompt, said) in enumerate(zip(prompts, settings, strict=True))
    ]
    strategy, model = build(name), ScriptedModel(V, never_ends)
    configs = [GenerationConfig().updated(**said) for said in settings]
    rows = [list(prompt) for prompt in prompts]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0], [1, 3], [0], [1, 2, 3]) * 8:
        made = [len(rows[r]) - len(prompts[r]) for r in order]
        tokens = strategy.select(
            torch.tensor([model.scores(tuple(rows[r])) for r in order]), [configs[r] for r in order],
            torch.tensor([100 + r for r in order]), torch.tensor(made),
        )  # fmt: skip
        for r, token in zip(order, tokens.tolist(), strict=True):
            rows[r].append(token)
    for row, prompt in enumerate(prompts):
        assert rows[row][len(prompt) :][:8] == expected[row]


def test_engines_rows_with_other_fields_or_no_numbers_are_refused() -> None:
    one = (torch.tensor([0]), torch.tensor([4]))
    with pytest.raises(UnsupportedRequestError, match="temperature"):
        build("greedy").select(torch.zeros(1, V), [GenerationConfig(temperature=0.5)], *one)
    for said in ({"watermarking_config": 1}, {"guidance_scale": 2.0}):
        with pytest.raises(UnsupportedRequestError, match=next(iter(said))):
            build("sampling").select(torch.zeros(1, V), [GenerationConfig(extra=said)], *one)
    with pytest.raises(GenerationError, match="row 0 at new token 4"):
        build("sampling").select(torch.full((1, V), float("nan")), [GenerationConfig()], *one)


def test_time_that_is_up_ends_every_row_after_the_next_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(criteria.time, "monotonic", lambda: next(clock))
    for name in ("greedy", "sampling"):
        output = run(name, ids=[LONG, LONG[::-1]], max_time=2.5, max_new_tokens=9, seed=1)
        assert output.num_new_tokens == (3, 3)
        assert output.finish_reasons == ("stop", "stop")


def test_what_is_recorded_is_what_was_asked_for_and_is_a_copy() -> None:
    class Reusing(ScriptedModel):
        """Gives the same buffer at every step."""

        def step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits = super().step(*args, **kwargs)
            self.buffer = getattr(self, "buffer", torch.empty_like(logits))
            return self.buffer.copy_(logits)

    model = Reusing(V, never_ends)
    for name, said in (("greedy", {}), ("sampling", {"seed": 1}), ("sampling", {"seed": 1, "top_k": 5})):
        output = run(name, model, output_scores=True, output_logits=True, **said)
        assert output.scores is not None
        assert output.logits is not None
        assert output.hidden_states is None
        text_so_far = LONG
        for scores, logits, token in zip(output.scores, output.logits, output.completion(0), strict=True):
            expected = torch.tensor([model.scores(text_so_far)])
            assert torch.equal(logits, expected)
            kept = int((scores > -torch.inf).sum())
            assert kept == said.get("top_k", V)
            assert scores.dtype == torch.float32
            text_so_far = (*text_so_far, token)
    plain = run("greedy")
    assert (plain.scores, plain.logits, plain.hidden_states) == (None, None, None)


def test_a_text_that_the_callers_function_allows_nothing_to_follow_fails_by_its_row() -> None:
    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        assert ids.tolist()[: 2 + batch] == [[5, 7], [6, 8, 9]][batch], "padding is left out"
        return [] if batch == 1 and len(ids) == 5 else [3, 4]

    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(GenerationError, match="every token is forbidden for row 1 at new token 2") as caught:
        run("greedy", ids=[(0, 5, 7), (6, 8, 9)], attention_mask=mask, prefix_allowed_tokens_fn=allowed)
    assert "prefix_allowed_tokens_fn" in caught.value.fix


def test_a_placed_processor_stands_among_the_filters_of_a_call() -> None:
    def only_the_last(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([V - 1]), 50.0)

    first = run("sampling", top_k=1, logits_processor=[Placed(only_the_last, before="top_k")], seed=1)
    assert first.completion(0) == [V - 1] * 5
    late = run("sampling", top_k=2, logits_processor=[Placed(only_the_last, after="top_k")], output_scores=True, seed=1)
    assert late.scores is not None
    assert [int((scores > -torch.inf).sum()) for scores in late.scores] == [3] * 5


class TestOnAnAccelerator:
    """The bookkeeping that reads its flags one step late, run on the CPU."""

    @pytest.fixture(autouse=True)
    def late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loop, "make_rows", lambda job, device: DeviceRows(job.settings, job.limits, device))

    def test_rows_end_where_they_end_on_the_host(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def calls() -> list[GenerationOutput]:
            mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
            batch: dict[str, Any] = {"ids": [LONG, (0, 0, *SHORT)], "attention_mask": mask}
            ends = [lambda ids, scores: ids[:, -1] % 5 == 0]
            return [
                run("greedy", ScriptedModel(V, after(6, 1)), eos_token_id=1, max_new_tokens=9, **batch),
                run("sampling", seed=2, stopping_criteria=ends, max_new_tokens=30, **batch),
                run("greedy", max_new_tokens=None, max_length=7, **batch),
                run("greedy", max_new_tokens=0),
            ]

        late = calls()
        monkeypatch.undo()
        for a, b in zip(late, calls(), strict=True):
            assert torch.equal(a.sequences, b.sequences)
            assert (a.num_new_tokens, a.finish_reasons) == (b.num_new_tokens, b.finish_reasons)

    def test_no_step_too_many_is_recorded(self) -> None:
        output = run("greedy", ScriptedModel(V, after(6, 1)), eos_token_id=1, max_new_tokens=9, output_scores=True)
        assert output.scores is not None
        assert len(output.scores) == output.num_new_tokens[0] == 3

    def test_the_step_too_many_is_taken_back_from_a_given_cache(self) -> None:
        model = ScriptedModel(V, after(6, 1))
        cache = model.new_cache(batch_size=1)
        output = run("greedy", model, past_key_values=cache, eos_token_id=1, max_new_tokens=9)
        assert output.num_new_tokens == (3,)
        assert len(model.fed) == 4
        assert cache.history(0, cache.length) == tuple(output.sequences[0, :-1].tolist())

    @pytest.mark.parametrize("at", (len(LONG), len(LONG) + 4))
    def test_scores_that_are_no_numbers_still_fail_the_call(self, at: int) -> None:
        model = ScriptedModel(V, lambda h: {3: float("nan")} if len(h) == at else {1: -CERTAIN})
        with pytest.raises(GenerationError, match=f"row 0 at new token {at - len(LONG)} are not finite") as caught:
            run("greedy", model)
        assert caught.value.rows == (0,)


def test_the_streamer_gets_the_tokens_of_sampled_rows_too() -> None:
    streamer = Recorder()
    output = run("sampling", num_return_sequences=2, seed=1, streamer=streamer)
    assert torch.equal(torch.tensor(streamer.steps).T, output.sequences[:, output.prompt_length :])


def test_the_seeded_distribution_of_calls_is_the_models() -> None:
    n = 400
    model = ScriptedModel(V, lambda h: dict.fromkeys(range(4, V), -CERTAIN))
    output = run("sampling", model, ids=[LONG] * n, max_new_tokens=1, seed=0)
    counts = torch.bincount(output.sequences[:, -1], minlength=4)[:4]
    expected = torch.tensor(model.scores(LONG)[:4]).softmax(-1) * n
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # 3 degrees of freedom, p = 0.001
