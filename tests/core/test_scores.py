"""Measured times order the candidates of `auto` within a tier, are said in the plan, and are kept or deleted as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pluglm.contracts import AttentionSpec, KVSlot, ModelDescription, WeightMap
from pluglm.errors import PluginError, SaveError
from pluglm.manager import Manager
from pluglm.planner import Planner, Wanted
from pluglm.provider import Provider
from pluglm.registry import Registry
from pluglm.scores import Score, Scores, forget_scores, load_scores, save_scores
from pluglm.testing.isolation import fake_provider

MODEL = ModelDescription(
    "tiny", None, WeightMap(()), 11, 48, 1, 64, (AttentionSpec(6, 3, 8, 8, 1.0),), (KVSlot(3, 8, 8),)
)


def attention(name: str, **facts: Any) -> Provider:
    given = {"views": ("dense",), "features": ("grouped-heads",), **facts}
    return fake_provider("attention", name, object(), facts=given)


CACHE = fake_provider("cache", "dynamic", object(), facts={"views": ("dense",), "slots": ("kv",)})
PARTS = (attention("a"), attention("b"), attention("c"), attention("slow-but-tuned", tier="tuned"), CACHE)


def score(name: str, token_ms: float, **other: str) -> Score:
    told = {"version": "1.0", "device": "cpu", "dtype": "float32", "model": "m", "date": "2026-11-21", **other}
    return Score(f"acme-test:attention/{name}", token_ms=token_ms, **told)


def order(*scores: Score, parts: tuple[Provider, ...] = PARTS) -> tuple[list[str], str]:
    """Names in the order of `auto`, and the reason given for the first."""
    manager = Manager(Registry(parts), Scores(scores))
    choice, _ = Planner(manager).attention_and_cache(
        MODEL, Wanted(), Wanted(), device="cpu", dtype="float32", operations=()
    )
    assert choice is not None
    ids = [choice.provider or "", *(r.provider for r in choice.rejected)]
    return [name.rpartition("/")[2] for name in ids], choice.reason


def test_without_scores_the_order_is_by_tier_and_id() -> None:
    assert order() == (["slow-but-tuned", "a", "b", "c"], "tier tuned; reads dense")


def test_a_time_decides_within_a_tier_and_is_said() -> None:
    names, reason = order(score("c", 1.25), score("b", 2.5), parts=(*PARTS[:3], CACHE))
    assert names == ["c", "b", "a"]
    assert reason == "tier portable, 1.25 ms a token measured here; reads dense"


def test_a_tier_goes_before_any_time() -> None:
    assert order(score("c", 1.0), score("slow-but-tuned", 9.0))[0] == ["slow-but-tuned", "c", "a", "b"]


@pytest.mark.parametrize("other", [{"version": "1.1"}, {"device": "cuda X"}, {"dtype": "bfloat16"}])
def test_a_time_of_another_version_device_or_dtype_does_not_count(other: dict[str, str]) -> None:
    assert order(score("c", 1.0, **other), parts=(*PARTS[:3], CACHE))[0] == ["a", "b", "c"]


def test_scores_are_kept_replaced_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "new" / "scores.json"
    assert load_scores(path) == Scores()
    assert not forget_scores(path)
    save_scores(Scores().with_([score("a", 1.0), score("b", 2.0)]), path)
    save_scores(load_scores(path).with_([score("a", 3.0), score("a", 4.0, dtype="float16")]), path)
    assert load_scores(path).entries == (score("b", 2.0), score("a", 3.0), score("a", 4.0, dtype="float16"))
    assert forget_scores(path)
    assert load_scores(path) == Scores()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"schema": 2, "scores": []}', '{"schema": 1, "scores": [{"provider": "x"}]}',
             json.dumps({"schema": 1, "scores": [{**dict.fromkeys(Score.__slots__, "x"), "token_ms": 0}]})],
)  # fmt: skip
def test_a_file_that_makes_no_sense_is_an_error_that_says_how_to_go_on(text: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(PluginError, match="cannot be read") as caught:
        load_scores(path)
    assert "pluglm measure --forget" in caught.value.fix


def test_a_folder_that_cannot_be_written_to_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SaveError, match="not written"):
        save_scores(Scores(), tmp_path / "file" / "scores.json")
