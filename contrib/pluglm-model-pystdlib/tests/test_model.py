"""The packaged model is found, loads through plugins alone, and predicts Python better than a compressor does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pluglm_model_pystdlib import CHECKPOINT, held_out, pluglm_build_source
from pluglm_model_pystdlib.evaluate import quality, xz_bits_per_byte

import pluglm
from pluglm.contracts import SourceRequest


@pytest.fixture(scope="module")
def lm() -> pluglm.LanguageModel:
    return pluglm.load("pystdlib", dtype="float32")


def test_the_source_answers_to_its_own_names_only() -> None:
    source = pluglm_build_source(SourceRequest("pystdlib"))
    assert source.resolve(SourceRequest("pystdlib")) == CHECKPOINT
    assert source.resolve(SourceRequest("pystdlib-draft")) == CHECKPOINT.parent / "draft"
    assert source.resolve(SourceRequest("org/repo")) is None
    with pytest.raises(
        pluglm.InputError, match=r"no revision 'v2'[\s\S]*part of this package[\s\S]*Leave revision out"
    ):
        source.resolve(SourceRequest("pystdlib", revision="v2"))


def test_the_weights_are_small_enough_to_ship() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_the_draft_model_is_small_and_has_the_tokenizer_of_the_model() -> None:
    draft = CHECKPOINT.parent / "draft"
    assert (draft / "model.safetensors").stat().st_size < 2_000_000
    assert (draft / "tokenizer.json").read_bytes() == (CHECKPOINT / "tokenizer.json").read_bytes()
    assert pluglm.load("pystdlib-draft", dtype="float32").generate("def read", max_new_tokens=2)


def test_every_part_of_the_work_came_from_a_plugin(lm: pluglm.LanguageModel) -> None:
    packages = {c.provider.partition(":")[0] for c in lm.plan.choices if c.provider}
    assert "pluglm" not in packages
    assert {"pluglm-arch-llama", "pluglm-tokenizers", "pluglm-decoding-standard"} <= packages


def test_it_writes_python_that_looks_like_python(lm: pluglm.LanguageModel) -> None:
    text = "def read_csv(path):" + str(lm.generate("def read_csv(path):", max_new_tokens=48))
    assert "\n    " in text  # an indented body
    assert any(word in text for word in ("return", "raise", "if ", "self", "import", "with "))


def test_it_predicts_unseen_files_better_than_xz(lm: pluglm.LanguageModel) -> None:
    found = quality(lm, max_files=2)
    xz = xz_bits_per_byte(max_files=2)
    assert found.files == 2
    assert found.bits_per_byte < 0.85 * xz["each"]


def test_held_out_text_survives_the_tokenizer(lm: pluglm.LanguageModel) -> None:
    assert lm.tokenizer is not None
    for text in held_out().values():
        assert lm.tokenizer.decode(lm.tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_chat_is_code_that_follows_a_docstring(lm: pluglm.LanguageModel) -> None:
    assert lm.tokenizer is not None
    ids = lm.tokenizer.apply_chat_template([{"role": "user", "content": "Read a csv file\nquickly."}])
    assert lm.tokenizer.decode(ids) == '"""Read a csv file\nquickly."""\n\n'
    assert lm.generate([{"role": "user", "content": "a counter"}], max_new_tokens=4)


def test_the_record_of_the_training_says_what_was_held_out() -> None:
    record = json.loads((Path(CHECKPOINT).parent / "training.json").read_text(encoding="utf-8"))
    assert record["corpus"]["held_out_files"] == len(held_out())
    assert record["log"][-1]["loss"] < record["log"][0]["loss"] / 2
