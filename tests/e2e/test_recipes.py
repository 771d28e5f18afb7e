"""Unmodified `custom_generate` recipes on pluglm: the tokens that they give on the reference, and what it does wrong.

The recipes lie with `pluglm-hf`; they were written for these tests, in the styles that are found on the Hub.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_hf.cache_face import CacheFace
from pluglm_hf.recipes.config import RecipeConfig
from pluglm_hf.recipes.failures import RecipeError
from pluglm_hf.recipes.handoff import GenerationMixin, hand_off, run_recipe
from pluglm_hf.recipes.loading import Recipe, load_recipe
from pluglm_hf.recipes.strategy import recipe_strategy
from pluglm_hf.surface import GenerationSurface
from torch import Tensor

import pluglm
from pluglm import InputError
from pluglm.contracts import DecodingRequest, GenerationConfig
from pluglm.vendored import read_recipe

RECIPES = Path(__file__).parents[2] / "plugins/pluglm-hf/tests/recipes"
V, EOS, PAD = 307, 1, 0
PROMPT = torch.tensor([[60, 17, 201, 5, 99, 61]])
RAGGED = torch.tensor([[PAD, PAD, 60, 17, 201, 5], [8, 9, 33, 120, 77, 45]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
FORCED = [[70, 71], [90]]


@functools.cache
def recipe(name: str) -> Recipe:
    return load_recipe(read_recipe(RECIPES / name), name)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """The same checkpoint in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.fixture
def ours(lm: pluglm.LanguageModel) -> GenerationSurface:
    assert isinstance(lm.model, pluglm.forward.CausalLM)
    assert lm.tokenizer is not None
    config = RecipeConfig(eos_token_id=EOS, bos_token_id=PAD)
    return GenerationSurface(lm.model, generation_config=config, decode=lm.tokenizer.decode)


