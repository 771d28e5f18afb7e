"""What the reference library, transformers 5.23, was found to do wrong, each with the tests that pluglm does it right.

`DEFECTS` is the list: "G" are defects of its custom_generate path, "P" are probes that were run on it, "W" are
weaknesses of its generate, of its speculative decoding and of its constraints. The tests below are those that had no
better place.
"""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluglm_hf as hf
import pytest
import torch
from torch import Tensor

import pluglm
from pluglm import InputError, PluginNotFoundError, PluglmError
from pluglm.completions import Completion

ROOT = Path(__file__).parents[2]
RECIPES, VENDOR, STREAMING, SPECULATIVE = (
    f"tests/e2e/test_{name}.py" for name in ("recipes", "vendor", "streaming", "speculative")
)
HERE, REUSED, CONSTRAINTS = (f"tests/e2e/test_{name}.py" for name in ("known_defects", "reused_caches", "constraints"))
HF, CACHES = "plugins/pluglm-hf/tests", "plugins/pluglm-caches/tests"
KIT = "core/pluglm/testing"
STANDARD, BLOCKS, GUESSING = (f"plugins/pluglm-decoding-{n}/tests" for n in ("standard", "blocks", "speculative"))

#: Item -> what the reference does, and where it is shown that pluglm does not.
DEFECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "G1": ("a decoding loop written before 5.3 is fed the whole text each step, in silence", (
        f"{RECIPES}::test_g1_a_loop_of_before_5_3_is_right_here_and_wrong_on_the_reference",
        f"{RECIPES}::test_g1_a_recipe_that_feeds_the_text_again_is_refused",
        f"{HF}/recipes/test_surface.py::test_tokens_that_are_fed_again_are_refused_before_the_model_runs")),
    "G2": ("a callable is not given the streamer, tokenizer and assistant that it declares; stop strings raise", (
        f"{RECIPES}::test_g2_probe_1_a_callable_gets_the_streamer_and_the_tokenizer_that_it_declares",
        f"{RECIPES}::test_g2_a_streamer_is_told_whether_or_not_the_callable_knows_it",
        f"{RECIPES}::test_g2_probe_2_stop_strings_work_with_a_callable",
        f"{HF}/recipes/test_surface.py::test_several_processes_are_refused",
        f"{HERE}::test_a_callable_that_declares_a_tokenizer_gets_it")),
    "G3": ("the documented example fails with max_new_tokens as an argument", (
        f"{RECIPES}::test_g3_probe_19_both_ways_to_say_a_length_reach_a_recipe",)),
    "G4": ("a prompt by position fails", (
        f"{RECIPES}::test_g4_probe_20_a_prompt_by_position_reaches_input_ids",)),
    "G5": ("a repository's function keeps gradients, and replaces the method generate", (
        f"{RECIPES}::test_g5_no_way_in_keeps_gradients",
        f"{HERE}::test_a_folder_that_brings_code_is_loaded_without_running_it",
        f"{HERE}::test_generate_stays_the_method_that_it_was")),
    "G6": ("look-up and generation arguments are one namespace, and nothing is pinned", (
        f"{RECIPES}::test_g6_an_argument_that_a_recipe_does_not_take_is_refused",
        f"{VENDOR}::test_a_branch_a_tag_and_a_short_hash_are_refused_with_the_commit",
        f"{VENDOR}::test_no_flipped_byte_of_a_sealed_file_gets_through")),
    "G7": ("trust is one bit; files were written, and folders run, before consent", (
        f"{VENDOR}::test_before_consent_nothing_importable_exists_and_nothing_is_run",
        f"{VENDOR}::test_without_a_terminal_silence_is_no_consent",
        "plugins/pluglm-vendor/tests/test_reading.py::test_reading_runs_nothing",
        f"{HERE}::test_a_folder_that_brings_code_is_loaded_without_running_it")),
    "G8": ("crop(positive) raises, so recipes that were right no longer run", (
        f"{RECIPES}::test_g8_crop_takes_both_meanings",
        f"{RECIPES}::test_a_recipe_gives_the_tokens_that_it_gives_on_the_reference")),
    "G9": ("a recipe has no name, version or declared arguments, and pip cannot install it", (
        "plugins/pluglm-vendor/tests/test_wheel.py::test_the_manifest_is_valid_and_the_entry_point_leads_to_the_package",
        f"{VENDOR}::test_it_generates_by_name_by_id_and_by_the_folder_it_came_from_without_a_hub",
        f"{VENDOR}::test_the_commands_about_plugins_know_it",
        f"{HF}/recipes/test_strategy.py::test_a_field_that_a_recipe_never_reads_is_refused_before_it_runs")),
    "P1": ("a callable gets tokenizer=None and streamer=None", (
        f"{RECIPES}::test_g2_probe_1_a_callable_gets_the_streamer_and_the_tokenizer_that_it_declares",)),
    "P2": ("a callable with stop strings raises", (f"{RECIPES}::test_g2_probe_2_stop_strings_work_with_a_callable",)),
    "P3": ("what a repository's function is handed, and that it needs consent", (
        f"{RECIPES}::test_probe_3_a_repositorys_function_gets_the_named_arguments_and_its_own",
        f"{VENDOR}::test_a_folder_that_was_not_vendored_or_has_changed_is_refused")),
    "P4": ("requirements are read by one regular expression, seven kinds of lines wrongly", (
        "plugins/pluglm-vendor/tests/test_needs.py::test_a_line_is_judged_by_every_word_of_it",
        f"{HF}/recipes/test_loading.py::test_requirements_are_read_as_pep_508_says")),
    "P5": ("a missing import is told instead of the requirements", (
        f"{RECIPES}::test_probe_5_requirements_are_told_before_an_import_fails",)),
    "P6": ("an attention without a mask function drops padding in silence", (
        f"{HERE}::test_a_padded_row_gets_its_own_logits_under_every_attention",
        f"{KIT}/attention.py::test_a_feature_that_is_not_listed_is_refused_with_a_reason",
        "tests/parity/test_parity.py::test_padding_changes_no_row")),
    "P7": ("an unknown attention", (f"{HERE}::test_an_unknown_part_is_refused_with_the_names_that_there_are",)),
    "P8": ("an unknown cache", (f"{HERE}::test_an_unknown_part_is_refused_with_the_names_that_there_are",)),
    "P9": ("crop(+3) raises, crop(-3) does not", (
        f"{RECIPES}::test_g8_crop_takes_both_meanings", f"{HF}/test_caches.py::test_both_meanings_of_crop")),
    "P10": ("a static cache has no crop, repeat and select; when full it gives an IndexError", (
        f"{KIT}/cache.py::test_random_operations_equal_a_plain_list_model",
        f"{CACHES}/test_dense.py::test_a_pass_beyond_the_capacity_names_the_numbers_and_the_remedy")),
    "P11": ("crop and select of a packed cache raise IndexError, repeat does nothing", (
        f"{CACHES}/test_quantized.py::test_rows_move_as_they_are_stored",
        f"{CACHES}/test_quantized.py::test_going_back_into_a_block_takes_its_first_cells_out_as_they_read",
        "tests/parity/test_beam.py::test_packed_cells_follow_their_beams")),
    "P12": ("prompt lookup with a packed cache raises IndexError", (
        f"{SPECULATIVE}::test_a_cache_that_rounds_serves_speculation_too",)),
    "P13": ("a cache can only be pickled", (
        f"{REUSED}::test_a_saved_cache_is_loaded_again_and_no_other_models_is",
        f"{REUSED}::test_a_prefix_stored_here_is_continued_in_another_process")),
    "P14": ("assisted decoding takes one row", (
        f"{HF}/test_generate.py::test_assistants_and_look_ups_serve_several_rows",
        f"{GUESSING}/test_tokens.py::test_greedy_tokens_are_those_of_plain_greedy")),
    "P15": ("contrastive search, group beams and others need trust and a network", (
        f"{HERE}::test_every_mode_that_was_moved_away_runs_without_trust_and_network",)),
    "P16": ("cache_position is swallowed", (f"{HERE}::test_cells_that_are_not_the_next_ones_are_refused",)),
    "P17": ("an unknown quant_method is loaded as if nothing were packed", (
        "tests/e2e/test_bad_input.py::test_a_folder_that_is_wrong_is_refused",)),
    "P18": ("the loop of before 5.3 feeds 8, 9, 10 … tokens into 8, 17, 27 … cells", (
        f"{RECIPES}::test_probe_18_a_loop_of_before_5_3_feeds_each_token_once",)),
    "P19": ("the documented example fails with an argument and by position", (
        f"{RECIPES}::test_g3_probe_19_both_ways_to_say_a_length_reach_a_recipe",
        f"{RECIPES}::test_g4_probe_20_a_prompt_by_position_reaches_input_ids")),
    "P20": ("a loaded repository's function keeps gradients and takes no prompt by position", (
        f"{RECIPES}::test_g4_probe_20_a_prompt_by_position_reaches_input_ids",
        f"{RECIPES}::test_g5_no_way_in_keeps_gradients")),
    "P21": ("generator= is refused", (
        f"{STREAMING}::test_a_torch_generator_gives_the_seed_and_goes_on",
        f"{HF}/test_generate.py::test_torchs_seed_repeats_a_draw_and_so_do_a_generator_and_a_seed")),
    "P22": ("batches and beams cannot be streamed", (
        f"{STREAMING}::test_the_pieces_of_each_row_of_a_batch_are_what_generate_returns",
        "tests/parity/test_beam.py::test_the_text_of_a_search_is_streamed_as_it_becomes_certain")),
    "P23": ("a cache that is used for two texts must be copied whole", (
        f"{REUSED}::test_a_branch_of_a_chat_leaves_the_other_alone",
        f"{HF}/test_caches.py::test_a_copy_goes_its_own_way",
        f"{CACHES}/test_paged.py::test_a_fork_at_the_end_of_a_page_copies_nothing")),
    "P24": ("cache_implementation='paged' returns a tensor of another shape", (
        f"{HF}/test_refusals.py::test_generate_refuses_what_it_cannot_honour",
        "tests/e2e/test_paged.py::test_greedy_tokens_equal_those_of_plain_tensors_alone_and_in_a_ragged_batch")),
    "P25": ("generate takes twice as long as a loop of forward passes", (
        "tests/e2e/test_hot_loop.py::test_a_generated_token_costs_no_hook_no_look_up_and_no_import",)),
    "W processors": ("a caller's processor has one place, before the filters", (
        f"{STANDARD}/test_calls.py::test_a_placed_processor_stands_among_the_filters_of_a_call",)),
    "W signatures": ("signatures of processors are looked up for every token", (
        f"{HERE}::test_no_signature_is_looked_up_for_a_token",
        f"{KIT}/decoding.py::test_nothing_is_inspected_while_tokens_are_made")),
    "W stop strings": ("stop strings need a tokenizer in every call", (
        "tests/e2e/test_generate.py::test_a_stop_string_ends_the_text_before_it",)),
    "W draws": ("only the global generator draws, for all rows together", (
        f"{STANDARD}/test_calls.py::test_a_row_can_be_drawn_again_alone_with_the_seed_derived_for_it",)),
    "W waiting": ("the host waits for the device at every token", (
        f"{STANDARD}/test_calls.py::test_rows_end_where_they_end_on_the_host",)),
    "W unknown settings": ("an unknown setting becomes an attribute that nothing reads", (
        f"{HF}/test_generate.py::test_a_setting_that_nothing_reads_is_refused_wherever_it_is_said",
        f"{STANDARD}/test_calls.py::test_a_misspelt_field_is_answered_with_the_right_one")),
    "W unread settings": ("sampling settings without sampling give a warning", (
        f"{HF}/test_refusals.py::test_generate_refuses_what_it_cannot_honour",)),
    "W healing": ("token healing calls generate again for each row", (
        f"{STREAMING}::test_healing_rows_of_a_batch_is_healing_each_alone",)),
    "W leaking cache": ("a static cache stays with the model after the call", (
        f"{HF}/test_caches.py::test_an_implementation_is_a_layout_of_that_call",)),
    "W static guesses": ("no speculative decoding on a static cache", (
        f"{SPECULATIVE}::test_every_lossless_cache_gives_the_tokens_of_greedy",)),
    "W states": ("no speculative decoding of stateful models", (
        f"{SPECULATIVE}::test_models_with_recurrent_states_are_refused_when_they_are_planned",)),
    "W early exit": ("early exit changes the shared config while it runs", (
        f"{HERE}::test_early_exit_leaves_the_model_whole_for_a_call_in_between",)),
    "W verification": ("one hard-wired verification", (
        f"{GUESSING}/test_tokens.py::test_speculative_sampling_keeps_the_models_distribution",
        f"{GUESSING}/test_tokens.py::test_without_the_residual_the_distribution_is_another")),
    "W grammars": ("no grammar, JSON schema or regular expression", (
        f"{CONSTRAINTS}::test_every_row_of_a_ragged_batch_follows_its_own_grammar_and_is_as_it_is_alone",)),
    "W watermarks": ("watermarks count padding", (
        "plugins/pluglm-watermark/tests/test_green.py::test_a_row_gets_the_same_marks_in_any_batch",
        "plugins/pluglm-watermark/tests/test_synthid.py::test_a_row_gets_the_same_marks_in_any_batch_and_order")),
}  # fmt: skip

