"""The quarantine: nothing in it can be imported, and nothing that changed is taken from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pluglm_vendor.quarantine import Quarantine
from pluglm_vendor.recipe import fetched_recipe
from pluglm_vendor.sources import HubSource

from pluglm.errors import SaveError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SOURCE = HubSource("org/name", COMMIT)
CONTENT = {"custom_generate/generate.py": b"import helper", "custom_generate/helper.py": b"", "LICENSE": b"MIT"}


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    Quarantine(SOURCE, tmp_path).store(CONTENT, ("notes.md",))
    known = Quarantine(SOURCE, tmp_path).load()
    assert known == (CONTENT, ("notes.md",))
    found = fetched_recipe(SOURCE, *known)
    assert found is not None
    assert set(found.files) == {"custom_generate/generate.py", "custom_generate/helper.py"}
    assert found.papers == {"LICENSE": b"MIT"}
    assert found.left_out == ("notes.md",)


def test_no_file_keeps_a_name_that_python_could_import(tmp_path: Path) -> None:
    Quarantine(SOURCE, tmp_path).store(CONTENT, ())
    names = [path.name for path in tmp_path.rglob("*")]
    assert len(names) == 5
    assert all(name == "table.json" or (len(name) == 64 and int(name, 16) >= 0) for name in names)


def test_another_commit_lies_elsewhere(tmp_path: Path) -> None:
    Quarantine(SOURCE, tmp_path).store(CONTENT, ())
    assert Quarantine(HubSource("org/name", "f" * 40), tmp_path).load() is None


@pytest.mark.parametrize("damage", ["byte", "gone", "table", "no entry", "other source"])
def test_what_is_damaged_counts_as_absent(tmp_path: Path, damage: str) -> None:
    place = Quarantine(SOURCE, tmp_path)
    place.store(CONTENT, ())
    table = place.folder / "table.json"
    said = json.loads(table.read_text())
    entry = place.folder / said["files"]["custom_generate/generate.py"]
    if damage == "byte":
        entry.write_bytes(b"Import helper")
    elif damage == "gone":
        entry.unlink()
    elif damage == "table":
        table.write_text("{")
    elif damage == "no entry":
        del said["files"]["custom_generate/generate.py"]
        table.write_text(json.dumps(said))
    else:
        table.write_text(json.dumps({**said, "source": "hub:evil/name@" + COMMIT}))
    known = place.load()
    assert known is None or fetched_recipe(SOURCE, *known) is None


def test_a_listing_comes_back_for_its_own_source_only(tmp_path: Path) -> None:
    place = Quarantine(SOURCE, tmp_path, form="kernel")
    assert place.load_listing() is None
    place.store_listing("kernel", {"README.md": 7, "build/x/y.so": None})
    assert place.load_listing() == ("kernel", {"README.md": 7, "build/x/y.so": None})
    listing = place.folder / "listing.json"
    listing.write_text(listing.read_text().replace("org/name", "evil/name"))
    assert place.load_listing() is None
    assert Quarantine(SOURCE, tmp_path).folder != place.folder


def test_parts_of_a_commit_share_a_place_and_not_a_table(tmp_path: Path) -> None:
    place = Quarantine(SOURCE, tmp_path, form="kernel")
    place.store({"build/a/x.so": b"1"}, (), "a")
    assert place.load("a") == ({"build/a/x.so": b"1"}, ())
    assert place.load("b") is None
    assert place.load() is None


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="PLUGLM_CACHE_DIR"):
        Quarantine(SOURCE, tmp_path / "file").store(CONTENT, ())
