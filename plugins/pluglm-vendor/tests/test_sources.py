"""What a user may write as a source, and what is said to the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from pluglm_vendor.bundle import provider_name
from pluglm_vendor.sources import FolderSource, HubSource, not_pinned, parse_source

from pluglm.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_whole_commit_is_pinned_in_either_case() -> None:
    source = parse_source(f"hub:org/na-me.x@{COMMIT.upper()}")
    assert source == HubSource("org/na-me.x", COMMIT)
    assert source.pinned
    assert str(source) == f"hub:org/na-me.x@{COMMIT}"


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", COMMIT[:7], COMMIT[:39], COMMIT + "0", "g" * 40, ""])
def test_nothing_else_is(revision: str) -> None:
    source = parse_source(f"hub:org/name@{revision}" if revision else "hub:org/name")
    assert isinstance(source, HubSource)
    assert not source.pinned


def test_an_unpinned_source_is_told_the_commit_that_it_leads_to() -> None:
    error = not_pinned(HubSource("org/name", "v1"), COMMIT, "https://hub")
    assert error.what == '"v1" of org/name is no commit.'
    assert "can be moved" in error.why
    assert error.fix == f"v1 is now at {COMMIT}; if that is what you mean, write hub:org/name@{COMMIT}"
    assert not_pinned(HubSource("org/name", ""), COMMIT, "https://hub").fix.startswith(f"main is now at {COMMIT};")


def test_without_the_hub_it_is_told_where_to_look() -> None:
    error = not_pinned(HubSource("org/name", "main"), None, "https://hub")
    assert "https://hub/org/name/commits/main" in error.fix
    assert "hub:org/name@<40 hex digits>" in error.fix


@pytest.mark.parametrize(
    "text",
    ["hub:name@main", "hub:org/name/x@main", "hub:../name@main", "hub:org/..@main", "hub:org/na--me@main", "hub:@main",
     "hub:org/na me@main", "hub:org/name@../x", "hub:org/name@ma in", "hub:org/name@-x", "hub:örg/name@main"],
)  # fmt: skip
def test_what_cannot_be_a_repository_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="does not name a commit on the Hub") as caught:
        parse_source(text)
    assert f"hub:org/name@{COMMIT}" in str(caught.value)


def test_a_folder_is_named_by_its_own_name_in_harmless_characters(tmp_path: Path) -> None:
    odd = tmp_path / 'x"""\nimport os #'
    odd.mkdir()
    source = parse_source(str(odd))
    assert isinstance(source, FolderSource)
    assert str(source) == "dir:x____import_os__"


def test_what_is_no_folder_is_refused_with_a_word_about_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder") as caught:
        parse_source("org/name@main")
    assert "For the Hub write hub:org/name@main." in str(caught.value)
    with pytest.raises(InputError, match="Check the spelling") as caught:
        parse_source(str(tmp_path / "gone" / "away"))
    assert "hub:/" not in str(caught.value)


@pytest.mark.parametrize(
    ("repo", "name"),
    [
        ("org/custom_generate_example", "custom-generate-example"),
        ("o/topN_sigma.v2", "topn-sigma-v2"),
        ("4-Bit", "4-bit"),
    ],
)
def test_the_name_is_made_from_the_repository(repo: str, name: str) -> None:
    assert provider_name(repo, None) == name


@pytest.mark.parametrize("wish", ["", "Mine", "my_own", "my--own", "-x", "x-", "../x", "a b", "auto", "x" * 65, "é"])
def test_a_name_that_cannot_be_one_is_refused(wish: str) -> None:
    with pytest.raises(InputError, match="cannot name a decoding method") as caught:
        provider_name("org/name", wish)
    assert "--name" in str(caught.value)


def test_a_repository_without_a_usable_name_asks_for_one() -> None:
    with pytest.raises(InputError, match="--name"):
        provider_name("org/auto", None)
