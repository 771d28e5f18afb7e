"""The yardstick itself: scoring through a cache, the table, and the command line."""

from __future__ import annotations

import json

import pytest
from pluglm_model_pystdlib import evaluate

import pluglm

TEXT = "def read_csv(path):\n    with open(path) as file:\n        return [line.split(',') for line in file]\n\n\n" * 6


@pytest.fixture(autouse=True)
def one_short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "held_out", lambda: {"short.py": TEXT, "other.py": "import os\n"})


def load(cache: str = "auto", **options: object) -> pluglm.LanguageModel:
    return pluglm.load("pystdlib", dtype="float32", cache=cache, options={"cache": options})


def test_a_full_cache_scores_what_no_cache_scores() -> None:
    without = evaluate.quality(load())
    through = evaluate.quality(load("dynamic"), piece=16)
    assert without.cache_bytes is None
    assert through.bits_per_byte == pytest.approx(without.bits_per_byte, rel=1e-5)
    assert (through.tokens, through.top1, through.files) == (without.tokens, without.top1, 2)
    assert through.cache_bytes is not None
    assert through.cache_bytes >= 6 * 2 * 2 * 64 * 4  # layers, keys and values, heads, head_dim, float32


def test_a_packed_cache_is_read_back_and_costs_less() -> None:
    full = evaluate.quality(load("dynamic"), max_files=1, piece=16)
    packed = evaluate.quality(load("quantized", bits=2, residual=0), max_files=1, piece=16)
    assert packed.bits_per_byte != full.bits_per_byte
    assert packed.cache_bytes is not None
    assert full.cache_bytes is not None
    assert packed.cache_bytes < full.cache_bytes / 2


def test_the_table_has_a_line_for_each_row_and_ends_with_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "ROWS", [row for row in evaluate.ROWS if "hqq" not in row[0]])
    evaluate.main(["--table", "--max-files", "1", "--piece", "16", "--cache-option", "residual=8"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[2:6]] == ["float32", "8", "4", "2"]
    made = json.loads(lines[-1])
    assert made["rows"][0]["ratio"] == 1.0
    assert made["rows"][3]["options"] == {"bits": 2, "residual": 8}
    assert made["piece"] == 16
    assert made["rows"][1]["cache_bytes"] < made["rows"][0]["cache_bytes"]


def test_one_cache_is_scored_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(["--cache", "quantized", "--cache-option", "bits=8", "--cache-option", "residual=16"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("cache  quantized, ") for line in lines)
    assert json.loads(lines[-1])["cache_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--cache-option", "bits=4"], "--cache-option is for a cache"),
        (["--table", "--cache", "dynamic"], "--table chooses the caches itself"),
        (["--cache", "quantized", "--cache-option", "bits"], "'bits' is not KEY=JSON"),
        (["--cache", "quantized", "--cache-option", "bits=four"], "the value of bits is not JSON"),
        (["--max-files", "0"], "'0' is not a whole number from 1 on"),
        (["--piece", "x"], "'x' is not a whole number from 1 on"),
    ],
)
def test_a_wrong_argument_is_refused_with_what_to_write(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(arguments)
    assert says in " ".join(capsys.readouterr().err.split())
