"""Whatever a user passes becomes rows of token ids, or an error that says what to pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from pluglm.errors import InputError
from pluglm.prompts import Prompts, pad_left, read_prompts

V, BOS = 99, 7


class Letters:
    """A tokenizer whose ids are character codes less 32; a chat is its contents joined by 1."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 32 for c in text]

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return [i for message in messages for i in (*self.encode(message["content"]), 1)]


LETTERS = Letters()


def read(prompt: Any, *, tokenizer: Any = LETTERS, bos: int | None = BOS) -> Prompts:
    return read_prompts(prompt, tokenizer, vocab_size=V, bos_token_id=bos)


def refusal(prompt: Any, **arguments: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read(prompt, **arguments)
    assert caught.value.argument == "prompt"
    return caught.value


CHAT = [{"role": "user", "content": "#"}, {"role": "assistant", "content": "$"}]


@pytest.mark.parametrize(
    ("prompt", "rows", "single"),
    [
        ("#$", ((3, 4),), True),
        (["#", "$%"], ((3,), (4, 5)), False),
        (CHAT, ((3, 1, 4, 1),), True),
        ([CHAT, CHAT[:1]], ((3, 1, 4, 1), (3, 1)), False),
        ([5, 6], ((5, 6),), True),
        ((5, 6), ((5, 6),), True),
        ([[5, 6], [7]], ((5, 6), (7,)), False),
        (["#", [5, 6], CHAT], ((3,), (5, 6), (3, 1, 4, 1)), False),
        (torch.tensor([5, 6]), ((5, 6),), True),
        (torch.tensor([[5, 6], [7, 8]]), ((5, 6), (7, 8)), False),
        ("", ((BOS,),), True),
        (["", "#"], ((BOS,), (3,)), False),
        ([[]], ((BOS,),), False),
    ],
)
def test_each_form_of_prompt_is_read(prompt: Any, rows: Any, single: bool) -> None:
    assert read(prompt) == Prompts(rows, single)


def test_token_ids_need_no_tokenizer() -> None:
    assert read([[1, 2]], tokenizer=None).rows == ((1, 2),)


@pytest.mark.parametrize("prompt", [[], (), torch.zeros(0, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long)])
def test_an_empty_list_is_no_prompt(prompt: Any) -> None:
    error = refusal(prompt)
    assert error.what == "there is no prompt: the list is empty."
    assert error.fix == "Pass at least one prompt."


@pytest.mark.parametrize("prompt", ["", [[]], ["#", ""]])
def test_an_empty_text_needs_a_bos_token(prompt: Any) -> None:
    error = refusal(prompt, bos=None)
    assert error.what == "the prompt is empty."
    assert error.why == "this model has no BOS token that could stand for an empty text."
    assert error.fix == "Pass at least one character or token id."


@pytest.mark.parametrize("wrong", [V, -1, 10**30])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    error = refusal([[1], [2, wrong]])
    assert error.what == f"token id {wrong} is outside the vocabulary of {V}."
    assert error.why == "these ids were made by another model's tokenizer, or by hand."
    assert "lm.tokenizer.encode" in error.fix


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        (None, "NoneType"), (5, "int"), (b"#", "bytes"), ([b"#"], "list"), ({"role": "user"}, "dict"), ([1.0, 2.0], "list"),
        ([True, False], "list"), (["#", 5], "int"), ([1, "#"], "list"), ([[1], None], "NoneType"), ([CHAT[0], "#"], "list"),
        (torch.tensor(5), "int"), (torch.tensor([0.5]), "list"),
    ],
)  # fmt: skip
def test_what_is_no_prompt_is_refused_by_its_kind(prompt: Any, kind: str) -> None:
    error = refusal(prompt)
    assert error.what == f"a prompt cannot be made of {kind}."
    assert "{'role': 'user', 'content': 'Hi'}" in error.fix


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "#"}, {"role": 3, "content": "#"}])
def test_a_message_needs_a_role_and_a_content(message: Any) -> None:
    error = refusal([CHAT[0], message])
    assert error.what == f"message 1 lacks a role or a content: {message!r}."
    assert error.fix == "Write messages as {'role': 'user', 'content': 'Hi'}."


@pytest.mark.parametrize("prompt", ["#", ["#"], CHAT, [[1], "#"]])
def test_text_without_a_tokenizer_is_refused(prompt: Any) -> None:
    error = refusal(prompt, tokenizer=None)
    assert error.what == "this model came without a tokenizer, so text means nothing to it."
    assert error.why == "its folder has no tokenizer file that an installed tokenizer plugin reads."
    assert error.fix == "Pass token ids, or put tokenizer.json into the folder."


def test_rows_of_one_length_need_no_mask() -> None:
    ids, mask = pad_left([(1, 2), (3, 4)], 9, "cpu")
    assert (ids.tolist(), ids.dtype, mask) == ([[1, 2], [3, 4]], torch.int64, None)


def test_shorter_rows_are_padded_on_the_left_and_marked() -> None:
    ids, mask = pad_left([(1, 2, 3), (4,)], 9, "cpu")
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask is not None
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
