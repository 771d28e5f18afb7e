"""Who wins: the call, the named strategy, generation_config.json, config.json, the tokenizer; and what makes no sense."""

from __future__ import annotations

from typing import Any

import pytest

from pluglm.contracts import GenerationConfig, ModelDescription, WeightMap
from pluglm.errors import ConfigError, InputError
from pluglm.generation import NEUTRAL_KEYS, NEUTRAL_VALUES, choosing_fields, decoder_start, defaults, for_call


def description(**said: Any) -> ModelDescription:
    return ModelDescription(
        model_type="fake", program=None, weights=WeightMap(()), vocab_size=11, hidden_size=6, num_layers=2, max_seq_len=40,
        attention=(), slots=(), **said,
    )  # fmt: skip


def of_files(
    file: dict[str, Any] | None, *, eos: int | None = None, bos: int | None = None, **said: Any
) -> GenerationConfig:
    return defaults(description(**said), file, eos=eos, bos=bos, pad=said.get("pad_token_id"))


def call(
    base: GenerationConfig | None = None, honoured: frozenset[str] | None = None, **arguments: Any
) -> GenerationConfig:
    return for_call(base or GenerationConfig(), arguments, honoured)


def refusal(**arguments: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        call(**arguments)
    return caught.value


# What the files say


def test_special_tokens_come_from_the_first_who_names_them() -> None:
    tokenizer = {"eos": 1, "bos": 2}
    assert of_files(None, **tokenizer).set_fields() == {"eos_token_id": (1,), "bos_token_id": 2}
    config = {"eos_token_ids": (3, 4), "bos_token_id": 5, "pad_token_id": 6}
    assert of_files(None, **tokenizer, **config).set_fields() == {
        "eos_token_id": (3, 4), "bos_token_id": 5, "pad_token_id": 6,
    }  # fmt: skip
    file = {"eos_token_id": [7, 8], "bos_token_id": 0, "pad_token_id": None}
    assert of_files(file, **tokenizer, **config).set_fields() == {
        "eos_token_id": (7, 8), "bos_token_id": 0, "pad_token_id": 6,
    }  # fmt: skip


def test_a_token_id_of_zero_counts_as_said() -> None:
    assert of_files({"eos_token_id": 0}, eos=3, bos_token_id=0, bos=4).set_fields() == {
        "eos_token_id": (0,),
        "bos_token_id": 0,
    }


def test_no_file_says_nothing() -> None:
    assert of_files(None).set_fields() == {}
    assert of_files({}) == GenerationConfig()


def test_neutral_keys_and_values_are_dropped() -> None:
    assert of_files({**dict.fromkeys(NEUTRAL_KEYS, "anything"), **NEUTRAL_VALUES}).set_fields() == {}
    assert all(reason for reason in NEUTRAL_KEYS.values())


@pytest.mark.parametrize(("name", "value"), [("num_beams", 4), ("no_repeat_ngram_size", 3), ("penalty_alpha", 0.6)])
def test_unknown_fields_are_kept_in_extra_so_that_a_strategy_honours_or_refuses_them(name: str, value: Any) -> None:
    config = of_files({name: value})
    assert config.extra == {name: value}
    assert choosing_fields(config) == (name,)


def test_known_fields_with_another_value_are_kept() -> None:
    config = of_files({"repetition_penalty": 1.2, "max_length": 30, "num_return_sequences": 2})
    assert config.set_fields() == {"repetition_penalty": 1.2, "max_length": 30, "num_return_sequences": 2}


@pytest.mark.parametrize("file", [{}, {"do_sample": False}])
def test_sampling_fields_count_only_if_the_file_says_do_sample(file: dict[str, Any]) -> None:
    sampling = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.1, "typical_p": 0.5, "top_h": 0.4}
    assert of_files({**file, **sampling}).set_fields() == {}
    assert of_files({**sampling, "do_sample": True}).set_fields() == sampling


def test_do_sample_alone_means_temperature_one() -> None:
    assert of_files({"do_sample": True}).set_fields() == {"temperature": 1.0}
    assert of_files({"do_sample": True, "top_p": 0.9}).set_fields() == {"top_p": 0.9}
    assert of_files({"do_sample": True, "typical_p": 0.9}).set_fields() == {"typical_p": 0.9}


