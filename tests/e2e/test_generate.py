"""`generate`, `complete`, `stream`, caches, saving and plans, over whole models loaded from files."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pluglm
from pluglm import InputError, Plan, PlanError
from pluglm.completions import Completion

CHAT = [{"role": "user", "content": "hello world"}]
LONGER = [*CHAT, {"role": "assistant", "content": "fine !"}, {"role": "user", "content": "and the cat ?"}]
IDS = (60, 17, 201, 5, 99)
CONTEXT = 192


def one(done: Completion | list[Completion]) -> Completion:
    assert isinstance(done, Completion)
    return done


def many(done: Completion | list[Completion]) -> list[Completion]:
    assert isinstance(done, list)
    return done


# What may be passed as a prompt


def prompts(lm: pluglm.LanguageModel) -> dict[str, tuple[Any, list[tuple[int, ...]] | None, tuple[int, ...] | None]]:
    """Form -> (prompt, ids of each row where the answer is a list, else None, ids where it is one)."""
    assert lm.tokenizer is not None
    cat, mat = (tuple(lm.tokenizer.encode(text)) for text in ("the cat", "a mat and a book"))
    chat, longer = (tuple(lm.tokenizer.apply_chat_template(messages)) for messages in (CHAT, LONGER))
    return {
        "text": ("the cat", None, cat),
        "texts": (["the cat", "a mat and a book"], [cat, mat], None),
        "one text in a list": (["the cat"], [cat], None),
        "tuple of texts": (("the cat", "a mat and a book"), [cat, mat], None),
        "messages": (CHAT, None, chat),
        "chats": ([CHAT, LONGER], [chat, longer], None),
        "ids": (list(IDS), None, IDS),
        "ids in a tuple": (IDS, None, IDS),
        "rows of ids": ([list(IDS), [8, 9]], [IDS, (8, 9)], None),
        "tensor [T]": (torch.tensor(IDS), None, IDS),
        "tensor [B, T]": (torch.tensor([[8, 9], [9, 10]]), [(8, 9), (9, 10)], None),
        "text and ids mixed": (["the cat", list(IDS)], [cat, IDS], None),
        "no text": ("", None, (0,)),
    }


FORMS = (
    "text", "texts", "one text in a list", "tuple of texts", "messages", "chats", "ids", "ids in a tuple",
    "rows of ids", "tensor [T]", "tensor [B, T]", "text and ids mixed", "no text",
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_prompt_is_answered_as_its_token_ids_are(lm: pluglm.LanguageModel, form: str) -> None:
    prompt, rows, single = prompts(lm)[form]
    done = lm.complete(prompt, max_new_tokens=6)
    text = lm.generate(prompt, max_new_tokens=6)
    if single is not None:
        assert text == one(done).text and one(done).num_prompt_tokens == len(single)
        assert one(done) == lm.complete(list(single), max_new_tokens=6)
    else:
        assert rows is not None
        assert text == [c.text for c in many(done)]
        assert [c.num_prompt_tokens for c in many(done)] == [len(row) for row in rows]
        assert many(done) == [lm.complete(list(row), max_new_tokens=6) for row in rows]


def test_a_completion_says_all_that_is_known(lm: pluglm.LanguageModel) -> None:
    done = one(lm.complete(list(IDS), max_new_tokens=9, return_logprobs=True))
    assert lm.tokenizer is not None
    assert done.text == lm.tokenizer.decode(done.token_ids)
    assert (len(done.token_ids), done.num_prompt_tokens, done.finish_reason) == (9, len(IDS), "length")
    assert done.logprobs is not None and len(done.logprobs) == 9
    logits = lm.model(torch.tensor([[*IDS, *done.token_ids[:-1]]])).logits[0, len(IDS) - 1 :]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(done.token_ids)[:, None])[:, 0]
    assert torch.tensor(done.logprobs) == pytest.approx(expected, abs=1e-4)


def test_an_end_token_ends_and_leaves_no_text(lm: pluglm.LanguageModel) -> None:
    free = one(lm.complete(list(IDS), max_new_tokens=12))
    end = next(i for n, i in enumerate(free.token_ids) if n >= 3 and i not in free.token_ids[:n])
    at = free.token_ids.index(end)
    done = one(lm.complete(list(IDS), max_new_tokens=12, eos_token_id=end))
    assert done.token_ids == free.token_ids[: at + 1] and done.finish_reason == "eos"
    # One row ends early, the other goes on.
    rows = many(lm.complete([list(IDS), [8, 9]], max_new_tokens=12, eos_token_id=end))
    assert rows[0].token_ids == done.token_ids
    assert rows[1] == lm.complete([8, 9], max_new_tokens=12, eos_token_id=end)


# Streams


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "seed": 4}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("prompt", ["the cat", CHAT, list(IDS)], ids=["text", "chat", "ids"])
def test_the_pieces_of_a_stream_are_the_text_of_generate(
    lm: pluglm.LanguageModel, prompt: Any, settings: dict[str, Any]
) -> None:
    pieces = list(lm.stream(prompt, max_new_tokens=40, **settings))
    assert len(pieces) > 10 and all(pieces)
    assert "".join(pieces) == lm.generate(prompt, max_new_tokens=40, **settings)


def test_a_stream_stops_where_generate_stops(lm: pluglm.LanguageModel) -> None:
    stop = stop_inside(lm)
    assert "".join(lm.stream("the cat", max_new_tokens=30, stop_strings=stop)) == lm.generate(
        "the cat", max_new_tokens=30, stop_strings=stop
    )


def test_the_end_tokens_text_is_in_neither(lm: pluglm.LanguageModel) -> None:
    free = one(lm.complete("the cat", max_new_tokens=30))
    end = next(i for n, i in enumerate(free.token_ids) if n >= 6 and i not in free.token_ids[:n])
    whole = lm.generate("the cat", max_new_tokens=30, eos_token_id=end)
    assert "".join(lm.stream("the cat", max_new_tokens=30, eos_token_id=end)) == whole


def test_closing_a_stream_ends_the_generation(lm: pluglm.LanguageModel) -> None:
    steps = []

    def count(ids: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        steps.append(1)
        return torch.zeros(len(ids), dtype=torch.bool)

    stream = lm.stream("the cat", max_new_tokens=180, stopping_criteria=[count])
    first = next(iter(stream))
    stream.close()  # type: ignore[attr-defined]  # every iterator of `stream` is a generator
    assert first and len(steps) < 180
    assert not [t for t in threading.enumerate() if t.name == "pluglm-stream"]
    assert lm.generate("the cat", max_new_tokens=3)


def test_what_breaks_in_a_stream_reaches_its_reader(lm: pluglm.LanguageModel) -> None:
    def broken(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > 12:
            raise ZeroDivisionError("a processor of the caller's")
        return scores

    pieces: list[str] = []
    with pytest.raises(ZeroDivisionError, match="of the caller's"):
        pieces.extend(lm.stream(list(IDS), max_new_tokens=50, logits_processor=[broken]))
    assert pieces
    assert not [t for t in threading.enumerate() if t.name == "pluglm-stream"]


# Batches, limits, stop strings


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.1, "top_p": 0.9}], ids=["greedy", "sampling"])
def test_a_ragged_batch_gives_each_row_what_it_gives_alone(lm: pluglm.LanguageModel, settings: dict[str, Any]) -> None:
    rows = [list(IDS), [8], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50], [7, 7]]
    seeds = [{"seed": (100 + i,)} if settings else {} for i in range(len(rows))]
    together: dict[str, Any] = {"seed": tuple(100 + i for i in range(len(rows)))} if settings else {}
    done = many(lm.complete(rows, max_new_tokens=30, **settings, **together))
    alone = [
        one(lm.complete(row, max_new_tokens=30, **settings, **seed)) for row, seed in zip(rows, seeds, strict=True)
    ]
    assert [c.token_ids for c in done] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in done}) == len(rows)


def test_a_seed_repeats_a_sample_and_another_does_not(lm: pluglm.LanguageModel) -> None:
    first, again, other = (lm.generate("the cat", temperature=1.5, max_new_tokens=30, seed=s) for s in (1, 1, 2))
    assert first == again != other


def stop_inside(lm: pluglm.LanguageModel) -> str:
    """Three characters from the middle of what the model says of "the cat", not where a token begins."""
    text = lm.generate("the cat", max_new_tokens=30)
    assert isinstance(text, str)
    clean = max(text.split("\ufffd"), key=len)
    assert len(clean) >= 3
    return clean[-3:]


def test_a_stop_string_ends_the_text_before_it(lm: pluglm.LanguageModel) -> None:
    stop = stop_inside(lm)
    free = one(lm.complete("the cat", max_new_tokens=30))
    done = one(lm.complete("the cat", max_new_tokens=30, stop_strings=[stop, "\x00never"]))
    assert done.text == free.text.partition(stop)[0]
    assert done.finish_reason == "stop" and len(done.token_ids) < len(free.token_ids)


def test_without_a_limit_the_context_sets_it(lm: pluglm.LanguageModel) -> None:
    prompt = [(7 * i) % 280 + 5 for i in range(CONTEXT - 11)]
    done = one(lm.complete(prompt))
    assert (len(done.token_ids), done.finish_reason) == (11, "length")


def test_of_a_ragged_batch_no_row_leaves_the_context(lm: pluglm.LanguageModel) -> None:
    prompt = [(7 * i) % 280 + 5 for i in range(CONTEXT - 4)]
    assert [len(c.token_ids) for c in many(lm.complete([prompt, [8, 9]]))] == [4, 4]


def test_several_sequences_of_a_prompt_come_side_by_side(lm: pluglm.LanguageModel) -> None:
    settings: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_new_tokens": 12}
    texts = lm.generate("the cat", num_return_sequences=3, **settings)
    assert isinstance(texts, list) and len(set(texts)) == 3
    assert texts[0] == lm.generate("the cat", **settings)
    done = many(lm.complete(["the cat", "a mat and a book"], num_return_sequences=2, **settings))
    assert [c.num_prompt_tokens for c in done] == [done[0].num_prompt_tokens] * 2 + [done[2].num_prompt_tokens] * 2
    assert done[0].num_prompt_tokens != done[2].num_prompt_tokens


# Caches


def test_a_kept_cache_gives_each_turn_what_a_fresh_call_gives(lm: pluglm.LanguageModel) -> None:
    cache, ids = lm.new_cache(), list(IDS)
    for turn in ([], [61, 62, 63], [8]):
        ids += turn
        kept = one(lm.complete(ids, past_key_values=cache, max_new_tokens=7))
        assert kept == lm.complete(ids, max_new_tokens=7)
        ids += kept.token_ids
        assert cache.length == len(ids) - 1


def test_a_kept_cache_of_several_rows(lm: pluglm.LanguageModel) -> None:
    cache = lm.new_cache(batch_size=2)
    rows = [list(IDS), list(reversed(IDS))]
    first = many(lm.complete(rows, past_key_values=cache, max_new_tokens=4))
    rows = [[*row, *c.token_ids, 33] for row, c in zip(rows, first, strict=True)]
    assert lm.complete(rows, past_key_values=cache, max_new_tokens=4) == lm.complete(rows, max_new_tokens=4)


def test_a_loop_by_hand_is_what_generate_does(lm: pluglm.LanguageModel) -> None:
    ids, cache, new = torch.tensor([IDS]), None, []
    for _ in range(12):
        out = lm.model(ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        new.append(int(ids))
    assert tuple(new) == one(lm.complete(list(IDS), max_new_tokens=12)).token_ids


# Saving


def logits(lm: pluglm.LanguageModel) -> torch.Tensor:
    result: torch.Tensor = lm.model(torch.tensor([IDS, IDS[::-1]])).logits.detach()
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_is_saved_is_loaded_bit_by_bit(
    tmp_path: Path, write_model: Callable[..., Path], tied: bool, dtype: torch.dtype
) -> None:
    lm = pluglm.load(write_model(tmp_path / "first", tied=tied, dtype=dtype))
    assert lm.model.dtype == dtype
    lm.save(tmp_path / "second")
    again = pluglm.load(tmp_path / "second")
    assert torch.equal(logits(lm), logits(again)) and again.model.dtype == dtype
    assert again.generate("the cat", max_new_tokens=9) == lm.generate("the cat", max_new_tokens=9)
    assert again.generate(CHAT, max_new_tokens=9) == lm.generate(CHAT, max_new_tokens=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "second"]


def test_a_model_is_saved_over_the_files_it_is_mapped_from(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    lm = pluglm.load(write_model(tmp_path / "model"))
    before = logits(lm).clone()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.mul_(2)
    changed = logits(lm).clone()
    assert torch.allclose(changed, 2 * before)
    lm.save(tmp_path / "model")
    assert torch.equal(logits(lm), changed)
    assert torch.equal(logits(pluglm.load(tmp_path / "model")), changed)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_changing_a_loaded_model_leaves_its_file_alone(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "model")
    lm, before = pluglm.load(path), (path / "model.safetensors").read_bytes()
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.zero_()
    assert (path / "model.safetensors").read_bytes() == before


def test_a_model_saved_in_another_dtype_loads_in_it(tmp_path: Path, folder: Path) -> None:
    lm = pluglm.load(folder, dtype="bfloat16")
    lm.save(tmp_path / "half")
    again = pluglm.load(tmp_path / "half")
    assert again.plan.dtype == "bfloat16" and torch.equal(logits(lm), logits(again))


# Quantizing


def test_packing_while_loading_is_packing_a_loaded_model(
    folder: Path, lm: pluglm.LanguageModel, tmp_path: Path
) -> None:
    reading = pluglm.load(folder, quantizer="torchao")
    loaded = pluglm.load(folder)
    assert loaded.quantize("torchao") == 14
    assert torch.equal(logits(reading), logits(loaded))
    assert not torch.equal(logits(reading), logits(lm))
    assert torch.allclose(logits(reading), logits(lm), atol=2.0)
    assert loaded.plan["quantizer"].provider == "pluglm-quantizer-torchao:quantizer/torchao"
    assert loaded.plan.hash == reading.plan.hash
    reading.save(tmp_path / "packed")
    packed = pluglm.load(tmp_path / "packed")
    assert torch.equal(logits(packed), logits(reading))
    assert (tmp_path / "packed" / "model.safetensors").stat().st_size < 0.7 * (
        folder / "model.safetensors"
    ).stat().st_size
    with pytest.raises(PlanError, match="packed already"):
        pluglm.load(tmp_path / "packed", quantizer="torchao")
    with pytest.raises(PlanError, match="packed already"):
        packed.quantize("torchao")
    packed.save(tmp_path / "twice")
    assert torch.equal(logits(pluglm.load(tmp_path / "twice")), logits(reading))


def test_skipped_layers_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    some = pluglm.load(folder, quantizer="torchao", quantizer_skip=("layers.0.*",))
    late = pluglm.load(folder)
    assert late.quantize("torchao", skip=("layers.0.*",)) == 7
    assert torch.equal(logits(some), logits(late))
    all_packed = pluglm.load(folder, quantizer="torchao")
    assert not torch.equal(logits(some), logits(all_packed))
    # What was skipped decides the result, so it is in the plan, and a replay skips it too.
    assert some.plan.hash == late.plan.hash != all_packed.plan.hash
    assert torch.equal(logits(pluglm.load(folder, plan=some.plan)), logits(some))
    # The folder holds both kinds of layers.
    some.save(tmp_path / "mixed")
    again = pluglm.load(tmp_path / "mixed")
    assert torch.equal(logits(again), logits(some))
    assert torch.equal(logits(pluglm.load(tmp_path / "mixed", plan=again.plan)), logits(some))


# Plans


@pytest.mark.parametrize(
    "arguments",
    [{}, {"attention": "eager", "cache": "static", "dtype": "bfloat16"}, {"decoding": "sampling"},
     {"quantizer": "torchao:int8"}],
    ids=["auto", "named", "strategy", "packed"],
)  # fmt: skip
def test_explain_gives_the_plan_that_load_follows(folder: Path, arguments: dict[str, Any]) -> None:
    told, plan = pluglm.explain(folder, **arguments), pluglm.load(folder, **arguments).plan
    assert told.hash == plan.hash and told == plan


def test_a_plan_from_json_is_replayed(folder: Path, tmp_path: Path, write_model: Callable[..., Path]) -> None:
    lm = pluglm.load(folder, attention="eager", cache="static", dtype="bfloat16", quantizer="torchao:int8")
    plan = Plan.from_json(json.loads(json.dumps(lm.plan.to_json())))
    again = pluglm.load(folder, plan=plan)
    assert again.plan.hash == lm.plan.hash and torch.equal(logits(again), logits(lm))
    elsewhere = write_model(tmp_path / "same-files")
    assert pluglm.load(elsewhere, plan=plan).plan.hash == plan.hash


def test_a_plan_is_refused_on_other_files_and_beside_named_parts(
    folder: Path, tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    plan = pluglm.explain(folder)
    other = write_model(tmp_path / "other", config={"rope_theta": 501.0})
    with pytest.raises(PlanError, match=r"cannot be replayed here[\s\S]*files differ"):
        pluglm.load(other, plan=plan)
    with pytest.raises(InputError, match="already names every part"):
        pluglm.load(folder, plan=plan, attention="eager")


def test_a_plan_of_a_packed_checkpoint_is_replayed(folder: Path, tmp_path: Path) -> None:
    pluglm.load(folder, quantizer="torchao").save(tmp_path / "packed")
    plan = pluglm.explain(tmp_path / "packed")
    assert pluglm.load(tmp_path / "packed", plan=plan).plan.hash == plan.hash


def test_a_plan_is_replayed_for_a_model_without_a_tokenizer(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    path = write_model(tmp_path / "ids-only", tokenizer=False)
    plan = pluglm.explain(path)
    lm = pluglm.load(path, plan=plan)
    assert lm.plan.hash == plan.hash and lm.tokenizer is None
    assert one(lm.complete(list(IDS), max_new_tokens=5)).text == ""
