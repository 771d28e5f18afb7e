"""Several tokens from one call of the executor: the same completions, and only where nobody needs to see each of them."""

from __future__ import annotations

from typing import Any

import pluglm_decoding_standard
import pytest
import torch
from pluglm_decoding_blocks import ahead
from pluglm_decoding_blocks.draw import draw as drawn
from pluglm_decoding_blocks.rng import uniforms
from pluglm_decoding_blocks.warpers import Warpers

from pluglm import GenerationError
from pluglm.contracts import Decoded, DecodeRun, DecodingRequest, GenerationConfig
from pluglm.testing.decoding import EOS, LONG, SHORT, Recorder, V, after, never_ends, text
from pluglm.testing.scripted_model import CERTAIN, Script, ScriptedModel


class Executor:
    """Decodes ahead by passes of the model. hands_over: the logits of every so manieth token; declines: from then on."""

    name = "scripted"

    def __init__(self, model: ScriptedModel, *, hands_over: int = 0, declines: int = 10**9) -> None:
        self.model, self.hands_over, self.declines, self.runs = model, hands_over, declines, list[int]()
        self.tokens = 0

    def run(self, inputs: Any) -> Any:
        raise NotImplementedError

    def decode(self, run: DecodeRun) -> Decoded | None:
        assert run.count > 0
        if len(self.runs) >= self.declines:
            return None
        self.runs.append(run.count)
        rows, ended = len(run.token_ids), torch.tensor(run.ended or [False] * len(run.token_ids))
        made: list[torch.Tensor] = []
        last = run.token_ids
        while len(made) < run.count:
            at = run.cache.next_positions(1)
            if run.holes:
                at = torch.where(ended[:, None], -1, at)
            logits = self.model.step(last, run.cache, positions=at)[:, -1]  # type: ignore[arg-type]
            self.tokens += 1
            unsure = self.hands_over and self.tokens % self.hands_over == 0
            if unsure or not logits.amax(-1)[~ended].isfinite().all():
                return Decoded(torch.stack(made, 1) if made else torch.empty(rows, 0, dtype=torch.int64), logits)
            made.append(self.chosen(run, logits, len(made)).masked_fill(ended, run.pad))
            last = made[-1][:, None]
            if any(int(t) in run.ends for t, over in zip(made[-1], ended, strict=True) if not over):
                break
        return Decoded(torch.stack(made, 1))

    def chosen(self, run: DecodeRun, logits: torch.Tensor, i: int) -> torch.Tensor:
        if (draw := run.draw) is None:
            return logits.argmax(-1)
        how = GenerationConfig(temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p, min_p=draw.min_p)
        scores = Warpers([how], logits.device)(logits)
        return drawn(scores, uniforms(torch.tensor(draw.seeds), torch.tensor(draw.first + i)))


def build(name: str) -> Any:
    provider = getattr(pluglm_decoding_standard, name)
    return provider.pluglm_build_decoding(request=DecodingRequest(vocab_size=V, device="cpu", decode=text))


def call(
    name: str, script: Script | None, *, executor: dict[str, Any] | None = None, prompts: Any = ([*LONG],),
    arguments: dict[str, Any] | None = None, **said: Any,
) -> tuple[Any, ScriptedModel]:  # fmt: skip
    """One call on prompts padded on the left. executor: how it decodes ahead; None: it does not."""
    model: Any = ScriptedModel(V, script)
    if executor is not None:
        model.executor = Executor(model, **executor)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + [*p] for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = GenerationConfig(**{"max_new_tokens": 20, "eos_token_id": (EOS,), "pad_token_id": 0, **said})
    return build(name)(model, ids, attention_mask=mask, generation_config=config, **(arguments or {})), model


def ends_at(length: int) -> Script:
    """The end token once a row has this many tokens of its own; rows of other lengths end at other steps."""
    return after(length, EOS)


HOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("greedy", {}),
    "drawn": ("sampling", {"seed": 3}),
    "filtered": ("sampling", {"seed": 3, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01}),
    "copies": ("sampling", {"seed": (4, 5, 6), "num_return_sequences": 3}),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("script", [never_ends, ends_at(13), None])
@pytest.mark.parametrize("executor", [{}, {"hands_over": 5}, {"declines": 2}])
def test_completions_are_those_of_single_passes(how: str, script: Any, executor: dict[str, Any]) -> None:
    name, said = HOWS[how]
    for prompts in ([LONG], [LONG, SHORT, LONG[::-1]]):
        if how == "copies" and len(prompts) > 1:
            continue
        want, plain = call(name, script, prompts=prompts, **said)
        got, model = call(name, script, prompts=prompts, executor=executor, **said)
        assert torch.equal(got.sequences, want.sequences)
        assert (got.num_new_tokens, got.finish_reasons) == (want.num_new_tokens, want.finish_reasons)
        assert model.caches[-1].length == plain.caches[-1].length
        assert model.executor.runs  # type: ignore[attr-defined]
        if executor == {} and script is never_ends:
            assert sum(model.executor.runs) == 19  # type: ignore[attr-defined] # the first token is the prompt's


def test_limits_of_each_row_end_it_at_its_own_token() -> None:
    want, _ = call("greedy", never_ends, prompts=[LONG, SHORT], max_new_tokens=None, max_length=12)
    got, _ = call("greedy", never_ends, prompts=[LONG, SHORT], max_new_tokens=None, max_length=12, executor={})
    assert got.num_new_tokens == want.num_new_tokens == (8, 10)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("prompts", [[LONG], [LONG, SHORT]])
