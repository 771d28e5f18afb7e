"""The static filter: every reason against a provider, from its facts alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from pluglm.manifest import parse_facts
from pluglm.static_filter import satisfies, static_refusals, unmet_packages

FACTS = {
    "kind": "attention",
    "name": "fa3",
    "summary": "Fast.",
    "api": ">=1.0,<2",
    "requires": {
        "devices": ["cuda"],
        "dtypes": ["bfloat16", "float16"],
        "torch": ">=2.5",
        "head_dim": {"max": 256, "multiple_of": 8, "values": [64, 128]},
    },
    "features": ["window"],
    "views": ["paged"],
    "slots": ["kv"],
    "operations": ["crop"],
}
FITS = {"device": "cuda:0", "dtype": "torch.bfloat16", "torch_version": "2.13.0+cpu", "api_version": "1.0"}


def test_a_provider_that_fits_has_nothing_against_it():
    fits = FITS | {"features": ["window"], "views": ["dense", "paged"], "slots": ["kv"], "operations": ["crop"]}
    assert static_refusals(FACTS, **fits, head_dim=64) == ()


def test_facts_and_their_model_give_the_same_answer():
    model = parse_facts(FACTS, plugin="p", path="x")
    request = FITS | {"device": "cpu", "features": ["sinks"], "views": ["dense"]}
    assert static_refusals(model, **request) == static_refusals(FACTS, **request) != ()


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"device": "cpu"}, "needs device cuda, have cpu"),
        ({"dtype": "float32"}, "needs dtype bfloat16 or float16, have float32"),
        ({"torch_version": "2.4.1"}, "needs torch >=2.5, have 2.4.1"),
        ({"torch_version": ""}, "needs torch >=2.5, have none"),
        ({"api_version": "2.0"}, "needs API >=1.0,<2, have 2.0"),
        ({"features": ["window", "sinks"]}, "lacks the feature sinks"),
        ({"slots": ["state"]}, "lacks the layer kind state"),
        ({"operations": ["fork"]}, "lacks the operation fork"),
        ({"views": ["dense", "split"]}, "knows the KV views paged, not dense or split"),
        ({"head_dim": 512}, "needs head_dim up to 256, have 512"),
        ({"head_dim": 12}, "needs head_dim in multiples of 8, have 12"),
        ({"head_dim": 32}, "needs head_dim 64 or 128, have 32"),
    ],
)
def test_each_predicate_has_its_words(request_, reason):
    assert reason in static_refusals(FACTS, **(FITS | request_))


def test_every_failing_predicate_is_kept():
    request = {"device": "cpu", "dtype": "float32", "torch_version": "1.0", "api_version": "3.0"}
    assert len(static_refusals(FACTS, **request, features=["x", "y"], views=["z"], head_dim=7)) == 9


def test_what_is_not_asked_is_not_held_against_a_provider():
    assert static_refusals(FACTS, device=None, dtype=None, torch_version=None, api_version="1.0") == ()


def test_views_that_are_asked_for_must_be_stated():
    facts = {"api": ">=1.0"}
    assert static_refusals(facts, **FITS, views=["dense"]) == ("knows the KV views (none stated), not dense",)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "its manifest cannot be read"),
        ({"name": "x"}, "its facts are malformed: 'api' is missing"),
        ({"api": ">=1", "requires": []}, "its facts are malformed: 'requires' should be a table"),
        (
            {"api": ">=1", "requires": {"devices": "cuda"}},
            "its facts are malformed: 'devices' should be a list of text",
        ),
        ({"api": ">=1", "requires": {"torch": 2}}, "its facts are malformed: 'torch' should be text"),
        ({"api": ">=1", "requires": {"head_dim": 64}}, "its facts are malformed: 'head_dim' should be a table"),
        ({"api": ">=1", "requires": {"head_dim": {"values": 64}}}, "'head_dim' should hold whole numbers above 0"),
        ({"api": ">=1", "features": [1]}, "its facts are malformed: 'features' should be a list of text"),
    ],
)
def test_facts_of_the_wrong_form_are_refused_not_raised(facts, reason):
    request = FITS | {"features": ["window"]}
    assert any(reason in refusal for refusal in static_refusals(facts, **request))


_NUMBER = st.lists(st.integers(0, 3), min_size=1, max_size=3).map(lambda parts: ".".join(map(str, parts)))


@given(_NUMBER, st.sampled_from([">=", "<=", ">", "<", "==", "!="]), _NUMBER)
def test_the_short_cut_for_versions_agrees_with_packaging(version, operator, bound):
    assert satisfies(version, operator + bound) == SpecifierSet(operator + bound).contains(version)


def test_a_malformed_range_is_met_by_nothing():
    assert not satisfies("1.0", "new")
    assert satisfies("1.4", "==1.*")


def test_unmet_packages_name_what_is_needed_and_what_is_there():
    wanted = ["a>=2", "B_c", "missing", 'other; python_version < "3"', "b a d"]
    assert unmet_packages(wanted, {"a": "1.0", "b-c": "5"}) == (
        "needs a>=2, have 1.0",
        "needs missing, have none",
        "states the requirement 'b a d', which cannot be read",
    )
