"""The plan: readable, JSON in and out, one hash for the same work."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pluglm import Plan, PlanError
from pluglm.plan import Choice, Rejected

PLAN = Plan(
    "somewhere/tiny", "f" * 64, "llama", "cpu", "float32",
    (
        Choice("attention", "auto", "acme:attention/sdpa", "1.2", "tier portable", rejected=(Rejected("z:attention/x", "1", ("needs cuda",)),)),
        Choice("cache", "static:big", "acme:cache/static", "1.2", "asked for by name", "big", (("capacity", 64), ("sizes", (1, 2)))),
        Choice("quantizer", "none", None, None, "weights stay as they are"),
    ),
    ("dtype: auto chose float32",),
)  # fmt: skip


def test_a_plan_survives_json() -> None:
    assert Plan.from_json(json.loads(json.dumps(PLAN.to_json()))) == PLAN


def test_the_hash_is_stable_and_ignores_what_does_not_change_the_work() -> None:
    assert replace(PLAN, model="elsewhere", notes=()).hash == PLAN.hash
    without = tuple(replace(c, rejected=(), reason="") for c in PLAN.choices)
    assert replace(PLAN, choices=without).hash == PLAN.hash
    assert PLAN.hash == "748b7814044a0a541b6323c93f3cd7d927c1dd14c6328da7085a0eb5b1214b26"


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "bfloat16"}, {"device": "cuda:0"}, {"fingerprint": "0" * 64},
        {"choices": (replace(PLAN.choices[0], version="1.3"), *PLAN.choices[1:])},
        {"choices": (PLAN.choices[0], replace(PLAN.choices[1], options=(("capacity", 65),)), PLAN.choices[2])},
        {"choices": (PLAN.choices[0], replace(PLAN.choices[1], variant=None), PLAN.choices[2])},
    ],
)  # fmt: skip
def test_the_hash_changes_with_the_work(changed: dict[str, object]) -> None:
    assert replace(PLAN, **changed).hash != PLAN.hash  # type: ignore[arg-type]


def test_an_edited_plan_is_refused() -> None:
    data = PLAN.to_json()
    data["dtype"] = "bfloat16"
    with pytest.raises(PlanError, match="was changed after it was made"):
        Plan.from_json(data)


def test_another_schema_and_other_json_are_refused() -> None:
    with pytest.raises(PlanError, match="has schema 7; this pluglm reads 1"):
        Plan.from_json({**PLAN.to_json(), "schema": 7})
    with pytest.raises(PlanError, match="is not a plan"):
        Plan.from_json({"schema": 1, "choices": [{"kind": "x"}]})


def test_a_plan_prints_what_was_chosen_why_and_what_was_not() -> None:
    text = str(PLAN)
    assert "attention=auto -> acme:attention/sdpa 1.2" in text
    assert "tier portable" in text
    assert "not z:attention/x 1: needs cuda" in text
    assert "note: dtype: auto chose float32" in text
    assert "quantizer=none -> -" in text


def test_a_part_is_found_by_its_kind() -> None:
    assert PLAN["cache"].variant == "big"
    with pytest.raises(PlanError, match="no part 'engine'"):
        PLAN["engine"]
