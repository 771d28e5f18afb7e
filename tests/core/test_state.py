"""References that users type, and what they switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pluglm.errors import InputError, PluginConflictError, PluginError, PluginNotFoundError, SaveError
from pluglm.provider import Provider, Reference, parse_reference
from pluglm.state import State, disable, enable, load_state, state_path


def provider(distribution: str, kind: str, name: str) -> Provider:
    return Provider(kind, name, distribution, "1.0", "module", "/nowhere")


FA3 = provider("acme-fa3", "attention", "fa3")
ROTATED = provider("acme-fa3", "cache", "rotated")
OTHER = provider("other", "attention", "fa3")
INSTALLED = [FA3, ROTATED, OTHER]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("sdpa", Reference(None, None, "sdpa")),
        ("quantized:hqq", Reference(None, None, "quantized", "hqq")),
        ("attention/fa3", Reference(None, "attention", "fa3")),
        ("acme-fa3:attention/fa3", Reference("acme-fa3", "attention", "fa3")),
        ("Acme_FA3:attention/fa3:v2", Reference("acme-fa3", "attention", "fa3", "v2")),
    ],
)
def test_a_reference_is_taken_apart(text, reference):
    assert parse_reference(text) == reference


@pytest.mark.parametrize(
    "text", ["", " ", "a b", ":x", "x:", "a:b:c", "/x", "attention/", "a:/x", ":attention/x", "-x", "x/..", "a\n"]
)
def test_a_malformed_reference_is_refused(text):
    with pytest.raises(InputError) as caught:
        parse_reference(text)
    assert f"{text!r} does not name a plugin." in str(caught.value)
    assert "as `pluglm plugins list` prints it." in str(caught.value)


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="names the kind 'atention', which does not exist.") as caught:
        parse_reference("atention/fa3")
    assert "('attention' is near)" in str(caught.value)


@given(st.text(max_size=20))
def test_any_text_is_a_reference_or_an_input_error(text):
    try:
        reference = parse_reference(text)
    except InputError:
        return
    assert text.endswith(reference.name) or reference.variant is not None


def test_nothing_is_disabled_where_there_is_no_file(tmp_path):
    assert load_state(tmp_path / "absent") == State()


def test_a_disabled_plugin_stays_disabled_until_enabled(tmp_path):
    path = tmp_path / "folder" / "plugins.json"
    assert disable("rotated", INSTALLED, path=path) == "acme-fa3:cache/rotated"
    assert load_state(path).is_disabled(ROTATED)
    assert not load_state(path).is_disabled(FA3)
    assert enable("acme-fa3:cache/rotated", [], path=path) == "acme-fa3:cache/rotated", "even if uninstalled meanwhile"
    assert load_state(path) == State()
    assert [entry.name for entry in path.parent.iterdir()] == ["plugins.json"]


def test_a_distribution_is_disabled_as_a_whole(tmp_path):
    path = tmp_path / "plugins.json"
    assert disable("Acme_FA3", INSTALLED, path=path) == "acme-fa3"
    state = load_state(path)
    assert [state.is_disabled(p) for p in INSTALLED] == [True, True, False]
    with pytest.raises(PluginError, match="stays disabled.\n  Why: its distribution acme-fa3 is disabled as a whole."):
        enable("acme-fa3:cache/rotated", INSTALLED, path=path)


def test_an_ambiguous_name_is_refused_with_the_candidates(tmp_path):
    with pytest.raises(PluginConflictError) as caught:
        disable("fa3", INSTALLED, path=tmp_path / "s")
    assert "'fa3' can mean several plugins." in str(caught.value)
    assert caught.value.candidates == ["acme-fa3:attention/fa3", "other:attention/fa3"]
    assert not (tmp_path / "s").exists()


def test_an_unknown_name_is_refused_with_near_ones(tmp_path):
    with pytest.raises(PluginNotFoundError) as caught:
        disable("rotatd", INSTALLED, path=tmp_path / "s")
    assert "no installed plugin or distribution is called 'rotatd'." in str(caught.value)
    assert "near names: rotated" in str(caught.value)


def test_an_unknown_name_with_nothing_near_says_so():
    with pytest.raises(PluginNotFoundError, match="no name is near it."):
        disable("zzz", INSTALLED)


def test_a_variant_cannot_be_switched(tmp_path):
    with pytest.raises(InputError, match="names a variant of a plugin.(.|\n)*leave out ':hqq'."):
        disable("rotated:hqq", INSTALLED, path=tmp_path / "s")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"schema": 2, "disabled": []}',
        '{"schema": 1, "disabled": [1]}',
        '{"schema": 1, "disabled": 3}',
        '{"schema": 1}',
    ],
)
def test_a_state_that_cannot_be_understood_is_an_error_and_not_overwritten(tmp_path, content):
    path = tmp_path / "plugins.json"
    path.write_text(content)
    with pytest.raises(PluginError) as caught:
        disable("rotated", INSTALLED, path=path)
    assert f"the list of disabled plugins, {path}, cannot be read." in str(caught.value)
    assert "or delete it to enable everything" in str(caught.value)
    assert path.read_text() == content


def test_a_state_that_cannot_be_written_is_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "plugins.json"
    disable("rotated", INSTALLED, path=path)

    def refuse(self: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(SaveError, match="was not written; what is disabled has not changed."):
        enable("rotated", INSTALLED, path=path)
    assert load_state(path).is_disabled(ROTATED)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"PLUGLM_CONFIG_DIR": "/a", "XDG_CONFIG_HOME": "/b"}, "/a/plugins.json"),
        ({"XDG_CONFIG_HOME": "/b", "HOME": "/c"}, "/b/pluglm/plugins.json"),
        ({"HOME": "/c"}, "/c/.config/pluglm/plugins.json"),
    ],
)
def test_the_state_lies_in_the_users_configuration(monkeypatch, variables, place):
    for name in ("PLUGLM_CONFIG_DIR", "XDG_CONFIG_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert state_path() == str(Path(place))
