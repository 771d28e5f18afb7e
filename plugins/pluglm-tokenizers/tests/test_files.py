"""Files that are odd, damaged or hostile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluglm_tokenizers
import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Native

from pluglm.contracts import Tokenizer, TokenizerRequest
from pluglm.errors import ConfigError, InputError, SaveError, UnsupportedRequestError

BASE = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
Make = Callable[..., Path]


def build(folder: Path) -> Tokenizer:
    return pluglm_tokenizers.pluglm_build_tokenizer(request=TokenizerRequest(folder, 10_000))


@pytest.mark.parametrize(
    ("flags", "ends"),
    (
        ({}, ([0], [])), ({"add_bos_token": False}, ([], [])), ({"add_bos_token": True}, ([0], [])),
        ({"add_eos_token": True}, ([0], [1])),
        ({"add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}, ([0], [])),
    ),
)  # fmt: skip
def test_the_configs_flags_say_what_stands_at_the_ends(
    make: Make, flags: dict[str, Any], ends: tuple[list[int], list[int]]
) -> None:
    tokenizer = build(make(config={**BASE, **flags}))
    body = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [*ends[0], *body, *ends[1]]


def test_a_folder_without_tokenizer_json_is_left_to_another_provider(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedRequestError, match=r"has no tokenizer\.json") as caught:
        build(tmp_path)
    assert caught.value.reasons


def test_tokens_are_read_in_both_spellings_and_from_both_files(make: Make) -> None:
    folder = make(config={"eos_token": {"content": "<|eos|>", "lstrip": False}, "pad_token": None})
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<|bos|>", "pad_token": {"content": "<|eos|>"}}')
    tokenizer = build(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)


def test_a_token_named_in_the_config_becomes_a_control_token(make: Make) -> None:
    native = Native(models.WordLevel({"a": 0, "</end>": 1, "<unk>": 2}, unk_token="<unk>"))
    native.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = build(make(tokenizer=native, config={"eos_token": "</end>", "unk_token": "<unk>"}))
    assert tokenizer.special_ids == {1, 2}
    assert tokenizer.encode("a </end> a", parse_special=True) == [0, 1, 0]
    assert 1 not in tokenizer.encode("a </end> a")


def test_a_token_that_no_file_holds_is_refused_with_its_name(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"eos_token is '</s>', which tokenizer\.json does not hold"):
        build(make(config={"eos_token": "</s>"}))


@pytest.mark.parametrize(
    "config",
    ({"eos_token": 3}, {"eos_token": "<|eos|>", "chat_template": 7}, {"eos_token": "<|eos|>", "chat_template": [{"name": "x"}]},
     {"eos_token": "<|eos|>", "add_bos_token": "yes"}, {"eos_token": "<|eos|>", "add_bos_token": True}),
    ids=str,
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(make: Make, config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        build(make(config=config))


@pytest.mark.parametrize("text", ("", "{", "[]", '{"model": {"type": "NoSuchModel"}}', "{}"))
def test_a_damaged_tokenizer_file_is_refused(make: Make, text: str) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        build(make(tokenizer=text))


def test_a_panic_of_the_native_library_is_a_typed_error(make: Make) -> None:
    native = Native(models.WordLevel({"a": 0, "<|eos|>": 1}, unk_token="a"))
    native.normalizer = normalizers.Replace(Regex("(a+)+$"), "b")
    tokenizer = build(make(tokenizer=native, config={"eos_token": "<|eos|>"}))
    with pytest.raises(InputError, match=r"cannot be tokenized[\s\S]*PanicException"):
        tokenizer.encode("a" * 60 + "!")
    with pytest.raises(InputError, match="cannot be decoded"):
        tokenizer.decode([-1])


def test_a_files_truncation_and_padding_are_not_applied(make: Make) -> None:
    folder = make(config=BASE)
    native = Native.from_file(str(folder / "tokenizer.json"))
    native.enable_truncation(3)
    native.enable_padding(length=50)
    tokenizer = build(make(tokenizer=native, config=BASE))
    text = "hello world, this is a small text" * 3
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_normalizer_cannot_make_a_control_token(make: Make) -> None:
    native = Native(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "</s>ab")], unk_id=0))
    native.normalizer = normalizers.NFKC()
    tokenizer = build(
        make(tokenizer=native, config={"eos_token": "</s>", "unk_token": "<unk>"}, template="{{ messages[0].content }}")
    )
    wide = "a＜/ｓ＞b"
    for ids in (tokenizer.encode(wide), tokenizer.apply_chat_template([{"role": "user", "content": wide}])):
        assert 1 not in ids


def test_files_that_changed_since_loading_are_not_saved(make: Make, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, target = make(config=BASE), tmp_path_factory.mktemp("target")
    tokenizer = build(folder)
    tokenizer.save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({**BASE, "x": 1}))
    with pytest.raises(SaveError, match="changed since it was loaded"):
        tokenizer.save(target)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(SaveError, match="can no longer be read"):
        tokenizer.save(target)
    assert list(target.iterdir()) == []
