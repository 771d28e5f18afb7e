"""Discovery: everything installed is found, nothing is imported, and what is broken is stepped over."""

from __future__ import annotations

import importlib.metadata
import json
import os
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pluglm.discovery import Discovery, discover
from pluglm.metadata import entry_points, installed_versions


def search(*paths: object) -> Discovery:
    return discover(paths=[str(path) for path in paths], index=None)


def only_problem(found: Discovery) -> str:
    (problem,) = found.problems
    return f"{problem.stage}: {problem.message}"


def test_a_provider_carries_its_identity_and_its_facts(site):
    info = site.install("Acme_FA3", version="1.4.0", providers=[{"features": ["window"]}])
    (provider,) = search(site.path).providers
    assert provider.id == "acme-fa3:attention/fa3"
    assert (provider.version, provider.target, provider.location) == ("1.4.0", "acme_fa3", str(info))
    assert provider.facts is not None
    assert provider.facts["features"] == ["window"]
    assert provider.manifest_path == str(site.path / "acme_fa3" / "pluglm.json")


def test_a_package_without_a_manifest_has_no_facts(site):
    site.install(providers=None)
    (provider,) = search(site.path).providers
    assert provider.facts is None
    assert provider.manifest_path is None


def test_providers_are_sorted_by_kind_name_and_distribution(site):
    site.install("b-two", points={"cache/x": "b_two", "attention/fa3": "b_two"})
    site.install("a-one")
    ids = [provider.id for provider in search(site.path).providers]
    assert ids == ["a-one:attention/fa3", "b-two:attention/fa3", "b-two:cache/x"]


def test_discovery_imports_neither_plugins_nor_heavy_modules(site):
    site.install()
    program = (
        "import sys; from pluglm.discovery import discover\n"
        "assert len(discover().providers) == 1; assert len(discover().providers) == 1\n"
        "bad = {'acme_fa3', 'importlib.metadata', 'pydantic', 'pluggy', 'torch', 'packaging'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    run = site.python("-c", program)
    assert run.returncode == 0, run.stderr


def test_the_facts_of_an_editable_install_are_found_through_a_path_file(site, tmp_path):
    site.install(providers=None)
    source = tmp_path / "project" / "src"
    source.mkdir(parents=True)
    (site.path / "acme_fa3").rename(source / "acme_fa3")
    facts = {"schema": 1, "distribution": "acme-fa3", "providers": [{"kind": "attention", "name": "fa3"}]}
    (source / "acme_fa3" / "pluglm.json").write_text(json.dumps(facts))
    (site.path / "_acme.pth").write_text(f"import os; os.abort()\n# comment\n{source}\n")
    (provider,) = search(site.path).providers
    assert provider.manifest_path == str(source / "acme_fa3" / "pluglm.json")


def test_the_facts_of_an_editable_install_are_found_through_its_origin(site, tmp_path):
    info = site.install(providers=None)
    project = tmp_path / "my project"
    (project / "src" / "acme_fa3").mkdir(parents=True)
    facts = {"schema": 1, "distribution": "acme-fa3", "providers": []}
    (project / "src" / "acme_fa3" / "pluglm.json").write_text(json.dumps(facts))
    origin = {"url": project.as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(origin))
    (provider,) = search(site.path).providers
    assert provider.manifest_path == str(project / "src" / "acme_fa3" / "pluglm.json")


def test_the_build_leftover_of_an_editable_install_counts_once(site, tmp_path):
    site.install(providers=None)
    other = type(site)(tmp_path / "source", site.libraries)
    other.install(suffix="egg-info")
    (site.path / "acme_fa3" / "__init__.py").unlink()
    (site.path / "acme_fa3").rmdir()
    (site.path / "acme.pth").write_text(str(other.path))
    found = search(site.path, other.path)
    (provider,) = found.providers
    assert provider.location.endswith(".dist-info")
    assert not found.problems


def test_one_directory_reached_by_two_names_counts_once(site, tmp_path):
    site.install()
    (tmp_path / "link").symlink_to(site.path)
    found = search(site.path, tmp_path / "link", site.path)
    assert len(found.providers) == 1
    assert not found.problems


def test_a_distribution_installed_twice_is_not_used_at_all(site, tmp_path):
    other = type(site)(tmp_path / "other", site.libraries)
    site.install(version="1.0")
    other.install(version="2.0")
    other.install("innocent")
    found = search(site.path, other.path)
    assert [provider.distribution for provider in found.providers] == ["innocent"]
    message = only_problem(found)
    assert "duplicate: installed more than once (2.0 in " in message
    assert "; 1.0 in " in message
    assert "none is used. Uninstall all but one." in message


def test_two_versions_left_in_one_directory_are_a_problem(site):
    site.install(version="1.0")
    site.install(version="1.1")
    found = search(site.path)
    assert not found.providers
    assert "1.0 in " in only_problem(found)


def test_two_distributions_with_one_name_are_both_listed(site):
    site.install("a-one")
    site.install("b-two")
    found = search(site.path)
    assert len(found.providers) == 2
    assert not found.problems


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "entry_points.txt",
            b"[pluglm.atention]\nx = y",
            "entry points: the group 'pluglm.atention' is not one of pluglm's.",
        ),
        (
            "entry_points.txt",
            b"[pluglm.attention]\na:b = y",
            "entry points: 'a:b' in [pluglm.attention] cannot be a plugin's name.",
        ),
        (
            "entry_points.txt",
            b"[pluglm.attention]\nx = y z",
            "has the target 'y z', which is not 'module' or 'module:object'.",
        ),
        ("entry_points.txt", b"[pluglm.attention]\nx", "'x' in [pluglm.attention] has the target ''"),
        (
            "entry_points.txt",
            b"[pluglm.attention]\nx=y\nx=z",
            "'x' stands twice in [pluglm.attention]; the first counts.",
        ),
        (
            "entry_points.txt",
            b"[pluglm.attention]\nx=\xff",
            "entry_points.txt is malformed: it is not UTF-8 (byte 21).",
        ),
        ("METADATA", b"Name: acme-fa3\n", "metadata: METADATA is malformed: it has no Version line."),
        ("METADATA", b"Version: 1\n\nName: later\n", "metadata: METADATA is malformed: it has no Name line."),
        ("METADATA", b"Name: \xff\nVersion: 1\n", "metadata: METADATA is malformed: its Name or Version is not UTF-8."),
        ("METADATA", None, "metadata: METADATA cannot be read: No such file or directory."),
    ],
)
def test_malformed_metadata_is_a_problem_and_spares_the_others(site, file, content, message):
    info = site.install()
    site.install("innocent")
    (info / file).unlink()
    if content is not None:
        (info / file).write_bytes(content)
    found = search(site.path)
    assert message in only_problem(found)
    assert "innocent:attention/fa3" in [provider.id for provider in found.providers]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "pluglm.json is malformed: it is not a manifest (JSONDecodeError"),
        ("[]", "it is not a manifest (TypeError"),
        ("[" * 100_000, "it is not a manifest (RecursionError"),
        ('{"schema": 1, "distribution": "acme-fa3", "providers": [3]}', "it is not a manifest (TypeError"),
        ('{"schema": 1, "distribution": "acme-fa3", "providers": [{}]}', "it is not a manifest (KeyError: 'kind')."),
        ('{"schema": 1, "distribution": "acme-fa3", "providers": [{"kind": [], "name": 1}]}', "(TypeError"),
        ('{"schema": 2, "distribution": "acme-fa3", "providers": []}', "it has the schema 2; this pluglm reads 1."),
        (
            '{"schema": 1, "distribution": "x", "providers": []}',
            "it is that of the distribution 'x', not of 'acme-fa3'.",
        ),
        (" " * 1_100_000, "it has 1100000 bytes; at most 1048576 are read."),
    ],
)
def test_a_manifest_that_is_of_no_use_leaves_the_provider_without_facts(site, manifest, message):
    site.install(manifest=manifest)
    found = search(site.path)
    assert found.providers[0].facts is None
    assert message in only_problem(found)


