"""A cache that outlives a call: chats of several turns, saved prefixes, the manual loop, pairs of keys and values.

Every layout that gives back what it was given (so says its package) must pass, on a model that learned something, in
float32; the reference is always a call without a cache of one's own over the same token ids.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_caches.prefix_store import PrefixStore
from pluglm_caches.tuples import from_tuples, to_tuples
from torch import Tensor

import pluglm
from pluglm.completions import Completion
from pluglm.errors import CacheError, InputError, PlanError
from pluglm.planner import loses
from pluglm.registry import Registry

LOSSLESS = sorted(p.name for p in Registry.installed().of("cache") if not loses(p))
#: Layouts for other models: their every layer must have a window, or chunks. Whatever else refuses is a failure.
REFUSING = {"chunked", "sliding"}
LAYOUTS = [name for name in LOSSLESS if name not in REFUSING]
TEXTS = ("def read_csv(path):\n", "\n\nclass Queue:\n    def put(self, item):\n", "import os\n\ndef main():\n    ")
NEW = 6


@cache
def load(layout: str) -> pluglm.LanguageModel:
    return pluglm.load("pystdlib", dtype="float32", device="cpu", cache=layout)


@pytest.fixture(params=LAYOUTS)
def lm(request: pytest.FixtureRequest) -> pluglm.LanguageModel:
    return load(request.param)


def encoded() -> list[list[int]]:
    """Ids of the texts; all of different lengths."""
    tokenizer = load("dynamic").tokenizer
    assert tokenizer is not None
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert len({len(row) for row in ids}) == len(ids)
    return ids


def complete(lm: pluglm.LanguageModel, prompt: Any, **settings: Any) -> list[list[int]]:
    """New tokens of each row; nothing ends early, so that every turn has as many."""
    done = lm.complete(prompt, **{"max_new_tokens": NEW, "eos_token_id": [], **settings})
    return [list(one.token_ids) for one in ([done] if isinstance(done, Completion) else done)]


@cache
def _alone(ids: tuple[int, ...], settings: tuple[tuple[str, Any], ...]) -> tuple[int, ...]:
    return tuple(complete(load("dynamic"), list(ids), **dict(settings))[0])


def alone(ids: Sequence[int], **settings: Any) -> list[int]:
    """The reference: the new tokens of one call over all ids, with no cache of one's own and no other row."""
    return list(_alone(tuple(ids), tuple(settings.items())))


def new_cache(lm: pluglm.LanguageModel, rows: int = 1) -> Any:
    return lm.new_cache(batch_size=rows, capacity=200)


def test_the_layouts_under_test_are_those_that_are_installed() -> None:
    assert {"dynamic", "static", "hybrid"} <= set(LAYOUTS)
    for layout in sorted(REFUSING & set(LOSSLESS)):
        with pytest.raises(PlanError, match="lacks the layer kind kv"):
            load(layout)


# Chats of several turns


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "sampling"])
def test_a_chat_of_three_turns_with_one_cache_is_three_calls_over_all_tokens(
    lm: pluglm.LanguageModel, settings: dict[str, Any]
) -> None:
    kept, ids, fed = new_cache(lm), [], 0
    for turn in encoded():
        ids = [*ids, *turn]
        before = kept.length
        (answer,) = complete(lm, ids, past_key_values=kept, **settings)
        assert answer == alone(ids, **settings)
        ids = [*ids, *answer]
        assert kept.length == len(ids) - 1, "the last token was never fed"
        fed += kept.length - before
    assert fed == len(ids) - 1, "no token went through the model twice"


def test_a_batch_of_chats_that_grow_differently_goes_on_with_one_cache(lm: pluglm.LanguageModel) -> None:
    first, second, third = encoded()
    kept, chats = new_cache(lm, 3), [first, second, third]
    for said in ([second, [7], first], [[5, 6], third, [9]], [[8], [8], [8]]):
        answers = complete(lm, chats, past_key_values=kept)
        assert answers == [alone(chat) for chat in chats]
        chats = [[*chat, *answer, *more] for chat, answer, more in zip(chats, answers, said, strict=True)]


def test_a_row_that_ended_early_goes_on_with_the_others(lm: pluglm.LanguageModel) -> None:
    chats, kept = encoded()[:2], new_cache(lm, 2)
    end = next(token for token in alone(chats[0])[:-2] if token not in alone(chats[1]))
    answers = complete(lm, chats, past_key_values=kept, eos_token_id=end)
    assert len(answers[0]) < len(answers[1]) == NEW, "one ends, the other does not"
    chats = [[*chat, *answer, 20, 21] for chat, answer in zip(chats, answers, strict=True)]
    assert complete(lm, chats, past_key_values=kept) == [alone(chat) for chat in chats]


def test_a_reused_cache_whose_rows_have_nothing_new_is_refused(lm: pluglm.LanguageModel) -> None:
    first, second, _ = encoded()
    kept = new_cache(lm, 2)
    complete(lm, [first, second], past_key_values=kept)
    for chats, word in (([first, second], "no new token"), ([[*first, *range(1, 40)], second], "no token after")):
        with pytest.raises(InputError, match=word):
            complete(lm, chats, past_key_values=kept)
    with pytest.raises(InputError, match="holds 2 rows"):
        complete(lm, [[*first, *range(1, 40)]] * 3, past_key_values=kept)


