"""Manifests: what is accepted, what is refused with which words, and how they are made from TOML."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pluglm.errors import ManifestError, SaveError
from pluglm.manifest import Manifest, json_schema, parse_facts, parse_manifest
from pluglm.manifest_build import build_manifest, prepare_manifest, write_manifest

FACTS = {"kind": "attention", "name": "fa3", "summary": "Fast.", "api": ">=1.0,<2"}
PYPROJECT = """
[project]
name = "Acme-FA3"
[project.entry-points."pluglm.attention"]
fa3 = "acme_fa3.impl:plugin"
[tool.pluglm]
[[tool.pluglm.providers]]
kind = "attention"
name = "fa3"
summary = "Fast."
api = ">=1.0,<2"
tier = "tuned"
requires = { devices = ["cuda"], head_dim = { max = 256 } }
"""


def whole(**facts: object) -> dict[str, object]:
    return {"schema": 1, "distribution": "acme-fa3", "providers": [{**FACTS, **facts}]}


def project(tmp_path: Path, text: str = PYPROJECT) -> Path:
    package = tmp_path / "src" / "acme_fa3"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(text)
    return tmp_path


def test_the_least_manifest_has_the_documented_defaults():
    (facts,) = parse_manifest(whole(), "x").providers
    assert facts.tier == "portable"
    assert facts.requires.devices == facts.features == facts.views == facts.slots == ()
    assert facts.numerics is None


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"kind": "atention"}, "providers[0].kind: 'atention' is not a kind; there are architecture, attention,"),
        ({"name": "a/b"}, "providers[0].name: 'a/b' is not a name of letters and digits"),
        ({"api": "1.0"}, "providers[0].api: '1.0' is not a range of versions such as '>=1.0,<2'."),
        ({"api": ""}, "providers[0].api: it must state a range of versions such as '>=1.0,<2'."),
        ({"summary": ""}, "providers[0].summary: String should have at least 1 character"),
        ({"tier": "best"}, "providers[0].tier: Input should be 'reference', 'portable' or 'tuned'"),
        ({"speed": 3}, "providers[0].speed: there is no such field."),
        ({"features": "window"}, "providers[0].features: Input should be a valid tuple"),
        ({"requires": {"torch": "new"}}, "providers[0].requires.torch: 'new' is not a range of versions"),
        ({"requires": {"packages": ["a b"]}}, "requires.packages[0]: 'a b' is not a requirement such as 'triton>=3'."),
        ({"requires": {"head_dim": {"max": 0}}}, "requires.head_dim.max: Input should be greater than or equal to 1"),
        ({"numerics": {"kind": "tolerance"}}, "numerics: `tolerance` needs atol or rtol, and `bitwise` takes neither."),
        ({"numerics": {"kind": "bitwise", "atol": 1}}, "numerics: `tolerance` needs atol or rtol"),
        ({"numerics": {"kind": "tolerance", "atol": float("nan")}}, "nan is not a finite number of at least 0."),
    ],
)
def test_a_wrong_field_is_refused_by_name(facts, message):
    with pytest.raises(ManifestError) as caught:
        parse_manifest(whole(**facts), "here/pluglm.json")
    text = str(caught.value)
    assert "here/pluglm.json is not a valid manifest." in text
    assert message in text
    assert "run `pluglm plugins build-manifest`" in text
    assert caught.value.path == "here/pluglm.json"


def test_every_wrong_field_is_named_not_only_the_first():
    with pytest.raises(ManifestError) as caught:
        parse_manifest({"schema": 2, "providers": [{}]}, "x")
    for place in ("schema", "distribution", "providers[0].kind", "providers[0].api"):
        assert place in caught.value.why


def test_a_provider_may_be_described_once():
    with pytest.raises(ManifestError, match="the file: attention/fa3: described more than once."):
        parse_manifest({**whole(), "providers": [FACTS, FACTS]}, "x")


def test_the_facts_of_one_provider_are_checked_alone():
    assert parse_facts(FACTS, plugin="p", path="x").name == "fa3"
    with pytest.raises(ManifestError, match=r"the facts of acme:attention/fa3 in x are not valid.\n  Why: kind: Field"):
        parse_facts({}, plugin="acme:attention/fa3", path="x")


def test_every_field_is_described_in_the_schema():
    schema = json_schema()
    assert "schema" in schema["properties"]
    for model in (schema, *schema["$defs"].values()):
        assert model["additionalProperties"] is False
        assert all("description" in field for field in model["properties"].values())


def test_the_reference_page_has_every_field_with_its_description():
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "manifest.md").read_text()
    schema = json_schema()
    for model in (schema, *schema["$defs"].values()):
        for name, field in model["properties"].items():
            assert any(
                line.startswith(f"| `{name}` |") and f"| {field['description']} |" in line for line in page.splitlines()
            )


def test_the_example_on_the_reference_page_is_valid(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "manifest.md").read_text()
    example = page.partition("```toml\n")[2].partition("```")[0]
    (facts,) = parse_manifest(json.loads(prepare_manifest(project(tmp_path, example)).text), "x").providers
    assert facts.numerics is not None


def test_the_json_made_from_toml_is_valid_and_short(tmp_path):
    path = build_manifest(project(tmp_path) / "pyproject.toml")
    assert path == tmp_path / "src" / "acme_fa3" / "pluglm.json"
    raw = json.loads(path.read_text())
    assert raw["distribution"] == "Acme-FA3"
    assert raw["providers"][0]["requires"] == {"devices": ["cuda"], "head_dim": {"max": 256}}
    assert "features" not in raw["providers"][0]
    assert isinstance(parse_manifest(raw, path), Manifest)
    assert [entry.name for entry in path.parent.iterdir() if entry.suffix != ".py"] == ["pluglm.json"]


def test_a_manifest_is_stale_until_it_is_written(tmp_path):
    prepared = prepare_manifest(project(tmp_path))
    assert prepared.stale
    write_manifest(prepared)
    assert not prepared.stale
    prepared.path.write_text("{}")
    assert prepared.stale


def test_a_package_beside_pyproject_is_found(tmp_path):
    (project(tmp_path) / "src" / "acme_fa3").rename(tmp_path / "acme_fa3")
    assert prepare_manifest(tmp_path).path == tmp_path / "acme_fa3" / "pluglm.json"


def test_an_entry_point_without_facts_is_a_warning(tmp_path):
    text = PYPROJECT.replace("[tool.pluglm]", 'other = "acme_fa3"\n[tool.pluglm]')
    (warning,) = prepare_manifest(project(tmp_path, text)).warnings
    assert warning == (
        "attention/other has no table in [[tool.pluglm.providers]]: it works when named, `auto` never chooses it."
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "fa3 =",
            "fa4 =",
            "describes attention/fa3, but announces no such plugin.\n  Why: [project.entry-points.\"pluglm.attention\"] has no entry 'fa3'.",
        ),
        ("[tool.pluglm]\n[[tool.pluglm.providers]]", "[tool.x]", "has no [tool.pluglm] table."),
        ("[project]\n", "[proj]\n", "cannot be read.\n"),
        ('tier = "tuned"', 'teir = "tuned"', "providers[0].teir: there is no such field."),
        ("acme_fa3.impl", "elsewhere.impl", "the package 'elsewhere' that"),
        (
            "[tool.pluglm]",
            'other = "elsewhere"\n[tool.pluglm]',
            "lie in 2 packages.\n  Why: a manifest belongs to one package; found acme_fa3, elsewhere.",
        ),
        ('name = "Acme-FA3"', "name =", "cannot be read."),
    ],
)
def test_a_project_that_does_not_fit_is_refused(tmp_path, old, new, message):
    text = PYPROJECT.replace(old, new, 1)
    if new == "[proj]\n":
        text, message = text.replace("[project.entry", "[proj.entry"), "has no [project] table."
    with pytest.raises(ManifestError) as caught:
        prepare_manifest(project(tmp_path, text))
    assert message in str(caught.value)


def test_a_folder_without_a_project_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"pyproject.toml cannot be read.\n  Why: .*No such file"):
        build_manifest(tmp_path)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = build_manifest(project(tmp_path))
    before = path.read_bytes()

    def refuse(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(SaveError, match=r"pluglm.json was not written.\n  Why: \[Errno 28\]"):
        build_manifest(tmp_path)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2