@pytest.mark.parametrize(
    ("file", "why", "key"),
    [
        (
            {"do_sample": True, "temperature": 0},
            "temperature=0 makes no sense: it must be a number > 0.",
            "temperature",
        ),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 makes no sense: it must be an integer >= 0.", "max_new_tokens"),
        ({"seed": 1.5}, "seed=1.5 makes no sense: it must be an integer from 0 to 2**64 - 1, or one a row.", "seed"),
        (
            {"eos_token_id": ["</s>"]},
            "eos_token_id=('</s>',) makes no sense: it must be an id or several.",
            "eos_token_id",
        ),
        ({"stop_strings": 3}, "stop_strings=3 makes no sense: it must be a text or several.", "stop_strings"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(file: dict[str, Any], why: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_files(file)
    assert caught.value.what == "generation_config.json holds a setting that makes no sense."
    assert caught.value.why == why
    assert caught.value.fix == "Correct the file."
    assert caught.value.key == key


def test_a_key_that_no_keyword_can_be_is_refused_as_the_others() -> None:
    with pytest.raises(ConfigError, match="generation_config.json holds a setting that makes no sense") as caught:
        of_files({"self": 1})
    assert "self" in caught.value.why


# What a call says


BASE = GenerationConfig(max_new_tokens=9, temperature=0.7, top_p=0.9, eos_token_id=(3,), extra={"num_beams": 4})


def test_a_calls_own_arguments_win_over_its_config_which_wins_over_the_files() -> None:
    given = GenerationConfig(max_new_tokens=5, top_k=8)
    config = call(BASE, generation_config=given, top_k=2)
    assert config.set_fields() == {
        "max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "top_k": 2, "eos_token_id": (3,), "num_beams": 4,
    }  # fmt: skip
    assert BASE.max_new_tokens == 9, "the defaults stay as they are"


def test_none_takes_a_default_away() -> None:
    assert call(BASE, top_p=None, num_beams=None, max_new_tokens=None).set_fields() == {
        "temperature": 0.7, "eos_token_id": (3,),
    }  # fmt: skip


def test_unknown_arguments_are_kept_for_the_strategy_that_knows_them() -> None:
    config = call(penalty_alpha=0.6)
    assert config.extra == {"penalty_alpha": 0.6}
    assert choosing_fields(config) == ("penalty_alpha",)


def test_a_lone_end_token_or_stop_string_is_made_a_tuple_and_a_list_too() -> None:
    config = call(eos_token_id=4, stop_strings="\n")
    assert (config.eos_token_id, config.stop_strings) == ((4,), ("\n",))
    assert GenerationConfig(eos_token_id=4, stop_strings=["a"], seed=[1, 2]) == GenerationConfig(  # type: ignore[arg-type]
        eos_token_id=(4,), stop_strings=("a",), seed=(1, 2)
    )


def test_do_sample_false_takes_the_files_sampling_away() -> None:
    base = BASE.updated(typical_p=0.4, top_h=0.5)
    assert call(base, do_sample=False).set_fields() == {"max_new_tokens": 9, "eos_token_id": (3,), "num_beams": 4}


def test_do_sample_true_keeps_what_is_said_and_else_means_temperature_one() -> None:
    assert call(BASE, do_sample=True).temperature == 0.7
    assert call(do_sample=True).set_fields() == {"temperature": 1.0}
    assert call(do_sample=True, top_k=5).set_fields() == {"top_k": 5}
    assert call(BASE, do_sample=None) == BASE


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0.5), ("top_k", 3), ("top_p", 0.5), ("min_p", 0.1), ("typical_p", 0.2)]
)
def test_do_sample_false_beside_a_sampling_field_is_a_contradiction(name: str, value: Any) -> None:
    for arguments in ({name: value}, {"generation_config": GenerationConfig().updated(**{name: value})}):
        error = refusal(do_sample=False, **arguments)
        assert error.what == f"do_sample=False contradicts {name}={value!r}."
        assert error.fix == f"Leave out {name}, or leave out do_sample."
        assert error.argument == name


@pytest.mark.parametrize("value", [0, 1, "no"])
def test_do_sample_is_true_or_false(value: Any) -> None:
    error = refusal(do_sample=value)
    assert error.what == f"do_sample={value!r} makes no sense: it must be True or False."
    assert error.argument == "do_sample"


def test_a_config_of_another_kind_is_refused() -> None:
    error = refusal(generation_config={"top_k": 3})
    assert error.what == "generation_config is a dict."
    assert error.fix == "Pass a pluglm.GenerationConfig, or its fields as arguments."
    assert error.argument == "generation_config"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_new_tokens", -1, "an integer >= 0"), ("max_new_tokens", 1.0, "an integer >= 0"),
        ("max_new_tokens", True, "an integer >= 0"), ("max_length", -3, "an integer >= 0"),
        ("min_new_tokens", "2", "an integer >= 0"), ("top_k", -1, "an integer >= 0"),
        ("num_return_sequences", 0, "an integer >= 1"), ("temperature", 0, "a number > 0"),
        ("temperature", float("inf"), "a number > 0"), ("temperature", True, "a number > 0"),
        ("repetition_penalty", -1.0, "a number > 0"), ("top_p", 1.5, "a number from 0 to 1"),
        ("top_p", 0, "a number from 0 to 1, and not 0"), ("min_p", -0.1, "a number from 0 to 1"),
        ("min_p", float("nan"), "a number from 0 to 1"), ("seed", -1, "an integer from 0 to 2**64 - 1, or one a row"),
        ("seed", 2**64, "an integer from 0 to 2**64 - 1, or one a row"),
        ("seed", 0.0, "an integer from 0 to 2**64 - 1, or one a row"),
        ("seed", "x", "an integer from 0 to 2**64 - 1, or one a row"),
        ("seed", True, "an integer from 0 to 2**64 - 1, or one a row"),
        ("seed", (1, -1), "an integer from 0 to 2**64 - 1, or one a row"), ("eos_token_id", "</s>", "an id or several"),
        ("eos_token_id", (1, None), "an id or several"), ("stop_strings", (1,), "a text or several"),
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_refused(name: str, value: Any, rule: str) -> None:
    error = refusal(**{name: value})
    assert error.what == f"{name}={value!r} makes no sense: it must be {rule}."
    assert error.argument == name


# A strategy that the user named


def test_a_named_strategy_clears_defaults_that_it_does_not_know() -> None:
    base = BASE.updated(bos_token_id=1, pad_token_id=2, num_groups=2)
    config = call(base, frozenset({"max_new_tokens", "num_groups"}))
    assert config.set_fields() == {
        "max_new_tokens": 9, "eos_token_id": (3,), "bos_token_id": 1, "pad_token_id": 2, "num_groups": 2,
    }  # fmt: skip


def test_what_the_call_itself_says_is_not_cleared_so_that_the_strategy_can_refuse_it() -> None:
    config = call(BASE, frozenset({"max_new_tokens"}), top_k=4, penalty_alpha=0.6)
    assert set(choosing_fields(config)) == {"max_new_tokens", "top_k", "penalty_alpha"}


def test_special_tokens_choose_no_strategy() -> None:
    config = GenerationConfig(eos_token_id=(1,), bos_token_id=2, pad_token_id=3, top_k=4, extra={"b": 1, "a": 2})
    assert choosing_fields(config) == ("a", "b", "top_k")


# The token that an encoder-decoder's decoder begins with


def test_the_start_token_comes_from_the_first_who_names_it() -> None:
    said = description(decoder_start_token_id=3)
    file = {"decoder_start_token_id": 0}
    assert decoder_start(said, file, bos=5, call=7) == 7
    assert decoder_start(said, file, bos=5) == 0
    assert decoder_start(said, {"decoder_start_token_id": None}, bos=5) == 3
    assert decoder_start(description(), None, bos=5) == 5


def test_without_a_start_token_there_is_nothing_to_begin_with() -> None:
    with pytest.raises(InputError) as caught:
        decoder_start(description(), None, bos=None)
    assert caught.value.what == "nothing says which token this model's decoder begins with."
    assert "generation_config.json nor config.json" in caught.value.why
    assert (
        caught.value.fix.startswith("Pass decoder_start_token_id=…")
        and caught.value.argument == "decoder_start_token_id"
    )


@pytest.mark.parametrize("wrong", [11, -1, True, "0", [0, 1]])
def test_a_start_token_is_an_id_of_the_vocabulary(wrong: Any) -> None:
    with pytest.raises(InputError) as caught:
        decoder_start(description(), None, bos=1, call=wrong)
    assert caught.value.what == f"decoder_start_token_id={wrong!r} is no id of this vocabulary of 11."
    assert caught.value.argument == "decoder_start_token_id"
    with pytest.raises(ConfigError) as found:
        decoder_start(description(), {"decoder_start_token_id": wrong}, bos=1)
    assert f"decoder_start_token_id={wrong!r}" in found.value.why and found.value.key == "decoder_start_token_id"


def test_a_value_that_changes_nothing_asks_no_strategy_and_takes_back_the_files() -> None:
    base = GenerationConfig().updated(num_beams=4, no_repeat_ngram_size=3)
    config = for_call(base, {"num_beams": 1, "length_penalty": 1.0}, None)
    assert config.extra == {"no_repeat_ngram_size": 3}
    assert for_call(base, {"num_beams": 1}, frozenset({"num_beams"})).extra == {"num_beams": 1}
    assert for_call(base, {"num_beams": True}, None).extra["num_beams"] is True, "no number of beams"
