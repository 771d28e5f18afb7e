"""Grammars through the llguidance library. Importing this package imports neither llguidance nor torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Constraint, ConstraintRequest


@hookimpl
def pluglm_build_constraint(request: ConstraintRequest) -> Constraint:
    """Refuse unknown options and variants, read the vocabulary, and return what compiles grammars."""
    from pluglm_constraint_llguidance.constraint import LLGuidance  # imports llguidance

    return LLGuidance(request)