def test_a_pipe_in_place_of_a_manifest_does_not_hang(site):
    site.install(providers=None)
    os.mkfifo(site.path / "acme_fa3" / "pluglm.json")
    assert "it is not a regular file." in only_problem(search(site.path))


def test_archives_and_absent_directories_on_the_path_are_problems(site, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.egg", "w") as archive:
        archive.writestr("EGG-INFO/entry_points.txt", "[pluglm.attention]\nx = y\n")
    found = search(tmp_path / "x.egg", tmp_path / "absent", tmp_path / "python311.zip", site.path)
    messages = [problem.message for problem in found.problems]
    assert messages == [
        "plugins inside an archive are not found; install them unpacked.",
        "this entry of the import path does not exist.",
    ]


def test_an_unreadable_directory_is_a_problem(site, monkeypatch):
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "path: this entry of the import path cannot be read: [Errno 13]" in only_problem(search(site.path))


def test_facts_of_a_manifest_that_vanished_are_empty(site):
    site.install()
    discover(paths=[str(site.path)], index=site.cache)
    (provider,) = discover(paths=[str(site.path)], index=None).providers
    assert provider.facts
    from pluglm.provider import Facts

    assert dict(Facts(str(site.path / "absent"), "attention", "fa3", "acme-fa3")) == {}


def test_installed_versions_are_read_from_directory_names(site):
    site.install("Acme.FA3", version="1.4.0+cpu")
    assert installed_versions([str(site.path), str(site.path / "absent")])["acme-fa3"] == "1.4.0+cpu"


_LINES = st.lists(
    st.sampled_from(["[pluglm.attention]", "[other]", "a = b", "c=d:e", "# note", "", "  f =  g.h  "]), max_size=12
)


@given(_LINES)
def test_entry_points_are_read_as_the_standard_library_reads_them(lines):
    lines = ["[pluglm.caches]", *lines]
    text = "\n".join(lines)
    ours = [tuple(point) for point in entry_points(text, "pluglm.")]
    theirs = importlib.metadata.EntryPoints._from_text_for(text, None)  # type: ignore[arg-type]
    assert ours == [(p.group, p.name, p.value) for p in theirs if p.group.startswith("pluglm.")]


def test_every_byte_string_in_the_metadata_is_survived(site):
    info = site.install()

    @given(st.binary(max_size=40), st.sampled_from(["entry_points.txt", "METADATA"]))
    def survives(raw: bytes, name: str) -> None:
        kept = (info / name).read_bytes()
        Path(info / name).write_bytes(b"[pluglm.attention]\n" + raw)
        search(site.path)
        (info / name).write_bytes(kept)

    survives()
