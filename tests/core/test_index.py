"""The index: it saves time, never changes an answer, and is never a reason to fail."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from pluglm import discovery, index
from pluglm.discovery import Discovery, discover


def search(site) -> Discovery:
    return discover(paths=[str(site.path)], index=site.cache)


def settle(site) -> None:
    """Age everything, since what changed a moment ago is not indexed."""
    for path in (site.path, *site.path.rglob("*")):
        os.utime(path, ns=(10**18, path.stat().st_mtime_ns - 10**9))


@pytest.fixture
def scans(monkeypatch):
    """The directories that were searched and not looked up."""
    seen = []
    run = discovery._Scan.run
    monkeypatch.setattr(
        discovery._Scan, "run", lambda self, signature: (seen.append(self.directory), run(self, signature))[1]
    )
    return seen


def shard(site) -> Path:
    (path,) = (site.cache / "discovery").iterdir()
    return path


def test_the_second_discovery_reads_the_index_and_answers_the_same(site, scans):
    site.install()
    site.install("plain", points={"cache/x": "plain"}, providers=None)
    settle(site)
    first, second = search(site), search(site)
    assert first == second
    assert len(first.providers) == 2
    assert len(scans) == 1


def test_an_installed_plugin_is_found_at_once(site, scans):
    site.install()
    settle(site)
    search(site)
    site.install("newcomer")
    assert len(search(site).providers) == 2
    assert len(scans) == 2


def test_an_edited_manifest_counts_at_once(site):
    site.install()
    settle(site)
    search(site)
    manifest = site.path / "acme_fa3" / "pluglm.json"
    manifest.write_text(manifest.read_text().replace("Fast.", "Slow."))
    (provider,) = search(site).providers
    assert provider.facts is not None
    assert provider.facts["summary"] == "Slow."


def test_a_manifest_that_breaks_later_empties_the_facts(site):
    site.install()
    settle(site)
    search(site)
    (site.path / "acme_fa3" / "pluglm.json").write_text("{")
    (provider,) = search(site).providers
    assert provider.facts is not None
    assert dict(provider.facts) == {}


def test_a_manifest_that_appears_later_is_found(site):
    site.install(providers=None)
    settle(site)
    search(site)
    facts = {"schema": 1, "distribution": "acme-fa3", "providers": [{"kind": "attention", "name": "fa3", "api": ">=1"}]}
    (site.path / "acme_fa3" / "pluglm.json").write_text(json.dumps(facts))
    (provider,) = search(site).providers
    assert provider.facts is not None


def test_a_repaired_file_is_noticed(site):
    info = site.install()
    (info / "METADATA").write_text("Name: acme-fa3\n")
    settle(site)
    assert search(site).problems == search(site).problems != ()
    (info / "METADATA").write_text("Name: acme-fa3\nVersion: 1.0\n")
    assert not search(site).problems


def test_what_the_system_refused_to_read_is_not_kept(site):
    info = site.install()
    (info / "METADATA").unlink()
    settle(site)
    search(site)
    assert not site.cache.exists()


def test_a_directory_that_changed_a_moment_ago_is_not_indexed(site):
    site.install()
    now = time.time_ns() + 10**9
    os.utime(site.path, ns=(now, now))
    search(site)
    assert not site.cache.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: b"\x80\x04K\x01.",
        lambda raw: b"[1]\n[]",
        lambda raw: b"{}\n" + raw,
        lambda raw: raw.replace(b"acme_fa3", b"evil_fa3"),
        lambda raw: raw.replace(b'"pluglm-index", 1', b'"pluglm-index", 2'),
        lambda raw: raw.replace(sys.implementation.cache_tag.encode(), b"cpython-27"),
        lambda raw: b"[" * 100_000,
    ],
)
def test_a_damaged_or_foreign_index_counts_as_absent(site, scans, damage):
    site.install()
    settle(site)
    before = search(site)
    shard(site).write_bytes(damage(shard(site).read_bytes()))
    assert search(site) == before
    assert search(site) == before
    assert len(scans) == 2, "it was rebuilt once, then used"


def test_the_index_of_another_directory_is_not_used(site, tmp_path, scans, monkeypatch):
    other = type(site)(tmp_path / "other", site.libraries)
    site.install()
    settle(site)
    monkeypatch.setattr(index, "shard_path", lambda place, directory: os.path.join(place, "discovery", "one"))
    search(site)
    assert not discover(paths=[str(other.path)], index=site.cache).providers


def test_an_index_that_cannot_be_written_is_no_error(site):
    site.install()
    settle(site)
    site.cache.write_text("a file where the folder should be")
    assert len(search(site).providers) == 1
    assert len(search(site).providers) == 1


def test_many_writers_at_once_leave_one_whole_index(site, scans):
    site.install()
    settle(site)
    results: list[Discovery] = []
    threads = [threading.Thread(target=lambda: results.append(search(site))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scans.clear()
    assert {search(site)} == set(results)
    assert not scans
    assert shard(site).exists(), "no temporary file is left over"


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"PLUGLM_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/pluglm"),
        ({"HOME": "/c"}, "/c/.cache/pluglm"),
    ],
)
def test_the_index_lies_in_the_users_cache(monkeypatch, variables, place):
    for name in ("PLUGLM_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert index.cache_directory() == place