PROMPT = torch.tensor([[60, 17, 201, 5, 99, 61]])


@pytest.mark.parametrize("item", DEFECTS)
def test_every_test_that_is_named_is_there(item: str) -> None:
    """The list cannot rot: a test that is renamed or removed fails here."""
    what, tests = DEFECTS[item]
    assert what and tests
    for test in tests:
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), test


def test_the_list_has_every_defect_and_every_probe() -> None:
    found = {item for item in DEFECTS if not item.startswith("W")}
    assert found == {*(f"G{i}" for i in range(1, 10)), *(f"P{i}" for i in range(1, 26))}


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """The usual model behind the familiar face."""
    return hf.AutoModelForCausalLM.from_pretrained(folder)


def tokens(done: Completion | list[Completion]) -> tuple[int, ...]:
    assert isinstance(done, Completion)
    return done.token_ids


def loop(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
) -> Tensor:
    """A callable that a user might write: greedy, without a cache."""
    while not bool(stopping_criteria(input_ids, None).all()):
        input_ids = torch.cat((input_ids, model(input_ids).logits[:, -1:].argmax(-1)), dim=1)
    return input_ids


def test_a_callable_that_declares_a_tokenizer_gets_it(model: Any, lm: pluglm.LanguageModel, folder: Path) -> None:
    """G2, at the doors that users take, and not only behind them."""
    seen: list[Any] = []

    def declares(model: Any, input_ids: Tensor, *args: Any, tokenizer: Any, streamer: Any = None, **kwargs: Any) -> Any:
        seen.extend((tokenizer, streamer))
        return loop(model, input_ids, *args, **kwargs)

    tokenizer, streamer = hf.AutoTokenizer.from_pretrained(folder), Told()
    made = model.generate(PROMPT, custom_generate=declares, tokenizer=tokenizer, streamer=streamer, max_new_tokens=4)
    assert seen[0] is tokenizer and seen[1] is not None
    plain = lm.complete(PROMPT[0].tolist(), max_new_tokens=4)
    assert made[0, 6:].tolist() == list(tokens(plain))
    seen.clear()
    assert lm.complete(PROMPT[0].tolist(), custom_generate=declares, tokenizer=lm.tokenizer, max_new_tokens=4) == plain
    assert seen[0] is lm.tokenizer


