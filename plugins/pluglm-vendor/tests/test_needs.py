"""Requirements are read as PEP 508 says: every line that transformers' own parser reads wrongly is a case here."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from pluglm_vendor.needs import MissingRequirementsError, check, missing, read_requirements

from pluglm.errors import InputError, PluginError


def write(folder: Path, name: str, version: str, *lines: str) -> None:
    """An installed distribution, as far as metadata tells."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(("Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines)))


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """acme-torch 2.13.0+cpu, whose extra `opt` is met and whose extra `big` is not."""
    needs = (
        "Provides-Extra: opt", "Provides-Extra: big", 'Requires-Dist: acme-math>=1; extra == "opt"',
        'Requires-Dist: acme-huge; extra == "big"', "Requires-Dist: acme-broken>=9",
    )  # fmt: skip
    write(tmp_path, "acme-torch", "2.13.0+cpu", *needs)
    write(tmp_path, "Acme.Math", "1.5rc1")
    write(tmp_path, "acme-odd", "no-version")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def status(line: str) -> tuple[str | None, str]:
    (need,) = check(read_requirements("org/name", line))
    return need.installed, need.status


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("acme-torch", "met"),
        ("acme-torch~=2.0", "met"),
        ("acme-torch~=2.12.0", "other version"),
        ("acme-torch==2.13.*", "met"),
        ("acme-torch==2.12.*", "other version"),
        ("acme-torch >= 2.0", "met"),
        ("acme-torch>=2.0,<2.1", "other version"),
        ("acme-torch>=2.0,!=2.13.0", "other version"),
        ("acme-torch>=2.0 , <3", "met"),
        ("acme-torch==2.13.0", "met"),
        ("acme-torch===2.13.0+cpu", "met"),
        ("acme-torch>=99.0", "other version"),
        ("ACME_Torch>=2", "met"),
        ("acme.torch (>=2)", "met"),
        ("acme-torch>=99 # a comment", "other version"),
        ("acme-torch[opt]>=2", "met"),
        ("acme-torch[big]", "missing what an extra requires"),
        ("acme-torch[none]", "missing what an extra requires"),
        ("acme-math>=1", "met"),
        ("acme-torch>=99; python_version < '3'", "not needed here"),
        ('acme-torch>=2; python_version >= "3"', "met"),
        ("acme-gone; python_version < '3'", "not needed here"),
        ("acme-gone", "missing"),
        ("acme-odd", "met"),
        ("acme-odd>1", "other version"),
    ],
)
def test_a_line_is_judged_by_every_word_of_it(line: str, found: str) -> None:
    assert status(line)[1] == found


def test_the_version_that_is_there_is_told() -> None:
    assert status("acme-torch>=99") == ("2.13.0+cpu", "other version")
    assert status("acme-gone") == (None, "missing")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("acme @ https://host.invalid/acme.whl", "it names an address or a file"),
        ("https://host.invalid/acme.whl", "it names an address or a file"),
        ("git+https://host.invalid/acme.git", "it names an address or a file"),
        ("acme @ git+ssh://git@host.invalid/acme", "it names an address or a file"),
        ("./acme", "it names an address or a file"),
        ("/opt/acme", "it names an address or a file"),
        ("acme-1.0-py3-none-any.whl", "it names an address or a file"),
        ("-r other.txt", "it is an option of pip"),
        ("--index-url https://host.invalid", "it is an option of pip"),
        ("--extra-index-url=https://host.invalid", "it is an option of pip"),
        ("-e .", "it is an option of pip"),
        ("acme==", "it is no requirement"),
        ("acme>>2", "it is no requirement"),
        ("two words", "it is no requirement"),
        ("acme; os_nam == 'x'", "it is no requirement"),
        ("acme==1.0 --hash=sha256:00", "it is no requirement"),
    ],
)
def test_what_is_no_plain_requirement_is_refused_with_its_line(line: str, why: str) -> None:
    with pytest.raises(InputError, match="is refused") as caught:
        read_requirements("org/name", f"acme-torch\n\n# note\n{line}\n")
    assert f"line 4 of custom_generate/requirements.txt of `org/name` is refused: {line}" in caught.value.what
    assert why in caught.value.why
    assert "plain requirement" in caught.value.fix


def test_comments_blank_lines_and_joined_lines_are_read_as_pip_reads_them() -> None:
    text = "\n# a\n  # b\nacme-torch>=2,\\\n  <3\r\nacme-math # why\nacme\\\n"
    assert [str(r) for _, r in read_requirements("o/n", text)] == ["acme-torch<3,>=2", "acme-math", "acme"]


def test_the_error_has_the_text_that_users_know_and_is_an_import_error() -> None:
    needs = check(
        read_requirements("org/name", "foo\nacme-torch\nbar==0.0.0\nacme-torch >= 99.0\nbaz; python_version<'3'")
    )
    error = missing("org/name", needs)
    assert isinstance(error, MissingRequirementsError)
    assert isinstance(error, ImportError)
    assert isinstance(error, PluginError)
    assert error.what == (
        "Missing requirements in your local environment for `org/name`:\nfoo (installed: None)\n"
        "bar==0.0.0 (installed: None)\nacme-torch >= 99.0 (installed: 2.13.0+cpu)"
    )
    assert str(error).startswith(error.what + "\n  To do: Install them")
    assert error.requirements == ("foo", "bar==0.0.0", "acme-torch >= 99.0")
    assert missing("org/name", check(read_requirements("org/name", "acme-torch"))) is None


def test_the_distributions_of_these_tests_are_seen_by_the_standard_library() -> None:
    assert metadata.version("acme-torch") == "2.13.0+cpu"
