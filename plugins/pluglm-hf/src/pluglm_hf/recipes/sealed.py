"""Reads the files of a vendored recipe from its package, and refuses them if they are not what was consented to."""

from __future__ import annotations

from pluglm.sealed import Form, Sealed
from pluglm.sealed import read_sealed as read
from pluglm.vendored import ENTRY, RECORD, is_recipe_file

RECIPE = Form("recipe", RECORD, "recipe", is_recipe_file, lambda names: ENTRY in names)


def read_sealed(package: str) -> Sealed:
    """As `pluglm.sealed.read_sealed`, for a recipe: `files` has "custom_generate/generate.py" → content."""
    return read(package, RECIPE)