class Told:
    """A streamer that does something at each token."""

    def __init__(self, at: Callable[[Tensor], object] = lambda token: None) -> None:
        self.at = at

    def put(self, value: Tensor) -> None:
        self.at(value)

    def end(self) -> None:
        """Nothing more."""


def test_a_folder_that_brings_code_is_loaded_without_running_it(
    write_model: Callable[..., Path], tmp_path: Path, lm: pluglm.LanguageModel
) -> None:
    """G5 and G7: a model's folder with a decoding method in it is a model; the method runs once it was vendored."""
    folder = write_model(tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(
        f"open({str(ran)!r}, 'w').close()\ndef generate(model, input_ids, **kwargs):\n    return input_ids\n"
    )
    plain = tokens(lm.complete(PROMPT[0].tolist(), max_new_tokens=4))
    assert hf.AutoModelForCausalLM.from_pretrained(folder).generate(PROMPT, max_new_tokens=4)[0, 6:].tolist() == [
        *plain
    ]
    assert tokens(pluglm.load(folder).complete(PROMPT[0].tolist(), max_new_tokens=4)) == plain
    for refused in (
        lambda: hf.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
        lambda: lm.generate([5, 6], custom_generate=str(folder), max_new_tokens=2),
    ):
        with pytest.raises(PluglmError, match="pluglm vendor"):
            refused()
    assert not ran.exists()


def test_generate_stays_the_method_that_it_was(model: Any, lm: pluglm.LanguageModel) -> None:
    """G5: after a recipe ran, `generate` is still the documented method, and gradients are as they were."""
    asked: list[bool] = []

    def asks(model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return loop(model, input_ids, *args, **kwargs)

    methods = [type(owner).generate for owner in (model, lm)]
    with torch.enable_grad():
        model.generate(PROMPT, custom_generate=asks, max_new_tokens=2)
        lm.generate([5, 6], custom_generate=asks, max_new_tokens=2)
        assert torch.is_grad_enabled()
    assert asked == [False, False]
    assert [owner.generate.__func__ for owner in (model, lm)] == methods
    assert {"custom_generate", "streamer"} <= set(inspect.signature(model.generate).parameters)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex", "paged"])
def test_a_padded_row_gets_its_own_logits_under_every_attention(folder: Path, attention: str) -> None:
    """P6: the reference drops the mask of an attention that was registered without a mask function: 0.30 off."""
    lm = pluglm.load(folder, attention=attention)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    ids = torch.cat((torch.tensor([[7, 7, 7, 60, 17, 201]]), PROMPT))
    with torch.no_grad():
        together = lm.model(ids, attention_mask=mask).logits
        alone = lm.model(ids[:1, 3:]).logits
        unmasked = lm.model(ids).logits
    torch.testing.assert_close(together[:1, 3:], alone, atol=1e-4, rtol=1e-4)
    assert (unmasked[:1, 3:] - alone).abs().max() > 0.1, "the padding would be seen"


def test_an_unknown_part_is_refused_with_the_names_that_there_are(folder: Path, model: Any) -> None:
    """P7 and P8."""
    for call, names in (
        (lambda: pluglm.load(folder, attention="sdpaa"), ("sdpaa", "eager", "sdpa", "flex")),
        (lambda: pluglm.load(folder, cache="magic"), ("magic", "dynamic", "static", "quantized", "paged")),
        (
            lambda: hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="wavy"),
            ("wavy", "eager", "sdpa", "flex"),
        ),
        (
            lambda: model.generate(PROMPT, cache_implementation="magic", max_new_tokens=2),
            ("magic", "dynamic", "static", "quantized"),
        ),
    ):
        with pytest.raises((PluginNotFoundError, InputError)) as caught:
            call()
        for name in names:
            assert name in str(caught.value), (name, str(caught.value))


MOVED: dict[str, dict[str, Any]] = {
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    "constrained beams": {"num_beams": 3, "force_words_ids": [[44, 45]]},
}


@pytest.mark.parametrize("said", MOVED.values(), ids=MOVED)
def test_every_mode_that_was_moved_away_runs_without_trust_and_network(
    said: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P15: on the reference each raises without trust_remote_code=True, and then fetches code."""

    def no_network(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    made = model.generate(PROMPT, max_new_tokens=6, **said)
    assert made.shape[0] == 1 and 6 < made.shape[1] <= 12
    if "force_words_ids" in said:
        assert "44, 45" in str(made[0, 6:].tolist())
    else:
        assert made.tolist() != model.generate(PROMPT, max_new_tokens=6).tolist(), "the setting was read"


def test_cells_that_are_not_the_next_ones_are_refused(model: Any, lm: pluglm.LanguageModel) -> None:
    """P16: the reference takes any cache_position and looks at none."""
    for forward, cache in ((lm.model, lm.new_cache()), (model, hf.DynamicCache())):
        with torch.no_grad():
            forward(PROMPT, past_key_values=cache, use_cache=True)
            right = forward(PROMPT[:, :1], past_key_values=cache, cache_position=torch.tensor([6])).logits
            with pytest.raises(InputError, match="cache_position"):
                forward(PROMPT[:, :1], past_key_values=cache, cache_position=torch.tensor([3]))
            both = lm.model(torch.cat((PROMPT, PROMPT[:, :1]), dim=1)).logits
        torch.testing.assert_close(right[:, -1], both[:, -1], atol=1e-4, rtol=1e-4)


def test_no_signature_is_looked_up_for_a_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference asks `inspect` about each processor at each token."""
    asked: list[Any] = []
    signature = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda *args, **kwargs: asked.append(args) or signature(*args, **kwargs))

    def count(new: int, **said: Any) -> int:
        asked.clear()
        processors = hf.LogitsProcessorList([lambda ids, scores: scores])
        made = model.generate(PROMPT, logits_processor=processors, max_new_tokens=new, eos_token_id=[], **said)
        assert made.shape[1] == 6 + new
        return len(asked)

    for said in ({}, {"custom_generate": loop}, {"num_beams": 2}):
        count(2, **said)  # what is looked up once for the process
        assert count(3, **said) == count(23, **said), said


def test_early_exit_leaves_the_model_whole_for_a_call_in_between(lm: pluglm.LanguageModel) -> None:
    """The reference lowers config.num_hidden_layers while its draft runs; a second call then runs half a model."""
    prompt, between = PROMPT[0].tolist(), []
    plain = tokens(lm.complete(prompt, max_new_tokens=8))
    streamer = Told(lambda token: between.append(tokens(lm.complete(prompt, max_new_tokens=8))))
    done = lm.complete(prompt, max_new_tokens=8, assistant_early_exit=1, streamer=streamer)
    assert tokens(done) == plain
    assert between == [plain] * 8
