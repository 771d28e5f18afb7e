"""What a recipe requires, read as PEP 508 says, and whether it is installed here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from pluglm.errors import InputError, PluginError
from pluglm.vendored import REQUIREMENTS

ARCHIVES = (".whl", ".zip", ".tar.gz", ".tar.bz2", ".tgz")
NOT_FROM_AN_INDEX = "it names an address or a file, and an index is where dependencies come from."


class MissingRequirementsError(PluginError, ImportError):
    """A recipe requires what is not installed. `.requirements`: the lines; also an ImportError, as users know it."""


@dataclass(frozen=True)
class Need:
    """One requirement here.

    Attributes:
        text: as its author wrote it. requirement: the same, parsed.
        installed: the version that is there, or None.
        status: "met", "missing", "other version", or "not needed here" (its marker speaks of another machine).
    """

    text: str
    requirement: Requirement
    installed: str | None
    status: str

    @property
    def unmet(self) -> bool:
        """True if the recipe would not find what it requires."""
        return self.status not in ("met", "not needed here")


def read_requirements(repo: str, text: str, where: str = REQUIREMENTS) -> list[tuple[str, Requirement]]:
    """(line, requirement) of a requirements.txt. Comments go; a backslash at the end joins two lines.

    Args:
        where: the file that says so, for messages.
    Raises: InputError for what is no plain requirement: addresses, files and options of pip would fetch from places
        that nobody was asked about.
    """
    found = []
    for number, line in _lines(text):
        try:
            requirement = Requirement(line)
            if requirement.url is not None or line.endswith(ARCHIVES):  # pip looks for a file of such a name
                raise _refused(repo, where, number, line, NOT_FROM_AN_INDEX)
        except InvalidRequirement as error:
            if line.startswith("-"):
                why = "it is an option of pip, not a requirement."
            elif "://" in line or line.startswith((".", "/")):
                why = NOT_FROM_AN_INDEX
            else:
                why = f"it is no requirement as PEP 508 says: {str(error).splitlines()[0]}."
            raise _refused(repo, where, number, line, why) from error
        found.append((line, requirement))
    return found


def _refused(repo: str, where: str, number: int, line: str, why: str) -> InputError:
    return InputError(
        f"line {number} of {where} of `{repo}` is refused: {ascii(line)[1:-1]}",
        why=why,
        fix='Ask its author for a plain requirement, such as "torch>=2.8,<3" or "numpy; python_version < \'3.13\'".',
        argument="source",
    )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, requirement) of the lines that hold one, comments cut off as pip cuts them."""
    joined, start = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        start = start or number
        if raw.endswith("\\") and not raw.lstrip().startswith("#"):
            joined += raw[:-1]
            continue
        line = joined + raw
        cut = 0 if line.lstrip().startswith("#") else line.find(" #")
        line = (line[:cut] if cut >= 0 else line).strip()
        if line:
            yield start, line
        joined, start = "", 0
    if joined.strip():
        yield start, joined.strip()


def check(requirements: Sequence[tuple[str, Requirement]]) -> list[Need]:
    """Each requirement with what is installed. Extras are followed into what they require."""
    return [_need(line, requirement) for line, requirement in requirements]


def _need(line: str, requirement: Requirement) -> Need:
    found = _installed(requirement.name)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return Need(line, requirement, found.version if found else None, "not needed here")
    if found is None:
        return Need(line, requirement, None, "missing")
    if not _fits(requirement, found.version):
        return Need(line, requirement, found.version, "other version")
    lacking = "" if _extras_met(requirement, found, set()) else "missing what an extra requires"
    return Need(line, requirement, found.version, lacking or "met")


def _installed(name: str) -> metadata.Distribution | None:
    # A fresh look at the path: what was installed a moment ago counts.
    wanted = canonicalize_name(name)
    for found in metadata.distributions(name=name, path=sys.path):
        if found.metadata["Name"] and canonicalize_name(found.metadata["Name"]) == wanted:
            return found
    return None


def _fits(requirement: Requirement, version: str) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return not requirement.specifier


def _extras_met(requirement: Requirement, found: metadata.Distribution, seen: set[tuple[str, str]]) -> bool:
    """Whether what the named extras of an installed distribution require is there, too, and theirs."""
    known = {canonicalize_name(extra) for extra in found.metadata.get_all("Provides-Extra") or ()}
    for extra in requirement.extras:
        key = (canonicalize_name(requirement.name), canonicalize_name(extra))
        if key in seen:
            continue
        seen.add(key)
        if key[1] not in known:
            return False
        for text in found.requires or ():
            inner = Requirement(text)
            # A line without a marker on `extra` is the distribution's own business, and was its installer's.
            if inner.marker is None or inner.marker.evaluate({"extra": ""}):
                continue
            if not inner.marker.evaluate({"extra": extra}):
                continue
            other = _installed(inner.name)
            if other is None or not _fits(inner, other.version) or not _extras_met(inner, other, seen):
                return False
    return True


def missing(repo: str, needs: Sequence[Need]) -> MissingRequirementsError | None:
    """The error for what is not met, in the words that users of the Hub know; None if all is."""
    unmet = [need for need in needs if need.unmet]
    if not unmet:
        return None
    lines = [f"{need.text} (installed: {need.installed})" for need in unmet]
    return MissingRequirementsError(
        f"Missing requirements in your local environment for `{repo}`:\n" + "\n".join(lines),
        fix="Install them and try again, or let pip do it with --with-deps. Without --install a wheel can be made all "
        "the same: these are its dependencies.",
        plugin=repo,
        requirements=tuple(need.text for need in unmet),
    )
