"""Recipes as strategies: the conformance kit on a callable, what is refused, and what is made of results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pluglm_hf.recipes
import pytest
import torch
from pluglm_hf.outputs import GenerateDecoderOnlyOutput
from pluglm_hf.recipes.failures import RecipeError
from pluglm_hf.recipes.loading import Recipe
from pluglm_hf.recipes.results import read_result
from pluglm_hf.recipes.stock import sample
from pluglm_hf.recipes.strategy import recipe_strategy
from torch import Tensor

from pluglm.contracts import DecodingRequest, DecodingStrategy, GenerationConfig
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm.testing.decoding import DecodingContract, Recorder
from pluglm.testing.scripted_model import ScriptedModel

PROMPT = torch.tensor([[5, 7, 9]])


@dataclasses.dataclass
class _OnScripted:
    """A strategy that is called with scripted models."""

    inner: DecodingStrategy
    dress: Callable[[ScriptedModel], Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, model: ScriptedModel, *args: Any, **kwargs: Any) -> Any:
        return self.inner(self.dress(model), *args, **kwargs)


class _Provider:
    """The provider `recipe`, given a function as a call gives it."""

    @staticmethod
    def pluglm_build_decoding(request: DecodingRequest) -> DecodingStrategy:
        options = (("function", sample), *request.options)
        return pluglm_hf.recipes.pluglm_build_decoding(request=dataclasses.replace(request, options=options))


class TestCallable(DecodingContract):
    provider = _Provider

    @pytest.fixture(autouse=True)
    def _dressing(self, dress: Callable[[ScriptedModel], Any]) -> None:
        self._dress = dress

    def build(self, **changes: Any) -> DecodingStrategy:
        return _OnScripted(super().build(**changes), self._dress)

    def seeded(self, *seeds: int) -> dict[str, Any]:
        return {}  # greedy: a seed changes nothing

    @pytest.mark.parametrize(
        "side",
        (
            "left",
            pytest.param(
                "right",
                marks=pytest.mark.xfail(
                    raises=InputError,
                    strict=True,
                    reason="recipes go on from the last cell, so padding on the right is refused",
                ),
            ),
        ),
    )
    def test_a_row_of_a_padded_batch_gets_the_tokens_it_gets_alone(self, side: str) -> None:
        super().test_a_row_of_a_padded_batch_gets_the_tokens_it_gets_alone(side)

    @pytest.mark.xfail(raises=InputError, strict=True, reason="padding on the right is refused")
    def test_chunks_of_the_prompt_change_nothing(self) -> None:
        super().test_chunks_of_the_prompt_change_nothing()

    @pytest.mark.xfail(raises=BaseException, strict=True, reason="what a recipe does with NaN is its own affair")
    def test_scores_that_are_no_numbers_give_an_error_and_no_token(self) -> None:
        super().test_scores_that_are_no_numbers_give_an_error_and_no_token()


def test_the_provider_wants_a_function_and_nothing_else() -> None:
    def build(**changes: Any) -> Any:
        return pluglm_hf.recipes.pluglm_build_decoding(request=DecodingRequest(23, "cpu", None, **changes))

    for changes, reason in (
        ({}, "it was given no function"), ({"options": (("function", 3),)}, "function is a int"),
        ({"options": (("function", sample), ("x", 1))}, "it has no option 'x'"),
        ({"options": (("function", sample),), "variant": "v"}, "it has no variant 'v'"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedRequestError, match="custom_generate=function") as caught:
            build(**changes)
        assert caught.value.reasons == (reason,)


def built(recipe: Recipe, dress: Callable[[ScriptedModel], Any]) -> Callable[..., Any]:
    strategy = recipe_strategy(recipe, DecodingRequest(23, "cpu", None))

    def run(ids: Tensor = PROMPT, streamer: Any = None, **said: Any) -> Any:
        kwargs = {name: said.pop(name) for name in ("attention_mask",) if name in said}
        config = GenerationConfig(eos_token_id=1, pad_token_id=0).updated(**{"max_new_tokens": 3, **said})
        return strategy(dress(ScriptedModel(23)), ids, generation_config=config, streamer=streamer, **kwargs)

    return run


def test_a_field_that_a_recipe_never_reads_is_refused_before_it_runs(load: Any, dress: Any) -> None:
    recipe = load(
        "import torch\n"
        "def generate(model, input_ids, generation_config=None, own=3, **kwargs):\n"
        "    token = kwargs.get('said_token', own)\n"
        "    new = torch.full((input_ids.shape[0], generation_config.max_new_tokens), token)\n"
        "    return torch.cat((input_ids, new), 1)"
    )
    run = built(recipe, dress)
    assert run().completion(0) == [3, 3, 3]
    assert run(own=4, max_new_tokens=2).completion(0) == [4, 4]
    assert run(said_token=9).completion(0) == [9, 9, 9]
    with pytest.raises(UnsupportedRequestError, match="said_tokn=9 is not honoured .did you mean"):
        run(said_tokn=9)
    with pytest.raises(InputError, match="a seed for each row cannot be honoured"):
        run(seed=(1, 2))
    assert run(seed=(1,)).completion(0) == [3, 3, 3]


def test_a_recipe_without_keywords_takes_only_what_it_names(load: Any, dress: Any) -> None:
    run = built(load("def generate(model, input_ids, own=3): return input_ids\nunused = 'other'"), dress)
    assert run(own=1).num_new_tokens == (0,)
    with pytest.raises(UnsupportedRequestError, match="other=1 is not honoured"):
        run(other=1)


def test_settings_reach_a_recipe_by_every_way_that_it_may_read_them(load: Any, dress: Any) -> None:
    text = (
        "import torch\ndef generate(model, input_ids, {}):\n    return torch.cat((input_ids, torch.tensor([[{}]])), 1)"
    )
    for parameters, reads in (
        ("max_new_tokens=0, top_k=0", "max_new_tokens, top_k"),
        ("**kwargs", "kwargs['max_new_tokens'], kwargs['top_k']"),
        ("generation_config", "generation_config.max_new_tokens, generation_config.top_k"),
        ("**kwargs", "model.generation_config.max_length - input_ids.shape[1], model.generation_config.top_k"),
    ):
        run = built(load(text.format(parameters, reads)), dress)
        assert run(max_new_tokens=4, top_k=6).completion(0) == [4, 6]
    told = load(text.format("**kwargs", "len(kwargs), 'seed' in kwargs or 'eos_token_id' in kwargs"))
    assert built(told, dress)(seed=3).completion(0)[1] == 0


def test_a_recipe_that_names_no_streamer_streams_nevertheless(load: Any, dress: Any) -> None:
    streamer = Recorder()
    run = built(
        load("import torch\ndef generate(model, input_ids):\n    return torch.cat((input_ids, input_ids), 1)"), dress
    )
    run(streamer=streamer)
    assert (streamer.steps, streamer.ends) == ([[5], [7], [9]], 1)


def test_options_of_a_recipe_are_refused(load: Any) -> None:
    with pytest.raises(InputError, match="the recipe mine has no option 'size'"):
        recipe_strategy(load("def generate(model): pass"), DecodingRequest(9, "cpu", None, options=(("size", 1),)))


def test_a_streamer_of_a_silent_recipe_is_told_everything_at_the_end(load: Any, dress: Any) -> None:
    recipe = load("import torch\ndef generate(model, input_ids, **kwargs):\n"
                  "    return torch.cat((input_ids, torch.tensor([[4, 1, 0], [5, 6, 7]])), 1)")  # fmt: skip
    streamer = Recorder()
    output = built(recipe, dress)(PROMPT.repeat(2, 1), streamer)
    assert streamer.steps == [[4, 5], [1, 6], [-1, 7]]
    assert streamer.ends == 1
    assert (output.num_new_tokens, output.finish_reasons) == ((2, 3), ("eos", "length"))


def test_right_padding_is_refused(load: Any, dress: Any) -> None:
    run = built(load("def generate(model, input_ids, **kwargs): return input_ids"), dress)
    with pytest.raises(InputError, match="row 1 of the prompts ends with padding") as caught:
        run(PROMPT.repeat(2, 1), attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert caught.value.fix == "Pad on the left."


CONFIG = GenerationConfig(max_new_tokens=4, eos_token_id=1, pad_token_id=0)


def test_results_of_every_shape_become_outputs() -> None:
    whole = torch.tensor([[5, 7, 9, 3, 4]])
    for result in (whole, GenerateDecoderOnlyOutput(whole), whole[0]):
        output = read_result(result, PROMPT, CONFIG, "x")
        assert (output.prompt_length, output.completion(0), output.finish_reasons) == (3, [3, 4], ("stop",))
    padded = read_result(torch.tensor([[0, 0, 5, 7, 9, 3, 1, 8]]), PROMPT, CONFIG, "x")
    assert (padded.sequences.tolist(), padded.completion(0)) == ([[5, 7, 9, 3, 1, 8]], [3, 1])
    assert padded.finish_reasons == ("eos",)
    new = read_result(torch.tensor([[3, 4, 2, 2]]), PROMPT, CONFIG, "x")
    assert (new.prompt_length, new.completion(0), new.finish_reasons) == (0, [3, 4, 2, 2], ("length",))
    rows = read_result(torch.tensor([[5, 7, 9, 3, 0], [5, 7, 9, 3, 4]]), PROMPT, CONFIG, "x")
    assert rows.num_new_tokens == (1, 2)


@pytest.mark.parametrize("result", [None, "text", {"a": 1}, torch.zeros(1, 4), torch.zeros(0, 4, dtype=torch.long)])
def test_what_is_no_completion_is_refused(result: Any) -> None:
    with pytest.raises(RecipeError, match="x returned .*, which is no completion"):
        read_result(result, PROMPT, CONFIG, "x")


def test_a_recipe_that_makes_too_few_sequences_is_refused() -> None:
    with pytest.raises(RecipeError, match="1 sequences for num_return_sequences=2 of 1 prompts") as caught:
        read_result(PROMPT, PROMPT, CONFIG.updated(num_return_sequences=2), "x")
    assert caught.value.argument == "num_return_sequences"