@pytest.fixture(scope="module")
def theirs(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """(recipe, ids, **settings) -> what the reference returns. It copies code to a folder: one of the test's own."""
    from transformers import dynamic_module_utils

    modules = str(tmp_path_factory.mktemp("modules"))

    def run(name: str, ids: Tensor, **said: Any) -> Any:
        return reference.generate(input_ids=ids, custom_generate=str(RECIPES / name), trust_remote_code=True, **said)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", modules)
        patch.syspath_prepend(modules)
        yield run


@pytest.fixture(autouse=True)
def fresh_draws() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        yield


def config_of(**said: Any) -> Any:
    """A config of the reference: where a field of it, not an argument, is what its loops read."""
    from transformers import GenerationConfig as Theirs

    return Theirs(pad_token_id=PAD, eos_token_id=EOS, **said)


# Every recipe, unmodified, against the reference

#: recipe -> prompt, settings as arguments of generate, fields of a config.
CASES: dict[str, tuple[str, Tensor, dict[str, Any], dict[str, Any] | None]] = {
    "pure greedy": ("greedy_padding", PROMPT, {}, {"max_new_tokens": 9}),
    "pure greedy, padded": ("greedy_padding", PROMPT, {"left_padding": 3, "pad_token": 7}, {"max_new_tokens": 9}),
    "pure greedy, max_length": ("greedy_padding", PROMPT, {}, {"max_length": 15}),
    "top n sigma": ("top_n_sigma", PROMPT.repeat(2, 1), {"n_sigma": 2.5}, {"max_new_tokens": 9, "temperature": 1.7}),
    "cached, tempered": ("tempered", PROMPT, {"sharpness": 3}, {"max_new_tokens": 9, "temperature": 0.8}),
    "layers": ("layer_contrast", PROMPT, {"max_new_tokens": 9, "dola_layers": "low"}, None),
    "layers, listed": ("layer_contrast", PROMPT, {"max_new_tokens": 9, "dola_layers": [0, 1],
                                                  "repetition_penalty": 1.3}, None),
    "layers, ragged": ("layer_contrast", RAGGED, {"attention_mask": MASK, "max_new_tokens": 9, "dola_layers": "low",
                                                  "pad_token_id": PAD}, None),
    "layers, drawn": ("layer_contrast", PROMPT, {"max_new_tokens": 9, "dola_layers": "low", "do_sample": True,
                                                 "temperature": 1.5, "top_k": 20, "top_p": 0.95}, None),
    "groups": ("group_beams", PROMPT, {"max_new_tokens": 8, "num_beams": 6, "num_beam_groups": 3,
                                       "diversity_penalty": 0.7, "num_return_sequences": 3}, None),
    "groups, ragged": ("group_beams", RAGGED, {"attention_mask": MASK, "max_new_tokens": 8, "num_beams": 4,
                                               "num_beam_groups": 2, "diversity_penalty": 0.7, "pad_token_id": PAD,
                                               "no_repeat_ngram_size": 2}, None),
    "groups, no cache": ("group_beams", PROMPT, {"max_new_tokens": 5, "num_beams": 4, "num_beam_groups": 2,
                                                 "diversity_penalty": 0.7, "use_cache": False}, None),
    "forced words": ("constrained", PROMPT, {"max_new_tokens": 8, "force_words_ids": FORCED}, None),
    "forced words, ragged": ("constrained", RAGGED, {"attention_mask": MASK, "max_new_tokens": 8, "pad_token_id": PAD,
                                                     "force_words_ids": FORCED, "bad_words_ids": [[11], [62, 163]]}, None),
    "contrastive": ("contrastive", PROMPT, {"max_new_tokens": 8, "penalty_alpha": 0.6, "top_k": 4}, None),
    "contrastive, ragged": ("contrastive", RAGGED, {"attention_mask": MASK, "max_new_tokens": 8, "penalty_alpha": 0.6,
                                                    "top_k": 3, "pad_token_id": PAD}, None),
    "contrastive, one by one": ("contrastive", RAGGED, {"attention_mask": MASK, "max_new_tokens": 8, "top_k": 3,
                                                        "penalty_alpha": 0.6, "low_memory": True,
                                                        "pad_token_id": PAD}, None),
    "own arguments": ("own_arguments", PROMPT, {"max_new_tokens": 8, "never": (11, 62)}, None),
    "own arguments, suppressed": ("own_arguments", PROMPT, {"max_new_tokens": 8, "min_new_tokens": 8, "never": (11,),
                                                            "suppress_tokens": [163], "begin_suppress_tokens": [21],
                                                            "sequence_bias": [[[125], 6.0]]}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_gives_the_tokens_that_it_gives_on_the_reference(
    case: str, ours: GenerationSurface, theirs: Callable[..., Any]
) -> None:
    name, ids, said, fields = CASES[case]
    config = {} if fields is None else {"generation_config": config_of(**fields)}
    torch.manual_seed(3)
    wanted = theirs(name, ids, **copy.deepcopy(said), **config)
    own = {} if fields is None else {"generation_config": RecipeConfig(pad_token_id=PAD, eos_token_id=EOS, **fields)}
    torch.manual_seed(3)
    found = run_recipe(recipe(name).function, ours, ids, **copy.deepcopy(said), **own)
    assert found.tolist() == wanted.tolist()
    assert found.shape[1] > 6 or name == "tempered"


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_is_a_strategy_with_the_same_tokens(
    case: str, lm: pluglm.LanguageModel, ours: GenerationSurface
) -> None:
    name, ids, said, fields = CASES[case]
    own = {} if fields is None else {"generation_config": RecipeConfig(pad_token_id=PAD, eos_token_id=EOS, **fields)}
    torch.manual_seed(3)
    wanted = run_recipe(recipe(name).function, ours, ids, **copy.deepcopy(said), **own)
    said = {**said, **(fields or {})}
    sampling = said.pop("do_sample", None)
    kwargs = {key: said.pop(key) for key in ("attention_mask", "use_cache") if key in said}
    settings = GenerationConfig(eos_token_id=(EOS,), pad_token_id=PAD).updated(**copy.deepcopy(said))
    assert sampling is None or settings.temperature is not None
    request = DecodingRequest(V, "cpu", lm.tokenizer.decode if lm.tokenizer else None)
    strategy = recipe_strategy(recipe(name), request)
    torch.manual_seed(3)
    output = strategy(lm.model, ids, generation_config=settings, **kwargs)
    start = 0 if name == "tempered" else int(said.get("left_padding") or 0)
    assert output.sequences.tolist() == wanted[:, start:].tolist()
    assert output.prompt_length == (0 if name == "tempered" else ids.shape[1])
    assert output.sequences.shape[0] == ids.shape[0] * said.get("num_return_sequences", 1)


def greedy(lm: pluglm.LanguageModel, ids: Tensor, **said: Any) -> list[int]:
    done = lm.complete(ids[0].tolist(), max_new_tokens=9, **said)
    assert isinstance(done, pluglm.lm.Completion)
    return list(done.token_ids)


# G1: loops of before 5.3


def test_g1_a_loop_of_before_5_3_is_right_here_and_wrong_on_the_reference(
    lm: pluglm.LanguageModel, ours: GenerationSurface, theirs: Callable[..., Any]
) -> None:
    found = run_recipe(recipe("old_loop").function, ours, PROMPT, max_new_tokens=9)
    assert found[0, 6:].tolist() == greedy(lm, PROMPT)
    assert theirs("old_loop", PROMPT, max_new_tokens=9)[0, 6:].tolist() != greedy(lm, PROMPT)
    both = run_recipe(
        recipe("old_loop").function, ours, RAGGED, attention_mask=MASK, max_new_tokens=9, pad_token_id=PAD
    )
    for row, alone in enumerate((RAGGED[:1, 2:], RAGGED[1:])):
        assert both[row, 6:].tolist() == greedy(lm, alone)


def test_probe_18_a_loop_of_before_5_3_feeds_each_token_once(ours: GenerationSurface, monkeypatch: Any) -> None:
    fed: list[tuple[int, int]] = []
    forward = GenerationSurface.forward

    def watched(self: GenerationSurface, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        fed.append((kwargs["input_ids"].shape[1], outputs.past_key_values.get_seq_length()))
        return outputs

    monkeypatch.setattr(GenerationSurface, "forward", watched)
    run_recipe(recipe("old_loop").function, ours, PROMPT, max_new_tokens=5)
    assert fed == [(6, 6), (1, 7), (1, 8), (1, 9), (1, 10)]


def test_g1_a_recipe_that_feeds_the_text_again_is_refused(ours: GenerationSurface) -> None:
    with pytest.raises(RecipeError, match="the recipe fed the tokens twice") as caught:
        run_recipe(recipe("fed_twice").function, ours, PROMPT, max_new_tokens=5)
    assert "the cache holds 6 tokens, and this call brings 7" in caught.value.why
    assert "prepare_inputs_for_generation" in caught.value.fix


def test_a_repeated_text_with_a_mask_over_all_of_it_is_no_mistake(ours: GenerationSurface) -> None:
    twice = torch.cat((PROMPT, PROMPT), dim=1)
    cache = ours(PROMPT).past_key_values
    logits = ours(PROMPT, past_key_values=cache, attention_mask=torch.ones(1, 12, dtype=torch.long)).logits
    torch.testing.assert_close(logits, ours(twice).logits[:, 6:], atol=1e-4, rtol=1e-4)
    with pytest.raises(RecipeError, match="fed the tokens twice"):
        ours(PROMPT, past_key_values=ours(PROMPT).past_key_values)


def test_a_token_that_repeats_itself_is_no_mistake(ours: GenerationSurface) -> None:
    ones = torch.tensor([[9]])
    cache = ours(ones).past_key_values
    assert ours(ones, past_key_values=cache).past_key_values.get_seq_length() == 2


def test_what_nothing_says_is_not_guessed(ours: GenerationSurface, lm: pluglm.LanguageModel) -> None:
    cache = ours(PROMPT).past_key_values
    more = torch.cat((PROMPT, torch.tensor([[4, 5]])), dim=1)
    prepare = ours.prepare_inputs_for_generation
    assert prepare(more, past_key_values=cache)["input_ids"].tolist() == [[4, 5]]
    assert prepare(torch.tensor([[4, 5]]), past_key_values=cache)["input_ids"].tolist() == [[4, 5]]
    assert prepare(more, next_sequence_length=1, past_key_values=cache)["input_ids"].tolist() == [[5]]
    unknown = CacheFace(cache.inner)
    with pytest.raises(RecipeError, match="cannot tell which of 8 tokens are new to a cache of 6"):
        prepare(more, past_key_values=unknown)
    mask = torch.ones(1, 8, dtype=torch.long)
    assert prepare(more, past_key_values=unknown, attention_mask=mask)["input_ids"].tolist() == [[4, 5]]
    with pytest.raises(RecipeError, match="7 wide"):
        prepare(more, past_key_values=unknown, attention_mask=mask[:, :7])
    with pytest.raises(RecipeError, match="next_sequence_length=0"):
        prepare(more, next_sequence_length=0, past_key_values=cache)


# G2: what a callable declares


class Words:
    """A tokenizer as far as a recipe asks."""

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<eleven>": 11, "<sixty-two>": 62}[token]


class Told:
    """A streamer that writes down what it is told."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.said.append(value.tolist())

    def end(self) -> None:
        self.said.append("end")


def test_g2_probe_1_a_callable_gets_the_streamer_and_the_tokenizer_that_it_declares(
    ours: GenerationSurface, reference: Any
) -> None:
    seen: dict[str, Any] = {}

    def spy(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            own: int = 0, tokenizer: Any = None, streamer: Any = None, assistant_model: Any = None,
            **model_kwargs: Any) -> Tensor:  # fmt: skip
        seen.update(own=own, tokenizer=tokenizer, streamer=streamer, assistant=assistant_model, kwargs=model_kwargs)
        return input_ids

    told, words = Told(), Words()
    GenerationMixin.generate(
        ours, PROMPT, custom_generate=spy, own=5, tokenizer=words, streamer=told, assistant_model=ours, max_new_tokens=3
    )
    assert (seen["own"], seen["tokenizer"], seen["streamer"], seen["assistant"]) == (5, words, told, ours)
    assert sorted(seen["kwargs"]) == [
        "attention_mask",
        "logits_to_keep",
        "past_key_values",
        "position_ids",
        "use_cache",
    ]
    assert seen["kwargs"]["attention_mask"] is None
    reference.generate(PROMPT, custom_generate=spy, own=5, tokenizer=words, streamer=told, max_new_tokens=3)
    assert (seen["own"], seen["tokenizer"], seen["streamer"]) == (5, None, None)


def test_g2_a_streamer_is_told_whether_or_not_the_callable_knows_it(ours: GenerationSurface) -> None:
    from pluglm_hf.recipes.stock import sample

    knows, does_not = Told(), Told()

    def plain(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
              **kwargs: Any) -> Any:  # fmt: skip
        return sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    for function, told in ((sample, knows), (plain, does_not)):
        GenerationMixin.generate(ours, PROMPT, custom_generate=function, streamer=told, max_new_tokens=3)
    assert knows.said == does_not.said
    assert knows.said[0] == PROMPT.tolist()
    assert [len(tokens) for tokens in knows.said[1:]] == [1, 1, 1, 3]


def test_g2_probe_2_stop_strings_work_with_a_callable(lm: pluglm.LanguageModel, ours: GenerationSurface) -> None:
    from pluglm_hf.recipes.stock import sample

    assert lm.tokenizer is not None
    tokens = greedy(lm, PROMPT)
    stop = lm.tokenizer.decode(tokens[:4])[-3:]
    found = GenerationMixin.generate(ours, PROMPT, custom_generate=sample, tokenizer=lm.tokenizer, max_new_tokens=9,
                                     stop_strings=[stop])  # fmt: skip
    assert 0 < found.shape[1] - 6 <= 4
    assert found[0, 6:].tolist() == tokens[: found.shape[1] - 6]
    assert lm.tokenizer.decode(found[0, 6:].tolist()).endswith(stop)
    ours.decode = None
    with pytest.raises(InputError, match="stop_strings cannot be honoured without a tokenizer") as caught:
        GenerationMixin.generate(ours, PROMPT, custom_generate=sample, stop_strings=[stop])
    assert caught.value.argument == "stop_strings"


def test_a_recipe_gets_its_own_arguments_and_a_tokenizer(ours: GenerationSurface) -> None:
    function = recipe("own_arguments").function
    by_word = run_recipe(function, ours, PROMPT, max_new_tokens=6, never=("<eleven>", "<sixty-two>"), tokenizer=Words())
    by_id = run_recipe(function, ours, PROMPT, max_new_tokens=6, never=(11, 62))
    assert by_word.tolist() == by_id.tolist()
    assert not {11, 62} & set(by_id[0, 6:].tolist())


# Probe 3, G3, G4, G5, G6: a repository's function


def test_probe_3_a_repositorys_function_gets_the_named_arguments_and_its_own(ours: GenerationSurface) -> None:
    def spy(model: Any, **kwargs: Any) -> dict[str, Any]:
        return kwargs

    passed = run_recipe(spy, ours, PROMPT, own=3)
    assert sorted(passed) == [
        "assistant_model", "generation_config", "inputs", "logits_processor", "negative_prompt_attention_mask",
        "negative_prompt_ids", "own", "prefix_allowed_tokens_fn", "stopping_criteria", "streamer", "synced_gpus",
    ]  # fmt: skip
    assert passed["inputs"] is PROMPT
    assert "input_ids" in run_recipe(spy, ours, input_ids=PROMPT)


def test_g3_probe_19_both_ways_to_say_a_length_reach_a_recipe(
    lm: pluglm.LanguageModel, ours: GenerationSurface, theirs: Callable[..., Any]
) -> None:
    function = recipe("greedy_padding").function
    for said in ({"max_new_tokens": 9}, {"max_length": 15}, {"generation_config": RecipeConfig(max_new_tokens=9)}):
        assert run_recipe(function, ours, input_ids=PROMPT, **said)[0, 6:].tolist() == greedy(lm, PROMPT)
    with pytest.raises(TypeError):
        theirs("greedy_padding", PROMPT, max_new_tokens=9)

    def lengths(model: Any, input_ids: Tensor, generation_config: Any = None, **kwargs: Any) -> tuple[Any, ...]:
        own = model.generation_config
        return (generation_config.max_length, generation_config.max_new_tokens, own.max_length, own.max_new_tokens)

    assert run_recipe(lengths, ours, PROMPT, max_new_tokens=4) == (10, 4, 10, 4)
    assert run_recipe(lengths, ours, PROMPT, max_length=9) == (9, 3, 9, 3)
    assert ours.generation_config.max_new_tokens is None


def test_g4_probe_20_a_prompt_by_position_reaches_input_ids(ours: GenerationSurface) -> None:
    def by_ids(model: Any, input_ids: Tensor, generation_config: Any = None) -> Tensor:
        return input_ids

    def by_inputs(model: Any, inputs: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        return inputs

    def by_position(model: Any, prompt: Tensor, /) -> Tensor:
        return prompt

    for function in (by_ids, by_inputs, by_position):
        assert run_recipe(function, ours, PROMPT) is PROMPT
        assert run_recipe(function, ours, input_ids=PROMPT) is PROMPT
    with pytest.raises(InputError, match="the prompt was passed more than once"):
        run_recipe(by_ids, ours, PROMPT, input_ids=PROMPT)


def test_g5_no_way_in_keeps_gradients(ours: GenerationSurface) -> None:
    def asks(model: Any, input_ids: Tensor, **kwargs: Any) -> bool:
        return torch.is_grad_enabled()

    with torch.enable_grad():
        assert run_recipe(asks, ours, PROMPT) is False
        assert hand_off(ours, asks, PROMPT, None) is False
        assert GenerationMixin.generate(ours, PROMPT, custom_generate=asks) is False
    assert inspect.signature(GenerationMixin.generate).parameters["custom_generate"].default is None


def test_g6_an_argument_that_a_recipe_does_not_take_is_refused(ours: GenerationSurface) -> None:
    def narrow(model: Any, input_ids: Tensor, n_sigma: float = 1.0) -> Tensor:
        return input_ids

    for name in ("revision", "n_sigmas"):
        with pytest.raises(InputError, match=f"narrow has no argument {name!r}") as caught:
            run_recipe(narrow, ours, PROMPT, **{name: "x"})
        assert caught.value.argument == name
    assert "n_sigma" in caught.value.fix
    with pytest.raises(InputError, match="generate has no argument 'penalty_alpa'"):
        run_recipe(recipe("contrastive").function, ours, PROMPT, penalty_alpa=0.6, top_k=4)


# G8: both meanings of crop


def test_g8_crop_takes_both_meanings(ours: GenerationSurface) -> None:
    def cropped(by: int) -> int:
        cache = ours(PROMPT).past_key_values
        cache.crop(by)
        return int(cache.get_seq_length())

    assert [cropped(by) for by in (-2, 0, 4, 6, 9, -6)] == [4, 6, 4, 6, 6, 0]
    cache = ours(PROMPT).past_key_values
    cache.crop(4)
    again = ours(PROMPT[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(again, ours(PROMPT).logits[:, 4:], atol=1e-4, rtol=1e-4)
    with pytest.raises(pluglm.CacheError, match=r"crop\(-7\) takes back more than the 6"):
        ours(PROMPT).past_key_values.crop(-7)


# Probe 5, requirements


def test_probe_5_requirements_are_told_before_an_import_fails() -> None:
    with pytest.raises(RecipeError, match="Missing requirements in your local environment for `bad`") as caught:
        load_recipe(read_recipe(RECIPES / "bad_requirements"), "bad")
    missing = caught.value.missing
    torch_version = torch.__version__
    assert missing[:2] == ("foo-that-nobody-has (installed: None)", "bar-that-nobody-has==0.0.0 (installed: None)")
    assert missing[2].startswith("torch>=99.0 (installed: ")
    assert [line.split(" (")[0] for line in missing[3:]] == ["torch>=2.0,<2.1", "packaging~=20.0"]
    assert torch_version.split("+")[0] in missing[3]


# Through `lm.generate`


def test_a_callable_runs_through_generate_and_stream(lm: pluglm.LanguageModel) -> None:
    from pluglm_hf.recipes.stock import sample

    text = lm.generate("the cat", max_new_tokens=7)
    assert lm.generate("the cat", max_new_tokens=7, custom_generate=sample) == text
    assert "".join(lm.stream("the cat", max_new_tokens=7, custom_generate=sample)) == text
    prompts = ["the cat", "a mat and a book"]
    assert lm.generate(prompts, max_new_tokens=7, custom_generate=sample) == lm.generate(prompts, max_new_tokens=7)

    def backwards(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
                  start: int = 0, **kwargs: Any) -> Tensor:  # fmt: skip
        new = torch.arange(start, start - generation_config.max_new_tokens, -1)[None]
        return torch.cat((input_ids, new), dim=1)

    done = lm.complete([5, 6], max_new_tokens=3, custom_generate=backwards, start=90)
    assert isinstance(done, pluglm.lm.Completion)
    assert (done.token_ids, done.finish_reason) == ((90, 89, 88), "length")
    with pytest.raises(pluglm.PlanError, match="begin=90 is not honoured"):
        lm.complete([5, 6], max_new_tokens=3, custom_generate=backwards, begin=90)


def test_a_seed_makes_a_recipes_draws_repeatable_and_leaves_the_generator_alone(lm: pluglm.LanguageModel) -> None:
    from pluglm_hf.recipes.stock import sample

    def draw(seed: Any) -> tuple[int, ...]:
        done = lm.complete([5, 6], max_new_tokens=12, temperature=2.0, custom_generate=sample, seed=seed)
        assert isinstance(done, pluglm.lm.Completion)
        return done.token_ids

    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match="a seed for each row cannot be honoured by a recipe"):
        draw((1, 2))


def test_a_conversation_goes_on_in_a_given_cache(lm: pluglm.LanguageModel) -> None:
    from pluglm_hf.recipes.stock import sample

    cache = lm.new_cache()
    first = lm.complete([5, 6, 7], max_new_tokens=4, past_key_values=cache, custom_generate=sample)
    assert isinstance(first, pluglm.lm.Completion)
    assert cache.length == 6
    text = [5, 6, 7, *first.token_ids, 9]
    second = lm.complete(text, max_new_tokens=4, past_key_values=cache, custom_generate=sample)
    assert second == lm.complete(text, max_new_tokens=4)


@pytest.mark.parametrize("cache", ["static", "quantized", "hybrid", "paged"])
def test_a_callable_runs_on_every_layout(cache: str, folder: Path) -> None:
    from pluglm_hf.recipes.stock import sample

    model = pluglm.load(folder, cache=cache)
    prompts = [[5, 9, 33, 60, 17], [8, 9]]
    wanted = model.complete(prompts, max_new_tokens=7)
    assert model.complete(prompts, max_new_tokens=7, custom_generate=sample) == wanted


def test_recipes_and_callables_run_on_the_familiar_face(folder: Path, lm: pluglm.LanguageModel) -> None:
    from pluglm_hf import AutoModelForCausalLM, DynamicCache
    from pluglm_hf.recipes.stock import sample

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(PROMPT, custom_generate=sample, max_new_tokens=9)[0, 6:].tolist() == greedy(lm, PROMPT)
    assert model.generate(PROMPT, custom_generate=sample, max_new_tokens=9, past_key_values=DynamicCache())[
        0, 6:
    ].tolist() == greedy(lm, PROMPT)
    for name in ("greedy_padding", "old_loop"):
        found = run_recipe(recipe(name).function, model, PROMPT, max_new_tokens=9)
        assert found[0, 6:].tolist() == greedy(lm, PROMPT)
    drawn = [
        model.generate(PROMPT, custom_generate=sample, max_new_tokens=9, do_sample=True, temperature=2.0, seed=seed)
        for seed in (4, 4, 5)
    ]
    assert drawn[0].tolist() == drawn[1].tolist() != drawn[2].tolist()

    def asks_the_model(model: Any, **kwargs: Any) -> Any:
        return model.generate(**kwargs)

    kept = run_recipe(asks_the_model, model, input_ids=PROMPT, max_new_tokens=9)
    assert kept[0, 6:].tolist() == greedy(lm, PROMPT)


def test_a_recipe_that_cannot_be_told_of_padding_is_refused_for_ragged_prompts(lm: pluglm.LanguageModel) -> None:
    def narrow(model: Any, input_ids: Tensor, generation_config: Any = None) -> Tensor:
        return input_ids

    made = Recipe("narrow", narrow, pluglm_takes(narrow), frozenset())
    strategy = recipe_strategy(made, DecodingRequest(V, "cpu", None))
    settings = GenerationConfig(max_new_tokens=3)
    assert strategy(lm.model, RAGGED, generation_config=settings).num_new_tokens == (0, 0)
    with pytest.raises(RecipeError, match="narrow takes no attention_mask, and the prompts differ in length"):
        strategy(lm.model, RAGGED, generation_config=settings, attention_mask=MASK)


def pluglm_takes(function: Any) -> Any:
    from pluglm_hf.recipes.signature import takes

    return takes(function)


# Processors under the reference's names

ENDS = [3, 8]
IDS = torch.tensor([[4, 9, 4, 9, 2, 7, 4, 9], [6, 6, 1, 5, 6, 6, 1, 0]])
#: Class -> constructor arguments; several of some.
PROCESSORS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("TemperatureLogitsWarper", (0.7,), {}),
    ("RepetitionPenaltyLogitsProcessor", (1.4,), {}),
    ("RepetitionPenaltyLogitsProcessor", (1.4, 3), {}),
    ("EncoderRepetitionPenaltyLogitsProcessor", (1.4, IDS[:, :3]), {}),
    ("MinLengthLogitsProcessor", (9, ENDS), {}),
    ("MinLengthLogitsProcessor", (8, ENDS), {}),
    ("MinNewTokensLengthLogitsProcessor", (5, 4, ENDS), {}),
    ("MinNewTokensLengthLogitsProcessor", (5, 3, 3), {}),
    ("NoRepeatNGramLogitsProcessor", (2,), {}),
    ("NoRepeatNGramLogitsProcessor", (3,), {}),
    ("EncoderNoRepeatNGramLogitsProcessor", (2, IDS[:, :5].clone()), {}),
    ("SequenceBiasLogitsProcessor", ([[[2], 1.5], [[9, 5], -2.0], [[6, 1, 0, 4], 3.0]],), {}),
    ("NoBadWordsLogitsProcessor", ([[2], [9, 5], [3]], torch.tensor(ENDS)), {}),
    ("PrefixConstrainedLogitsProcessor", (lambda row, ids: [row + 2, int(ids[-1]) % 11], 1), {}),
    ("ForcedBOSTokenLogitsProcessor", (5,), {}),
    ("ForcedEOSTokenLogitsProcessor", (9, ENDS), {}),
    ("ForcedEOSTokenLogitsProcessor", (10, 3), {}),
    ("ExponentialDecayLengthPenalty", ((1, 1.1), ENDS, 5), {}),
    ("SuppressTokensAtBeginLogitsProcessor", ([2, 4], 8), {}),
    ("SuppressTokensLogitsProcessor", ([2, 4],), {}),
    ("InfNanRemoveLogitsProcessor", (), {}),
    ("LogitNormalization", (), {}),
    ("TopKLogitsWarper", (3,), {}),
    ("TopKLogitsWarper", (1,), {"min_tokens_to_keep": 4, "filter_value": -50.0}),
    ("TopPLogitsWarper", (0.6,), {}),
    ("TopPLogitsWarper", (0.1,), {"min_tokens_to_keep": 3}),
    ("MinPLogitsWarper", (0.4,), {}),
    ("MinPLogitsWarper", (0.9,), {"min_tokens_to_keep": 3}),
    ("TopHLogitsWarper", (0.5,), {}),
    ("TypicalLogitsWarper", (0.4,), {}),
    ("TypicalLogitsWarper", (0.1,), {"min_tokens_to_keep": 3}),
    ("EpsilonLogitsWarper", (0.08,), {}),
    ("EpsilonLogitsWarper", (0.5,), {"min_tokens_to_keep": 3, "filter_value": -9.0}),
    ("EtaLogitsWarper", (0.3,), {}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(PROCESSORS)), ids=lambda i: f"{PROCESSORS[i][0]}-{i}")
def test_a_processor_gives_the_references_scores(case: int) -> None:
    from pluglm_hf import processors, warpers
    from transformers.generation import logits_process

    name, args, named = PROCESSORS[case]
    scores = torch.randn(2, 11, generator=torch.Generator().manual_seed(case)) * 2
    if name == "InfNanRemoveLogitsProcessor":
        scores[0, 3], scores[1, 4], scores[1, 5] = torch.inf, -torch.inf, torch.nan
    ours = getattr(processors, name, None) or getattr(warpers, name)
    for ids in (IDS, IDS[:, :1]) if "Encoder" not in name else (IDS,):
        wanted = getattr(logits_process, name)(*copy.deepcopy(args), **named)(ids, scores.clone())
        found = ours(*copy.deepcopy(args), **named)(ids, scores.clone())
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("TemperatureLogitsWarper", (0.0,), "temperature=0.0 makes no sense: it must be a number > 0"),
        ("TopKLogitsWarper", (0,), "top_k=0 makes no sense: it must be an integer >= 1"),
        ("TopPLogitsWarper", (1.5,), "top_p=1.5 makes no sense: it must be a number from 0 to 1"),
        ("MinLengthLogitsProcessor", (3, -1), "token ids=-1 makes no sense"),
        ("NoBadWordsLogitsProcessor", ([[]],), "none of them empty"),
        ("SequenceBiasLogitsProcessor", ({},), "each with a number"),
    ],
)
def test_a_processor_with_a_value_that_makes_no_sense_is_refused(name: str, args: Any, message: str) -> None:
    from pluglm_hf import processors, warpers

    with pytest.raises(InputError, match=message):
        (getattr(processors, name, None) or getattr(warpers, name))(*args)
