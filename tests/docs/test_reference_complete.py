"""The reference names every hook, error and public name, with the signatures that the code has."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import pluglm
from pluglm import errors, hookspecs
from pluglm.completions import Completion
from pluglm.contracts import GenerationConfig, GenerationOutput
from pluglm.kinds import KINDS

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"

HOOKS = {
    name: spec for group in hookspecs.SPECS for name, spec in vars(group).items() if hasattr(spec, "pluglm_spec")
}  # fmt: skip
ERRORS = {
    name: error for name, error in vars(errors).items()
    if isinstance(error, type) and issubclass(error, errors.PluglmError)
}  # fmt: skip
FUNCTIONS = {"load": pluglm.load, "explain": pluglm.explain}
METHODS = {
    name: method for name, method in vars(pluglm.LanguageModel).items()
    if inspect.isfunction(method) and not name.startswith("_")
}  # fmt: skip


def sections(page: str, level: int = 3) -> dict[str, str]:
    """Heading -> text below it, for headings of one level; code quotes around a heading are left out."""
    text = (REFERENCE / page).read_text(encoding="utf-8")
    parts = re.split(rf"^{'#' * level} (.+)$", text, flags=re.MULTILINE)
    headings = [heading.strip().strip("`") for heading in parts[1::2]]
    assert len(set(headings)) == len(headings)
    higher = rf"^#{{1,{level}}} "
    bodies = [re.split(higher, body, flags=re.MULTILINE)[0] for body in parts[2::2]]
    return dict(zip(headings, bodies, strict=True))


def signature(name: str, function: Any) -> str:
    """As a reader writes it: annotations as in the source, without `self`."""
    found = inspect.signature(function)
    kept = [p for p in found.parameters.values() if p.name != "self"]

    def plain(p: inspect.Parameter) -> str:
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        return f"{star}{p.name}: {p.annotation}{default}"

    shown = []
    for p in kept:
        if p.kind is p.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(plain(p))
    return f"{name}({', '.join(shown)}) -> {found.return_annotation}"


def squeezed(text: str) -> str:
    """Without what line breaks change."""
    return re.sub(r",\)", ")", re.sub(r"\s+", "", text))


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_section_with_its_signature(name: str) -> None:
    body = sections("hooks.md")[name]
    assert squeezed(signature(name, HOOKS[name])) in squeezed(body)
    assert len(body.split("```")[-1].strip()) > 80, "say who calls it, when, how often, and what an exception does"


def test_no_hook_is_described_that_does_not_exist() -> None:
    assert set(sections("hooks.md")) == set(HOOKS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_named_with_its_entry_point_group(kind: str) -> None:
    row = rf"\| `{kind}` \| `{re.escape(KINDS[kind].group)}` \| `?{re.escape(KINDS[kind].version)}`? \|"
    assert re.search(row, (REFERENCE / "hooks.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_has_a_section_with_its_parent_and_attributes(name: str) -> None:
    body, error = sections("errors.md")[name], ERRORS[name]
    assert f"`{error.__bases__[0].__name__}`" in body
    for attribute in re.findall(r"`(\.\w+)`", error.__doc__ or ""):
        assert f"`{attribute}`" in body
    assert "To do" in body or "what to do" in body


def test_no_error_is_described_that_does_not_exist() -> None:
    assert set(sections("errors.md")) == set(ERRORS)


@pytest.mark.parametrize("name", [n for n in pluglm.__all__ if n not in ERRORS])
def test_every_public_name_has_a_section(name: str) -> None:
    assert name in sections("api.md", 2)


def test_no_public_name_is_described_that_does_not_exist() -> None:
    assert set(sections("api.md", 2)) == {n for n in pluglm.__all__ if n not in ERRORS}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_shows_its_signature(name: str) -> None:
    assert squeezed(signature(name, FUNCTIONS[name])) in squeezed(sections("api.md", 2)[name])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_a_language_model_shows_its_signature(name: str) -> None:
    assert squeezed(signature(name, METHODS[name])) in squeezed(sections("api.md")[f"LanguageModel.{name}"])


def test_no_method_is_described_that_does_not_exist() -> None:
    described = {h.removeprefix("LanguageModel.") for h in sections("api.md") if h.startswith("LanguageModel.")}
    assert described == set(METHODS)


FIELDS = {
    "LanguageModel": [n for n in pluglm.LanguageModel.__annotations__ if not n.startswith("_")],
    **{c.__name__: [f.name for f in dataclasses.fields(c)] for c in (Completion, GenerationConfig, GenerationOutput, pluglm.Plan)},
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_is_in_the_table_of_its_class(name: str) -> None:
    body = sections("api.md", 2)[name]
    rows = set(re.findall(r"^\| `(\w+)` \|", body, flags=re.MULTILINE))
    assert rows == set(FIELDS[name])


@pytest.mark.parametrize("page", ["hooks.md", "errors.md", "api.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (REFERENCE / page).read_text(encoding="utf-8")):
        assert (REFERENCE / target).exists(), target