def test_a_given_cache_goes_on_in_a_second_turn(prompts: Any) -> None:
    outputs = []
    for executor in (None, {}):
        model: Any = ScriptedModel(V, lambda history: {EOS: CERTAIN if len(history) in (9, 21) else -CERTAIN})
        if executor is not None:
            model.executor = Executor(model)
        cache = model.new_cache(batch_size=len(prompts), capacity=60)
        first, _ = turn(model, cache, torch.tensor([[0] * (4 - len(p)) + [*p] for p in prompts]), prompts)
        more = torch.cat((first.sequences, torch.full((len(prompts), 2), 5)), dim=1)
        second, cells = turn(model, cache, more, None)
        outputs.append((first.sequences.tolist(), second.sequences.tolist(), cells))
    assert outputs[0] == outputs[1]


def turn(model: Any, cache: Any, ids: torch.Tensor, prompts: Any) -> tuple[Any, Any]:
    """One call of greedy with a cache, and the cache's positions after it."""
    mask = torch.ones_like(ids)
    if prompts is not None:
        mask = torch.tensor([[0] * (4 - len(p)) + [1] * len(p) for p in prompts])
    elif len(ids) > 1:
        kept = cache.positions >= 0
        mask[:, : kept.shape[1]] = kept
    config = GenerationConfig(max_new_tokens=12, eos_token_id=(EOS,), pad_token_id=0)
    output = build("greedy")(model, ids, attention_mask=mask, past_key_values=cache, generation_config=config)
    return output, cache.positions.tolist()


def test_a_streamer_hears_of_every_step_in_order_and_soon() -> None:
    one, two = Recorder(), Recorder()
    want, _ = call("greedy", ends_at(13), prompts=[LONG, SHORT], arguments={"streamer": one})
    got, model = call("greedy", ends_at(13), prompts=[LONG, SHORT], arguments={"streamer": two}, executor={})
    assert one.steps == two.steps
    assert torch.equal(got.sequences, want.sequences)
    assert max(model.executor.runs) <= ahead.MOST_STREAMED  # type: ignore[attr-defined]


def test_a_slow_model_is_asked_for_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.125
        return now[0]

    monkeypatch.setattr(ahead, "perf_counter", clock)  # a run of one token takes an eighth of a second, as one of four
    _, model = call("greedy", never_ends, executor={}, max_new_tokens=12)
    assert model.executor.runs == [1, 4, 6]  # type: ignore[attr-defined]


def test_scores_that_are_not_finite_are_the_error_they_always_are() -> None:
    def broken(history: tuple[int, ...]) -> dict[int, float]:
        return {EOS: -CERTAIN, **({7: float("nan")} if len(history) == 9 else {})}

    said = []
    for executor in (None, {}):
        with pytest.raises(GenerationError) as caught:
            call("greedy", broken, executor=executor)
        said.append((str(caught.value), caught.value.rows, caught.value.step))
    assert said[0] == said[1]


SEEN: dict[str, dict[str, Any]] = {
    "processors": {"arguments": {"logits_processor": [lambda ids, scores: scores]}},
    "criteria": {"arguments": {"stopping_criteria": [lambda ids, _: torch.zeros(1, dtype=torch.bool)]}},
    "no cache": {"arguments": {"use_cache": False}},
    "time": {"extra": {"max_time": 100.0}},
    "stop strings": {"stop_strings": ("zz",)},
    "log-probabilities": {"extra": {"return_logprobs": True}},
    "scores": {"extra": {"output_scores": True}},
    "logits": {"extra": {"output_logits": True}},
    "hidden states": {"extra": {"output_hidden_states": True}},
    "penalty": {"repetition_penalty": 1.2},
    "least length": {"min_new_tokens": 3},
    "guidance": {"extra": {"guidance_scale": 1.5}},
}


@pytest.mark.parametrize("what", SEEN)
def test_whoever_looks_at_every_token_is_shown_every_token(what: str) -> None:
    said = {"max_new_tokens": 6, **SEEN[what]}
    want, _ = call("greedy", never_ends, **said)
    got, model = call("greedy", never_ends, executor={}, **said)
    assert torch.equal(got.sequences, want.sequences)
    assert model.executor.runs == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("said", [{"extra": {"typical_p": 0.9}}, {"extra": {"top_h": 0.5}}])
def test_filters_that_executors_do_not_have_go_pass_by_pass(said: dict[str, Any]) -> None:
    want, _ = call("sampling", never_ends, seed=1, **said)
    got, model = call("sampling", never_ends, executor={}, seed=1, **said)
    assert torch.equal(got.sequences, want.sequences)
    assert model.executor.runs == []  # type: ignore[attr-defined]


def test_a_streamer_that_ends_the_call_leaves_a_given_cache_at_its_own_token() -> None:
    class Impatient(Recorder):
        def put(self, token_ids: torch.Tensor) -> None:
            super().put(token_ids)
            if len(self.steps) == 7:
                raise KeyboardInterrupt

    model: Any = ScriptedModel(V, never_ends)
    model.executor = Executor(model)
    cache = model.new_cache(batch_size=1, capacity=60)
    with pytest.raises(KeyboardInterrupt):
        build("greedy")(
            model, torch.tensor([LONG]), past_key_values=cache, streamer=Impatient(),
            generation_config=GenerationConfig(max_new_tokens=20, eos_token_id=(EOS,)),
        )  # fmt: skip
    assert cache.length == len(LONG) + 6
