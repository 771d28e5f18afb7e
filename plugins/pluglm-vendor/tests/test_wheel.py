"""The wheel: its bytes, its metadata, and what foreign text cannot do in it."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename
from pluglm_vendor.needs import read_requirements
from pluglm_vendor.page import plain
from pluglm_vendor.recipe import Recipe
from pluglm_vendor.wheel import write_wheel

from pluglm.errors import SaveError
from pluglm.kinds import KINDS
from pluglm.manifest import parse_manifest
from pluglm.static_filter import static_refusals

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "custom_generate/generate.py": b"def generate(model, input_ids): ...\r\n",
    "custom_generate/requirements.txt": b"torch ~= 2.0\nnumpy[x]>=1; python_version < '3.13'\n",
}
RECIPE = Recipe(f"hub:org/name@{COMMIT}", "org/name", COMMIT, FILES, {"LICENSE.md": b"MIT", "README.md": b"# Read"})


def write(out: Path, recipe: Recipe = RECIPE) -> Path:
    return write_wheel(recipe, "my-name", [r for _, r in read_requirements("x", recipe.requirements)], out)


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    backwards = Recipe(
        RECIPE.source, RECIPE.repo, COMMIT, dict(reversed(FILES.items())), dict(reversed(RECIPE.papers.items()))
    )
    first, second = write(tmp_path / "a"), write(tmp_path / "b", backwards)
    assert first.name == second.name == "pluglm_recipe_my_name-1.0+g0123456789ab-py3-none-any.whl"
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first.name]


def test_a_changed_byte_gives_another_version_of_a_folder(tmp_path: Path) -> None:
    one = Recipe("dir:x", "x", None, FILES)
    two = Recipe("dir:x", "x", None, {**FILES, "custom_generate/generate.py": b"def generate(): 1"})
    assert write(tmp_path, one).name != write(tmp_path, two).name


def test_every_file_stands_in_record_with_its_digest(tmp_path: Path) -> None:
    content = members(write(tmp_path))
    (record,) = (name for name in content if name.endswith("RECORD"))
    rows = list(csv.reader(content[record].decode().splitlines()))
    assert [row[0] for row in rows] == list(content)
    for name, digest, size in rows[:-1]:
        expected = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={expected}", str(len(content[name])))
    assert rows[-1][1:] == ["", ""]


def test_the_name_and_the_metadata_are_what_packaging_accepts(tmp_path: Path) -> None:
    wheel = write(tmp_path)
    name, version, _, tags = parse_wheel_filename(wheel.name)
    content = members(wheel)
    (path,) = (name for name in content if name.endswith("METADATA"))
    metadata = Metadata.from_email(content[path])
    assert (
        (metadata.name, str(metadata.version)) == (name, str(version)) == ("pluglm-recipe-my-name", "1.0+g0123456789ab")
    )
    assert [str(tag) for tag in tags] == ["py3-none-any"]
    assert [str(need) for need in metadata.requires_dist or ()] == [
        "pluglm<0.2,>=0.1", "pluglm-hf<0.2,>=0.1", "torch~=2.0", 'numpy[x]>=1; python_version < "3.13"',
    ]  # fmt: skip
    assert metadata.license_files == ["LICENSE.md"]
    assert content[path.replace("METADATA", "licenses/LICENSE.md")] == b"MIT"


def test_the_files_are_those_that_were_fetched_and_sealed(tmp_path: Path) -> None:
    content = members(write(tmp_path))
    package = "pluglm_recipe_my_name"
    for name, data in FILES.items():
        assert content[f"{package}/recipe/{name}"] == data
    record = json.loads(content[f"{package}/recipe.json"])
    table = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    assert record == {
        "schema": 1, "source": RECIPE.source, "repo": "org/name", "commit": COMMIT, "files": table, "digest": RECIPE.digest,
    }  # fmt: skip
    lines = "".join(f"{table[name]}  {name}\n" for name in sorted(table))
    assert RECIPE.digest == hashlib.sha256(lines.encode()).hexdigest()


def test_the_manifest_is_valid_and_the_entry_point_leads_to_the_package(tmp_path: Path) -> None:
    content = members(write(tmp_path))
    manifest = parse_manifest(json.loads(content["pluglm_recipe_my_name/pluglm.json"]), "x")
    assert [(facts.kind, facts.name) for facts in manifest.providers] == [("decoding", "my-name")]
    wanted = {"device": "cpu", "dtype": None, "torch_version": None, "api_version": KINDS["decoding"].version}
    assert static_refusals(manifest.providers[0], features=("favourite", "temperature"), **wanted) == ()
    assert static_refusals({**manifest.providers[0].model_dump(), "features": ()}, features=("x",), **wanted)
    (points,) = (text for name, text in content.items() if name.endswith("entry_points.txt"))
    assert points == b"[pluglm.decoding]\nmy-name = pluglm_recipe_my_name\n"
    compile(content["pluglm_recipe_my_name/__init__.py"], "x", "exec")


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="was not written") as caught:
        write(tmp_path / "file")
    assert "--out" in str(caught.value)


def test_foreign_text_cannot_steer_a_terminal() -> None:
    assert plain("MIT \x1b[2J\x07\r \u202e caf\xe9") == "MIT \\x1b[2J\\x07\\r \\u202e caf\xe9"
