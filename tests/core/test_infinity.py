"""`Infinity` in a config.json: Transformers 4 wrote it for a limit that is none, and JSON does not have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pluglm.checkpoint.config_reader import ConfigReader
from pluglm.checkpoint.strict_json import JsonError, parse_object, read_object
from pluglm.errors import ConfigError

TEXT = '{"time_step_limit": [0.0, Infinity]}'
#: How Transformers 5 spells it.
MEANT = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}


def test_both_spellings_read_alike_where_infinity_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in (TEXT, json.dumps(MEANT)):
        path.write_text(text)
        assert read_object(path, infinity=True) == MEANT


def test_infinity_is_refused_everywhere_else(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(TEXT)
    with pytest.raises(ConfigError, match="Infinity is no JSON number"):
        read_object(tmp_path / "index.json")
    with pytest.raises(JsonError, match="Infinity is no JSON number"):
        parse_object(TEXT.encode())


@pytest.mark.parametrize("text", ["-Infinity", "NaN", "1e999"])
def test_other_numbers_that_are_none_are_refused_all_the_same(text: str) -> None:
    with pytest.raises(JsonError):
        parse_object(f'{{"eps": {text}}}'.encode(), infinity=True)


def test_an_infinite_number_never_passes_where_a_number_is_expected() -> None:
    reader = ConfigReader(parse_object(b'{"rope_theta": Infinity}', infinity=True))
    with pytest.raises(ConfigError, match="Expected float, found") as caught:
        reader.take("rope_theta", float)
    assert caught.value.key == "rope_theta"