def test_a_branch_of_a_chat_leaves_the_other_alone(lm: pluglm.LanguageModel) -> None:
    first, second, third = encoded()
    kept = new_cache(lm)
    (answer,) = complete(lm, first, past_key_values=kept)
    branch = kept.fork()
    one, two = ([*first, *answer, *more] for more in (second, third))
    assert complete(lm, one, past_key_values=kept) == [alone(one)]
    assert complete(lm, two, past_key_values=branch) == [alone(two)]


def test_after_a_closed_stream_a_cropped_cache_goes_on(lm: pluglm.LanguageModel) -> None:
    first, second, _ = encoded()
    kept = new_cache(lm)
    stream = lm.stream(first, past_key_values=kept, max_new_tokens=100, eos_token_id=[])
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert kept.length >= len(first)
    kept.crop(len(first))
    assert complete(lm, [*first, *second], past_key_values=kept) == [alone([*first, *second])]


# Prefixes in files

CONTINUE = """
import json, sys
import pluglm
from pluglm_caches.prefix_store import PrefixStore
folder, prompt, layouts, new = json.loads(sys.argv[1])
found = {}
for layout in layouts:
    lm = pluglm.load("pystdlib", dtype="float32", device="cpu", cache=layout)
    fed, right = [], lm.model._run
    def counted(inputs):
        fed.append(inputs.token_ids.shape[1])
        return right(inputs)
    lm.model._run = counted
    for writer in layouts:
        store = PrefixStore(folder, salt=writer)
        cache, length = store.load(lm.model.layout, prompt, lm.fingerprint(), capacity=200)
        fed.clear()
        done = lm.complete(prompt, past_key_values=cache, max_new_tokens=new, eos_token_id=[])
        found[f"{writer} to {layout}"] = [length, sum(fed), done.token_ids]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What another process made of prefixes that this one stored, for each pair of layouts."""
    folder = tmp_path_factory.mktemp("prefixes")
    first, second, _ = encoded()
    for layout in LAYOUTS:
        lm = load(layout)
        kept = new_cache(lm)
        complete(lm, first, past_key_values=kept)
        PrefixStore(folder, salt=layout).put(kept, [*first, *alone(first)], lm.fingerprint())
    passed = json.dumps([str(folder), [*first, *second], LAYOUTS, NEW])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PLUGLM_PROGRESS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CONTINUE, passed], env=environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("writer", LAYOUTS)
def test_a_prefix_stored_here_is_continued_in_another_process(
    elsewhere: dict[str, Any], writer: str, reader: str
) -> None:
    """The stored text is longer, so it is cropped to what the prompt shares; only the rest is fed."""
    first, second, _ = encoded()
    length, fed, tokens = elsewhere[f"{writer} to {reader}"]
    assert length >= len(first)
    assert fed == len(second) + len(first) - length + NEW - 1
    assert [tokens] == [alone([*first, *second])]


def test_a_saved_cache_is_loaded_again_and_no_other_models_is(lm: pluglm.LanguageModel, tmp_path: Path) -> None:
    first, second, _ = encoded()
    kept = new_cache(lm)
    (answer,) = complete(lm, first, past_key_values=kept)
    kept.save(tmp_path / "chat.safetensors", fingerprint=lm.fingerprint())
    again = new_cache(lm)
    again.load(tmp_path / "chat.safetensors", fingerprint=lm.fingerprint())
    longer = [*first, *answer, *second]
    assert complete(lm, longer, past_key_values=again) == [alone(longer)]
    with pytest.raises(CacheError, match="made with the model"):
        again.load(tmp_path / "chat.safetensors", fingerprint="another model")


def test_a_fingerprint_follows_weights_and_dtype_and_not_the_parts() -> None:
    one = load("dynamic").fingerprint()
    assert (
        one == load("static").fingerprint() == pluglm.load("pystdlib", dtype="float32", attention="eager").fingerprint()
    )
    assert one != pluglm.load("pystdlib", dtype="bfloat16").fingerprint()
    changed = pluglm.load("pystdlib", dtype="float32")
    assert changed.plan.fingerprint == load("dynamic").plan.fingerprint
    with torch.no_grad():
        weight = changed.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        weight.view(-1)[12345] += 1e-6
    assert changed.plan.fingerprint == load("dynamic").plan.fingerprint, "which is made before a weight is read"
    assert changed.fingerprint() != one
    packed = pluglm.load("pystdlib", quantizer="torchao:int8", dtype="float32")
    assert packed.fingerprint() not in (one, changed.fingerprint())
    assert packed.fingerprint() == pluglm.load("pystdlib", quantizer="torchao:int8", dtype="float32").fingerprint()


# The manual loop


