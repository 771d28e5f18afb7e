"""The native executor chooses the tokens that the torch module chooses, or refuses the model while it is planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from checkpoints import VARIANTS

import pluglm
from pluglm.contracts import ForwardInput
from pluglm.errors import UnsupportedRequestError
from pluglm.lm import LanguageModel

native = pytest.importorskip("pluglm_executor_cpu.native")
pytestmark = pytest.mark.skipif(native.library() is None, reason="pluglm-executor-cpu has no compiled library here")

#: Ops of a program that it refuses, by their names there.
REFUSED = {"latent_attention", "state_space"}
TOLERANCE = 1e-4
STEPS = 40
every_variant = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture
def run_natively(folder: Callable[[str], Path]) -> Callable[..., LanguageModel]:
    """(variant, cache) -> the model with `executor="cpu"`; a skip where it is refused, as it must be."""

    def load(name: str, program: Any, layout: str) -> LanguageModel:
        how: dict[str, Any] = {
            "dtype": "float32", "device": "cpu", "attention": "eager", "cache": layout, "decoding": "greedy",
            "executor": "executor/cpu", "options": {"executor": {"threads": 1}}, "manager": kit.manager(),
        }  # fmt: skip
        refused = sorted({op.op for op in program.ops()} & REFUSED)
        if refused:
            with pytest.raises(UnsupportedRequestError) as caught:
                pluglm.load(folder(name), **how)
            said = "\n".join(getattr(caught.value, "reasons", ()))
            assert all(f"it does not compute {op.replace('_', ' ')}" in said for op in refused)
            pytest.skip(f"refused, as it should be: {', '.join(refused)}")
        return pluglm.load(folder(name), **how)

    return load


@every_variant
def test_greedy_tokens_are_those_of_the_torch_module(name: str, loaded: Any, run_natively: Any) -> None:
    eager = loaded(name)
    lm = run_natively(name, eager.model.description.program, "dynamic")
    start = kit.prompt(29, VARIANTS[name].seed)
    want, want_logits = kit.greedy(eager.model, start, STEPS, use_cache=True)
    got, logits = kit.greedy(lm.model, start, STEPS, use_cache=True)
    assert got == want
    assert (logits - want_logits).abs().max() <= TOLERANCE
    assert (lm.model.executor.native_passes, lm.model.executor.torch_passes) == (STEPS - 1, 1)


@every_variant
@pytest.mark.parametrize(("side", "layout"), [("left", "static"), ("right", "hybrid")])
def test_ragged_rows_choose_the_tokens_of_the_torch_module(
    name: str, side: str, layout: str, loaded: Any, run_natively: Any
) -> None:
    eager = loaded(name)
    lm = run_natively(name, eager.model.description.program, layout)
    starts = [kit.prompt(length, VARIANTS[name].seed) for length in (29, 13)]
    want = kit.greedy_ragged(eager, starts, STEPS, side=side, use_cache=True)
    assert kit.greedy_ragged(lm, starts, STEPS, side=side, use_cache=True) == want
    assert lm.model.executor.native_passes == STEPS - 1


@pytest.mark.parametrize(
    "said",
    [{}, {"decoding": "sampling", "temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "seed": 3}],
)
def test_tokens_that_are_chosen_natively_are_those_that_strategies_choose(
    said: dict[str, Any], loaded: Any, run_natively: Any
) -> None:
    eager = loaded("llama-llama3")
    lm = run_natively("llama-llama3", eager.model.description.program, "static")
    prompts = [kit.prompt(length, 7).tolist() for length in (29, 13)]
    made = []
    for more in ({}, {"stopping_criteria": [lambda ids, _: torch.zeros(len(ids), dtype=torch.bool)]}):
        before = lm.model.executor.native_passes
        done = lm.complete(prompts, max_new_tokens=STEPS, **said, **more)
        made.append([(one.token_ids, one.finish_reason) for one in done])
        assert lm.model.executor.native_passes - before == max(len(one.token_ids) for one in done) - 1
    assert made[0] == made[1]
    assert lm.model.executor.decoding_s > 0  # the first of them, and no step of the second, in runs


def test_a_completion_runs_natively_from_end_to_end(loaded: Any, run_natively: Any) -> None:
    eager = loaded("llama-llama3")
    lm = run_natively("llama-llama3", eager.model.description.program, "static")
    prompt = kit.prompt(29).tolist()
    one, two = (each.complete(prompt, max_new_tokens=STEPS) for each in (lm, eager))
    assert one.token_ids == two.token_ids
    assert len(one.token_ids) == STEPS
    assert lm.model.executor.native_passes == STEPS - 1


@pytest.mark.parametrize("quantizer", ["native:int8", "native:int4"])
def test_packed_weights_run_natively_from_prompt_to_end(quantizer: str) -> None:
    """Both executors read the same blocks; the native one computes the prompt, too."""
    pytest.importorskip("pluglm_quantizer_native")
    how: dict[str, Any] = {
        "dtype": "float32", "device": "cpu", "cache": "static", "decoding": "greedy", "quantizer": quantizer,
    }  # fmt: skip
    eager = pluglm.load("pystdlib", executor="eager", **how)
    lm = pluglm.load("pystdlib", executor="cpu", options={"executor": {"threads": 2}}, **how)
    one, two = (each.complete("import os\n\ndef read_lines(path):\n    ", max_new_tokens=12) for each in (lm, eager))
    assert one.token_ids == two.token_ids
    assert lm.model.executor.native_passes > 0
    assert lm.model.executor.torch_passes == 0
    ids, at = torch.tensor([one.token_ids]), torch.arange(len(one.token_ids))[None]
    with torch.no_grad():
        got, want = (
            each.model.executor.run(ForwardInput(ids, at, each.new_cache(capacity=20), dense=True)).logits
            for each in (lm, eager)
        )
    assert (got - want).abs().max() <= TOLERANCE * want.abs().max()


def test_auto_leaves_it_alone(folder: Callable[[str], Path]) -> None:
    """It works when named: it states no facts, by which alone `auto` chooses."""
    plan = pluglm.explain(folder("llama-llama3"), manager=kit.manager())
    assert plan["executor"].provider == "pluglm-executor-eager:executor/eager"
    considered = {rejected.provider: rejected.reasons for rejected in plan["executor"].rejected}
    assert considered["pluglm-executor-cpu:executor/cpu"] == ("has no pluglm.json; works when named",)
