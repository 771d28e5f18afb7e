"""What the metadata of every distribution promises, and what `make wheels` would find.

`make wheels` installs and tests each wheel alone. Here are the checks that need no environment, the content of every
built wheel, and planted packages that show `scripts/wheel_test.py` finds what it is there for.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT, *sorted(p.parent for kind in ("plugins", "contrib") for p in (ROOT / kind).glob("*/pyproject.toml"))]
SIBLING_RANGE = ">=0.1,<0.2"


def tables(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))


def project(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = tables(folder)["project"]
    return found


def all_requirements(folder: Path) -> list[Requirement]:
    found = project(folder)
    extras = found.get("optional-dependencies", {}).values()
    return [
        Requirement(line) for line in (*found.get("dependencies", []), *(line for extra in extras for line in extra))
    ]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


every_distribution = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: project(folder)["name"])
every_plugin = pytest.mark.parametrize("folder", FOLDERS[1:], ids=lambda folder: folder.name)


@every_plugin
def test_folder_distribution_and_import_name_are_one(folder: Path) -> None:
    assert project(folder)["name"] == folder.name
    packages = tables(folder)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == [f"src/{folder.name.replace('-', '_')}"]


@every_distribution
def test_licence_and_supported_pythons_are_the_same_everywhere(folder: Path) -> None:
    assert project(folder)["license"] == "Apache-2.0"
    assert project(folder)["requires-python"] == ">=3.11,<3.15"
    assert tables(folder)["build-system"]["build-backend"] == "hatchling.build"


@every_distribution
def test_a_sibling_is_required_by_the_range_of_its_api(folder: Path) -> None:
    for requirement in all_requirements(folder):
        name = canonicalize_name(requirement.name)
        if (name == "pluglm" and folder != ROOT) or name.startswith("pluglm-"):
            assert requirement.specifier == Requirement(f"x{SIBLING_RANGE}").specifier, str(requirement)


@every_distribution
def test_every_requirement_names_a_sibling_or_a_pinned_package(folder: Path) -> None:
    siblings = {project(other)["name"] for other in FOLDERS}
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    for requirement in all_requirements(folder):
        name = canonicalize_name(requirement.name)
        assert name in siblings or requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"


@every_plugin
def test_an_entry_point_belongs_to_a_known_kind_and_leads_into_its_own_package(folder: Path) -> None:
    from pluglm.kinds import GROUPS

    for group, entries in project(folder).get("entry-points", {}).items():
        assert group in GROUPS
        for name, target in entries.items():
            model_type = "_" if group == "pluglm.architectures" else ""  # spelled as config.json spells it
            assert re.fullmatch(rf"[a-z0-9][a-z0-9{model_type}-]*", name), name
            assert re.split("[.:]", target)[0] == folder.name.replace("-", "_")


def test_the_extra_standard_names_every_first_party_plugin_that_has_no_heavy_dependency() -> None:
    extras = project(ROOT)["optional-dependencies"]
    named = {Requirement(line).name for line in extras["standard"]}
    heavy = {Requirement(line).name for extra in extras if extra != "standard" for line in extras[extra]}
    assert named | heavy >= {
        folder.name for folder in (ROOT / "plugins").iterdir() if (folder / "pyproject.toml").exists()
    }
    assert not named & heavy


def test_constraints_are_exact_pins_from_the_index_and_torch_comes_first() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert lines[0] == "torch==2.13.0"
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line
    assert not [line for line in lines if canonicalize_name(line.split("==")[0]).startswith("pluglm")]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Distribution → its built wheel, all built in one call and without isolation, so without a network."""
    target = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(target), *map(str, FOLDERS)], check=True)
    return {wheel.name.partition("-")[0].replace("_", "-"): wheel for wheel in target.glob("*.whl")}


@every_distribution
def test_a_wheel_holds_its_package_whole_and_nothing_else(folder: Path, wheels: dict[str, Path]) -> None:
    name = project(folder)["name"]
    package = name.replace("-", "_")
    source = ROOT / "core" if folder == ROOT else folder / "src"
    with ZipFile(wheels[name]) as archive:
        held = {entry for entry in archive.namelist() if ".dist-info/" not in entry}
    skip = ("__pycache__", ".pyc")
    tree = {path.relative_to(source).as_posix() for path in (source / package).rglob("*") if path.is_file()}
    assert held == {entry for entry in tree if not any(part in entry for part in skip)}
    assert f"{package}/py.typed" in held
    assert f"{package}/__init__.py" in held


def planted(folder: Path, *, module: str, test: str = "def test_it() -> None: ...\n", requires: str = "") -> Path:
    """A small distribution `pluglm-planted` with one module and one test."""
    (folder / "src" / "pluglm_planted").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "src" / "pluglm_planted" / "__init__.py").write_text(module)
    (folder / "tests" / "test_planted.py").write_text(test)
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "pluglm-planted"\nversion = "1.0"\ndependencies = [{requires}]\n'
        '[project.optional-dependencies]\ntest = ["pytest"]\n'
        '[tool.hatch.build.targets.wheel]\npackages = ["src/pluglm_planted"]\n'
    )
    return folder


def wheel_test(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "wheel_test.py"), "--only", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_a_package_that_declares_what_it_imports_passes_alone(tmp_path: Path) -> None:
    result = wheel_test(planted(tmp_path / "p", module="import jinja2\n", requires='"jinja2"'))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pluglm-planted passed alone, from its wheel" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "test", "says"),
    (
        ("import jinja2\n", "", "pluglm_planted imports 'jinja2', which no requirement provides"),
        ("import pluglm\n", "", "pluglm_planted imports 'pluglm', which no requirement provides"),
        ("", "def test_it() -> None:\n    import jinja2\n", "its tests fail when it is installed alone"),
        ("", "\n", "its tests fail when it is installed alone"),  # nothing is collected
    ),
)
def test_an_undeclared_dependency_is_found(module: str, test: str, says: str, tmp_path: Path) -> None:
    result = wheel_test(planted(tmp_path / "p", module=module, test=test))
    assert result.returncode == 1, result.stdout + result.stderr
    assert says in result.stdout
