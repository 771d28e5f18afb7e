"""Are the packages there that a recipe's requirements.txt asks for?"""

from __future__ import annotations

from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement

from pluglm_hf.recipes.failures import RecipeError


def check_requirements(text: str, recipe: str) -> None:
    """Read a requirements.txt line by line and compare it with what is installed (PEP 508, PEP 440).

    Raises: RecipeError with every line that is not met, or not understood, and what is installed: `.missing`.
    """
    missing = [line for line in (_unmet(line) for line in text.splitlines()) if line]
    if missing:
        raise RecipeError(
            f"Missing requirements in your local environment for `{recipe}`:", why="\n".join(missing),
            fix="Install them, into an environment where nothing else needs other versions; then try again.",
            recipe=recipe, missing=tuple(missing),
        )  # fmt: skip


def _unmet(line: str) -> str:
    """ "requirement (installed: version)" for a line that is not met, else ""."""
    said = line.partition(" #")[0].strip()
    if not said or said.startswith("#"):
        return ""
    try:
        requirement = Requirement(said)
    except InvalidRequirement as error:
        return f"{said} (not understood: {str(error).splitlines()[0]})"
    if requirement.marker is not None and not requirement.marker.evaluate():
        return ""
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{said} (installed: None)"
    fits = requirement.specifier.contains(installed, prereleases=True)
    return "" if fits else f"{said} (installed: {installed})"
