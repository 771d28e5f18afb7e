"""What a plugin says about itself: the models behind `pluglm.json`.

The file is package data, beside the package's `__init__.py`. Discovery reads it without checking; the planner and
`pluglm plugins doctor` check it with these models. Authors write it in TOML (see `pluglm.manifest_build`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pluglm.errors import ManifestError
from pluglm.kinds import KINDS
from pluglm.provider import is_name


def _specifier(text: str) -> str:
    try:
        SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ValueError(f"{text!r} is not a range of versions such as '>=1.0,<2'") from error
    return text


def _stated_specifier(text: str) -> str:
    if not text.strip():
        raise ValueError("it must state a range of versions such as '>=1.0,<2'")
    return _specifier(text)


def _requirement(text: str) -> str:
    try:
        Requirement(text)
    except InvalidRequirement as error:
        raise ValueError(f"{text!r} is not a requirement such as 'triton>=3'") from error
    return text


def _kind(text: str) -> str:
    if text not in KINDS:
        raise ValueError(f"{text!r} is not a kind; there are {', '.join(KINDS)}")
    return text


def _name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"{text!r} is not a name of letters and digits with '.', '_' or '-' between them")
    return text


def _finite(number: float) -> float:
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{number} is not a finite number of at least 0")
    return number


Word = Annotated[str, Field(min_length=1, pattern=r"^\S+$")]
Words = tuple[Word, ...]
Count = Annotated[int, Field(ge=1, strict=True)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadDim(_Model):
    """Sizes of an attention head that a provider computes. A size must pass every limit that is stated."""

    max: Count | None = Field(None, description="The largest size.")
    multiple_of: Count | None = Field(None, description="Sizes must be multiples of this.")
    values: tuple[Count, ...] = Field((), description="The only sizes there are; empty: not limited to some.")


class Requirements(_Model):
    """What must be there for a provider to work. What is left out is not required."""

    devices: Words = Field((), description="torch device types such as `cpu` or `cuda`; empty: any.")
    dtypes: Words = Field((), description="torch dtypes such as `bfloat16`; empty: any.")
    torch: Annotated[str, AfterValidator(_specifier)] = Field(
        "", description="Range of torch versions (PEP 440); empty: any."
    )
    packages: tuple[Annotated[str, AfterValidator(_requirement)], ...] = Field(
        (), description="Distributions that must be installed (PEP 508), beyond the plugin's own dependencies."
    )
    head_dim: HeadDim | None = Field(None, description="Limits on the size of an attention head.")


class Numerics(_Model):
    """How far results may lie from those of the kind's reference implementation."""

    kind: Literal["bitwise", "tolerance"] = Field(
        description="`bitwise`: equal; `tolerance`: apart by at most atol + rtol times the reference's magnitude."
    )
    atol: Annotated[float, AfterValidator(_finite)] | None = Field(None, description="Absolute tolerance.")
    rtol: Annotated[float, AfterValidator(_finite)] | None = Field(None, description="Relative tolerance.")

    @model_validator(mode="after")
    def _tolerances_belong_to_tolerance(self) -> Numerics:
        stated = self.atol is not None or self.rtol is not None
        if stated != (self.kind == "tolerance"):
            raise ValueError("`tolerance` needs atol or rtol, and `bitwise` takes neither")
        return self


class ProviderFacts(_Model):
    """What one provider needs and offers."""

    kind: Annotated[str, AfterValidator(_kind)] = Field(description="The kind, as in `pluglm.kinds`.")
    name: Annotated[str, AfterValidator(_name)] = Field(description="The entry point's name, which users type.")
    summary: Annotated[str, Field(min_length=1, pattern=r"^[^\r\n]+$")] = Field(description="One line for lists.")
    api: Annotated[str, AfterValidator(_stated_specifier)] = Field(
        description="Range of versions of the kind's API that it was written for (PEP 440), such as `>=1.0,<2`."
    )
    tier: Literal["reference", "portable", "tuned"] = Field(
        "portable", description="`auto` prefers tuned to portable to reference."
    )
    requires: Requirements = Field(default_factory=Requirements, description="What must be there for it to work.")
    features: Words = Field(
        (), description="What it can do beyond the least its kind asks for; `*`: settings of any name."
    )
    views: Words = Field((), description="KV views an attention backend reads or a cache gives, best first.")
    slots: Words = Field(
        (), description="Layer kinds a cache makes: `kv`, `window`, `chunk`, `state`, `cross`, `latent`."
    )
    operations: Words = Field((), description="Operations a cache offers, such as `crop` or `reorder`.")
    needs: Words = Field((), description="Operations a decoding strategy needs of the cache.")
    numerics: Numerics | None = Field(None, description="Closeness to the reference; left out: not stated.")


class Manifest(_Model):
    """The whole of `pluglm.json`."""

    schema_version: Literal[1] = Field(alias="schema", description="Version of this format.")
    distribution: Annotated[str, AfterValidator(_name)] = Field(description="The distribution it belongs to.")
    providers: tuple[ProviderFacts, ...] = Field(description="Every provider of the package.")

    @model_validator(mode="after")
    def _providers_are_different(self) -> Manifest:
        names = [f"{facts.kind}/{facts.name}" for facts in self.providers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: described more than once")
        return self


def parse_manifest(raw: Mapping[str, Any], path: object) -> Manifest:
    """Check a decoded `pluglm.json`.

    Args:
        raw: the decoded file.
        path: where it was read, for messages.
    Raises: ManifestError that names every field that is wrong.
    """
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise _manifest_error(f"{path} is not a valid manifest.", error, path) from error


def parse_facts(raw: Mapping[str, Any], *, plugin: str, path: object) -> ProviderFacts:
    """Check the facts of one provider, as discovery read them.

    Args:
        raw: `Provider.facts`.
        plugin: the provider's id, and `path` its manifest, for messages.
    Raises: ManifestError that names every field that is wrong.
    """
    try:
        return ProviderFacts.model_validate(dict(raw))
    except ValidationError as error:
        raise _manifest_error(f"the facts of {plugin} in {path} are not valid.", error, path, plugin) from error


def _manifest_error(what: str, error: ValidationError, path: object, plugin: str | None = None) -> ManifestError:
    lines = []
    for detail in error.errors(include_url=False, include_context=False):
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in detail["loc"]).lstrip(".")
        message = detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            message = "there is no such field"
        lines.append(f"{place or 'the file'}: {message}.")
    fix = "correct it in [tool.pluglm] of pyproject.toml, then run `pluglm plugins build-manifest`."
    return ManifestError(what, why="\n".join(lines), fix=fix, path=path, plugin=plugin)


def json_schema() -> dict[str, Any]:
    """The JSON schema of `pluglm.json`."""
    return Manifest.model_json_schema(by_alias=True)
