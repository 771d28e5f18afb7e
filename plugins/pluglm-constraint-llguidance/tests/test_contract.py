"""The constraint against the conformance kit, with either form of JSON."""

from __future__ import annotations

import pluglm_constraint_llguidance

from pluglm.testing.constraint import ConstraintContract


class TestFlexibleJson(ConstraintContract):
    provider = pluglm_constraint_llguidance


class TestCompactJson(ConstraintContract):
    provider = pluglm_constraint_llguidance
    kinds = ("json", "json_schema", "choice")
    options = (("whitespace", "none"),)
