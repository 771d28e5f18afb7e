"""What recipes lean on: the helpers of loops, the cache's face, criteria, outputs."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pluglm_hf.cache_face import CacheFace
from pluglm_hf.criteria import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    validate_stopping_criteria,
)
from pluglm_hf.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from pluglm_hf.processors import LogitsProcessor, LogitsProcessorList
from pluglm_hf.recipes.config import RecipeConfig
from pluglm_hf.recipes.failures import RecipeError
from pluglm_hf.recipes.handoff import GenerationMixin
from pluglm_hf.surface import GenerationSurface
from torch import Tensor

from pluglm.errors import CacheError, InputError, UnsupportedRequestError
from pluglm.testing.scripted_model import ScriptedCache, ScriptedModel

IDS = torch.tensor([[5, 7, 9, 11], [6, 8, 10, 12]])


def test_names_that_recipes_ask_for_with_hasattr_are_absent(surface: GenerationSurface) -> None:
    for name in ("_reorder_cache", "_get_initial_cache_position", "no_such_method"):
        assert not hasattr(surface, name)
    assert surface._is_stateful is False
    assert surface._valid_auto_compile_criteria({}, surface.generation_config) is False
    assert surface.get_compiled_call(None) == surface.__call__


def test_the_config_has_what_recipes_read_of_every_config(surface: GenerationSurface) -> None:
    config = surface.config
    assert config.get_text_config().num_hidden_layers == 1
    assert (config.is_encoder_decoder, config.tie_word_embeddings, config.vocab_size) == (False, False, 23)
    assert config._attn_implementation == "sdpa"
    assert config.pad_token_id is None
    with pytest.raises(AttributeError, match="config.json has no 'mamba_d_conv'"):
        _ = config.mamba_d_conv


def test_several_processes_are_refused(surface: GenerationSurface) -> None:
    assert surface._has_unfinished_sequences(False, False, device="cpu") is True
    assert surface._has_unfinished_sequences(torch.tensor(True), False, device="cpu") is False  # type: ignore[arg-type]
    with pytest.raises(InputError, match="synced_gpus=True cannot be honoured"):
        surface._has_unfinished_sequences(False, True)


def test_a_loop_keeps_mask_positions_and_cells_up_to_date(surface: GenerationSurface) -> None:
    outputs = surface(IDS)
    kwargs: dict[str, Any] = {
        "attention_mask": torch.ones(2, 4, dtype=torch.long), "position_ids": torch.arange(4)[None],
        "cache_position": torch.arange(4),
    }  # fmt: skip
    kwargs = surface._update_model_kwargs_for_generation(outputs, kwargs, num_new_tokens=2)
    assert kwargs["attention_mask"].shape == (2, 6)
    assert kwargs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert kwargs["cache_position"].tolist() == [4, 5]
    assert kwargs["past_key_values"].get_seq_length() == 4
    longer = torch.cat((IDS, IDS[:, :2]), dim=1)
    inputs = surface.prepare_inputs_for_generation(longer, **kwargs)
    assert inputs["input_ids"].tolist() == IDS[:, :2].tolist()
    assert inputs["position_ids"].tolist() == [[4, 5]]
    assert "cache_position" not in inputs


def test_a_prompt_is_prefilled_in_pieces(surface: GenerationSurface, model: ScriptedModel) -> None:
    whole = surface._prefill(IDS, RecipeConfig(), {"use_cache": True, "past_key_values": CacheFace()})
    kwargs = {"use_cache": True, "past_key_values": CacheFace(), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    model.fed.clear()
    parts = surface._prefill(IDS, RecipeConfig(prefill_chunk_size=3), kwargs)
    assert model.fed == [3, 1]
    assert torch.equal(parts.logits[:, -1], whole.logits[:, -1])
    assert parts.past_key_values.get_seq_length() == 4
    with pytest.raises(InputError, match="prefill_chunk_size needs a cache"):
        surface._prefill(IDS, RecipeConfig(prefill_chunk_size=3), {"use_cache": False})


def test_a_forward_call_keeps_a_cache_unless_it_is_told_not_to(surface: GenerationSurface) -> None:
    assert surface(IDS).past_key_values.get_seq_length() == 4
    assert surface(IDS, use_cache=False).past_key_values is None
    assert surface(IDS, output_attentions=False, labels=None)["logits"].shape == (2, 4, 23)
    assert isinstance(surface(IDS, return_dict=False), tuple)
    with pytest.raises(InputError, match="output_attentions=True cannot be honoured"):
        surface(IDS, output_attentions=True)
    with pytest.raises(InputError, match="takes no argument 'top_k'"):
        surface(IDS, top_k=3)


@pytest.mark.parametrize("shape", ["again", "and more"])
def test_tokens_that_are_fed_again_are_refused_before_the_model_runs(
    shape: str, surface: GenerationSurface, model: ScriptedModel
) -> None:
    cache = surface(IDS).past_key_values
    more = IDS if shape == "again" else torch.cat((IDS, IDS[:, :1]), dim=1)
    with pytest.raises(RecipeError, match="fed the tokens twice"):
        surface(more, past_key_values=cache)
    with pytest.raises(RecipeError, match="fed the tokens twice"):
        surface(more, past_key_values=cache, position_ids=torch.arange(more.shape[1])[None])
    assert cache.get_seq_length() == 4
    assert model.fed == [4]


def test_a_cache_that_was_moved_is_still_known(surface: GenerationSurface) -> None:
    cache = surface(IDS).past_key_values
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    rows = IDS[[1, 0]]
    with pytest.raises(RecipeError, match="fed the tokens twice"):
        surface(rows, past_key_values=cache)
    cache.crop(2)
    with pytest.raises(RecipeError, match="fed the tokens twice"):
        surface(rows, past_key_values=cache)
    other = copy.deepcopy(cache)
    surface(rows[:, 2:3], past_key_values=other)
    assert (cache.get_seq_length(), other.get_seq_length()) == (2, 3)


def test_a_cache_face_without_a_cache_is_empty(surface: GenerationSurface) -> None:
    face = CacheFace()
    assert (face.get_seq_length(), face.get_max_cache_shape(), len(face), bool(face)) == (0, -1, 0, True)
    assert (face.is_initialized, face.is_croppable, face.batch_size) == (False, True, None)
    face.reorder_cache(torch.tensor([0]))
    face.crop(-0)
    face.reset()
    surface(IDS, past_key_values=face)
    assert (face.get_seq_length(), face.batch_size, face.is_initialized) == (4, 2, True)


def test_an_operation_that_a_layout_lacks_is_named() -> None:
    cache = ScriptedCache(2, 9, frozenset())
    cache.write(IDS, torch.arange(4)[None])
    face = CacheFace(cache)  # type: ignore[arg-type]
    assert (face.get_max_cache_shape(), face.is_croppable) == (9, False)
    for operation, call in (
        ("crop", lambda: face.crop(-1)), ("reorder", lambda: face.reorder_cache(torch.tensor([1, 0]))),
        ("repeat", lambda: face.batch_repeat_interleave(2)), ("fork", lambda: copy.copy(face)),
        ("select", lambda: face.batch_select_indices(torch.tensor([True, False]))),
    ):  # fmt: skip
        with pytest.raises(CacheError, match=f"a scripted cache has no {operation}") as caught:
            call()
        assert caught.value.operation == operation
    with pytest.raises(CacheError, match="cannot write keys and values"):
        face.update(None, None, 0)


def test_stock_generation_of_a_recipe_refuses_searches(surface: GenerationSurface) -> None:
    with pytest.raises(UnsupportedRequestError, match="num_beams=3 cannot be honoured"):
        surface.generate(IDS, num_beams=3)
    with pytest.raises(RecipeError, match="custom_generate='org/other'"):
        GenerationMixin.generate(surface, IDS, custom_generate="org/other")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedRequestError, match="guidance_scale=1.5 cannot be honoured"):
        surface.generate(IDS, guidance_scale=1.5)
    with pytest.raises(UnsupportedRequestError, match="cache_implementation='static' cannot be honoured"):
        surface.generate(IDS, cache_implementation="static")
    with pytest.raises(InputError, match="max_length=3 leaves no room after a prompt of 4 tokens"):
        surface.generate(IDS, max_length=3)


def test_pad_tokens_are_padding_where_no_mask_says_otherwise(surface: GenerationSurface) -> None:
    padded = torch.tensor([[0, 0, 6, 8], [5, 7, 9, 11]])
    found = surface.generate(padded, pad_token_id=0, max_new_tokens=3)
    alone = surface.generate(torch.tensor([[6, 8]]), max_new_tokens=3)
    assert found[0, 4:].tolist() == alone[0, 2:].tolist()
    assert surface.generate(padded, max_new_tokens=3)[0, 4:].tolist() != alone[0, 2:].tolist()


# Criteria


def test_a_list_of_criteria_ends_a_row_where_one_says_so() -> None:
    class Odd(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return input_ids[:, -1] % 2 == 1

    listed = StoppingCriteriaList([MaxLengthCriteria(6), EosTokenCriteria([12, 99]), Odd()])
    assert listed.max_length == 6
    assert listed(IDS, None).tolist() == [True, True]
    assert StoppingCriteriaList([Odd()])(IDS, None).tolist() == [True, False]
    assert listed(IDS[:, :3], None).tolist() == [True, False]
    assert listed(torch.cat((IDS, IDS), 1), None).tolist() == [True, True]
    assert [criterion.eos_token_id.tolist() for criterion in listed if hasattr(criterion, "eos_token_id")] == [[12, 99]]
    assert StoppingCriteriaList().max_length is None
    with pytest.raises(NotImplementedError, match="has no __call__"):
        StoppingCriteria()(IDS, None)


def test_lengths_that_contradict_each_other_are_refused() -> None:
    assert validate_stopping_criteria(StoppingCriteriaList(), 5).max_length == 5
    assert len(validate_stopping_criteria(StoppingCriteriaList([MaxLengthCriteria(5)]), 5)) == 1
    with pytest.raises(InputError, match="end at 5 tokens, max_length=6 says otherwise"):
        validate_stopping_criteria(StoppingCriteriaList([MaxLengthCriteria(5)]), 6)


def test_time_and_confidence_end_rows() -> None:
    assert MaxTimeCriteria(5.0, initial_timestamp=0.0)(IDS, None).tolist() == [True, True]
    assert MaxTimeCriteria(500.0)(IDS, None).tolist() == [False, False]
    scores = (torch.zeros(1, 23),)
    assert ConfidenceCriteria(0.5)(IDS[:1], scores).tolist() == [True]
    assert ConfidenceCriteria(0.01)(IDS[:1], scores).tolist() == [False]


def test_a_stop_string_counts_when_its_end_is_new() -> None:
    def decode(ids: list[int]) -> str:
        return "".join("abcdefghijklmnopqrstuvw"[i] for i in ids)

    for tokenizer in (decode, SimpleNamespace(decode=decode)):
        stop = StopStringCriteria(tokenizer, ["jl", "zz"])
        assert stop(IDS, None).tolist() == [True, False]
        assert stop(torch.cat((IDS, IDS[:, :1]), 1), None).tolist() == [False, False]
    with pytest.raises(InputError, match="a stop string is empty"):
        StopStringCriteria(decode, [""])


# Processors and outputs


def test_a_processor_that_takes_more_is_given_more() -> None:
    class Plain(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores + 1

    class Grouped(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor, beam_group_idx: int) -> Tensor:
            return scores * beam_group_idx

    listed = LogitsProcessorList([Plain(), Grouped()])
    assert listed(IDS, torch.ones(2, 3), beam_group_idx=5).tolist() == [[10.0] * 3] * 2
    listed.append(lambda ids, scores: scores - 1)
    assert listed(IDS, torch.ones(2, 3), beam_group_idx=5).tolist() == [[9.0] * 3] * 2
    with pytest.raises(InputError, match="Grouped needs beam_group_idx") as caught:
        listed(IDS, torch.ones(2, 3))
    assert caught.value.argument == "beam_group_idx"


def test_an_output_is_read_by_attribute_key_and_index() -> None:
    output = GenerateDecoderOnlyOutput(sequences=IDS, logits=(IDS,))
    assert output.sequences is output["sequences"] is output[0] is IDS
    assert list(output) == ["sequences", "logits"]
    assert output.get("scores") is None and output.scores is None
    assert "scores" not in output
    assert GenerateBeamDecoderOnlyOutput.FIELDS == (
        "sequences", "sequences_scores", "scores", "logits", "beam_indices", "attentions", "hidden_states",
        "past_key_values",
    )  # fmt: skip