def padded(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """input_ids and attention_mask, padded on the left, as a tokenizer of the field gives them."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + list(row) for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def manual_loop(
    lm: pluglm.LanguageModel, inputs: dict[str, Tensor], kept: Any, *, cells: bool = False
) -> list[list[int]]:
    """The loop as it is written by hand. cells: say the cells as well, as some do."""
    tokens: list[Tensor] = []
    start = kept.length if kept is not None else 0
    for _ in range(NEW):
        more = {"cache_position": torch.arange(start, start + inputs["input_ids"].shape[1])} if cells else {}
        output = lm.model(**inputs, **more, past_key_values=kept, use_cache=True)
        kept, start = output.past_key_values, start + inputs["input_ids"].shape[1]
        tokens.append(output.logits[:, -1:].argmax(-1))
        mask = inputs["attention_mask"]
        inputs = {"input_ids": tokens[-1], "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)}
    assert kept.length == mask.shape[1]
    found: list[list[int]] = torch.cat(tokens, dim=1).tolist()
    return found


@pytest.mark.parametrize(
    ("rows", "own", "cells"), [(1, True, True), (1, False, False), (3, True, False), (3, False, True)],
    ids=["one row", "one row, the first pass makes the cache", "ragged rows", "ragged rows, the first pass makes it"],
)  # fmt: skip
def test_the_manual_loop_makes_the_tokens_of_generate(
    lm: pluglm.LanguageModel, rows: int, own: bool, cells: bool
) -> None:
    prompts = encoded()[:rows]
    with torch.no_grad():
        found = manual_loop(lm, padded(prompts), new_cache(lm, rows) if own else None, cells=cells)
    assert found == complete(lm, prompts) == [alone(prompt) for prompt in prompts]


def test_the_manual_loop_goes_on_where_generate_stopped_and_back(lm: pluglm.LanguageModel) -> None:
    first, second, third = encoded()
    kept = new_cache(lm, 2)
    chats = [first, second]
    answers = complete(lm, chats, past_key_values=kept)
    chats = [[*chat, *answer, *third] for chat, answer in zip(chats, answers, strict=True)]
    inputs = padded(chats)
    new = {"input_ids": inputs["input_ids"][:, kept.length :], "attention_mask": inputs["attention_mask"]}
    with torch.inference_mode():
        found = manual_loop(lm, new, kept)
    assert found == [alone(chat) for chat in chats]
    chats = [[*chat, *answer, 11] for chat, answer in zip(chats, found, strict=True)]
    assert complete(lm, chats, past_key_values=kept) == [alone(chat) for chat in chats]


def test_tokens_that_the_cache_holds_already_are_refused_in_the_loop(lm: pluglm.LanguageModel) -> None:
    inputs, kept = padded(encoded()[:2]), new_cache(lm, 2)
    with torch.no_grad():
        lm.model(**inputs, past_key_values=kept, use_cache=True)
        with pytest.raises(InputError, match="fed twice or lost"):
            lm.model(**inputs, past_key_values=kept, use_cache=True)


# Pairs of keys and values


def test_pairs_and_back_continue_a_generation(lm: pluglm.LanguageModel) -> None:
    first, second, _ = encoded()
    kept = new_cache(lm)
    (answer,) = complete(lm, first, past_key_values=kept)
    pairs = to_tuples(kept)
    assert [tuple(k.shape) for k, _ in pairs] == [(1, 2, kept.length, 64)] * 6
    assert lm.model.layout is not None
    again = from_tuples(lm.model.layout, pairs, capacity=200)
    for (k, v), (again_k, again_v) in zip(pairs, to_tuples(again), strict=True):
        assert torch.equal(k, again_k) and torch.equal(v, again_v)
    longer = [*first, *answer, *second]
    expected = [alone(longer)]
    assert complete(lm, longer, past_key_values=again) == expected
    assert complete(lm, longer, past_key_values=kept) == expected, "the pairs were copies"


def test_pairs_of_a_ragged_batch_continue_with_their_positions(lm: pluglm.LanguageModel) -> None:
    prompts = encoded()
    inputs, kept = padded(prompts), new_cache(lm, 3)
    with torch.no_grad():
        logits = lm.model(**inputs, past_key_values=kept, use_cache=True).logits
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, -1)
        assert lm.model.layout is not None
        again = from_tuples(lm.model.layout, to_tuples(kept), positions=positions, capacity=200)
        token = logits[:, -1:].argmax(-1)
        grown = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
        found = manual_loop(lm, {"input_ids": token, "attention_mask": grown}, again)
    assert [[int(t), *row][:NEW] for t, row in zip(token, found, strict=True)] == complete(lm, prompts)


def test_pairs_in_the_place_of_a_cache_are_refused_by_name(lm: pluglm.LanguageModel) -> None:
    first = encoded()[0]
    kept = new_cache(lm)
    complete(lm, first, past_key_values=kept)
    for call in (
        lambda pairs: complete(lm, [*first, 1], past_key_values=pairs),
        lambda pairs: lm.model(torch.tensor([[1]]), past_key_values=pairs),
    ):
        with pytest.raises(InputError, match="past_key_values is a tuple") as caught:
            call(to_tuples(kept))
        assert caught.value.fix
