"""Test each distribution of this repository alone: from its built wheel, with what it declares and nothing else.

The shared `.venv` holds every package in editable form, so it hides an undeclared dependency and a file that the wheel
forgot. Here each package gets an environment of its own whose site-packages holds exactly

1. the wheel of the package, and the wheels of the siblings that it requires, directly or not;
2. the third-party distributions that these require, taken from `.venv` at the versions pinned there: one symbolic
   link for each top-level name in a distribution's RECORD. No `.pth` file comes along, so nothing else is importable.

Step one, with the runtime requirements only: every module of the package is imported. One may fail only on a module
that an extra of the package declares. Step two, with the requirements of the extra `test` added: the package's own
tests run, from a copy outside the repository: each test function once, with its first parameters. All of them run in
`make test`, and what a wheel lacks shows in any; `--tests all` runs all here, too, and `--tests none` stops after step
one. The core's own tests need plugins; for it, step two is its command line with no plugin installed.

Links instead of installs make this a matter of seconds a package; installing torch for each would take a minute.

    python scripts/wheel_test.py                        every distribution
    python scripts/wheel_test.py plugins/pluglm-blocks  this one
    python scripts/wheel_test.py --only FOLDER          a distribution that needs no sibling, wherever it lies
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CORE = "pluglm"
#: What `make test` runs as well need not take its time twice.
MARKERS = "not gpu and not network and not slow and not long"

# Beside the copy of a package's tests: of each test function the first set of parameters.
ONE_OF_EACH = """
def pytest_collection_modifyitems(config, items):
    first = {}
    for item in items:
        first.setdefault((item.path, item.nodeid.partition("[")[0]), item)
    kept = set(map(id, first.values()))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = first.values()
"""

# Runs inside the clean environment: imports every module below argv[1], prints one line for each that is missing.
IMPORT_ALL = """
import importlib, pkgutil, sys
missing = 0
def visit(name):
    global missing
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if top not in sys.argv[2].split(","):
            print(f"    {name} imports {error.name!r}, which no requirement provides")
            missing += 1
        return
    for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
        # lib*.so is a library in C, loaded by ctypes, though Python takes its suffix for a module's.
        file = child.module_finder.find_spec(child.name).origin or ""
        library = child.name.startswith("lib") and not file.endswith(".py")
        if child.name != "__main__" and not library:
            visit(name + "." + child.name)
visit(sys.argv[1])
sys.exit(bool(missing))
"""


class WheelTestError(Exception):
    """A package cannot be tested, or fails: the text says which and why."""


@dataclass(frozen=True)
class Package:
    """One distribution of this repository.

    Attributes:
        folder: where its pyproject.toml lies.
        name: of the distribution, canonical.
        wheel: its built wheel.
    """

    folder: Path
    name: NormalizedName
    wheel: Path

    @property
    def import_name(self) -> str:
        return self.name.replace("-", "_")

    def requirements(self) -> list[Requirement]:
        """What the wheel's own metadata declares, extras included."""
        with ZipFile(self.wheel) as archive:
            name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
            message = HeaderParser().parsestr(archive.read(name).decode())
        return [Requirement(line) for line in message.get_all("Requires-Dist", [])]


@dataclass
class Closure:
    """Everything that some requirements pull in.

    Attributes:
        siblings: distributions of this repository.
        third_party: distributions from outside it.
    """

    siblings: set[NormalizedName] = field(default_factory=set)
    third_party: set[NormalizedName] = field(default_factory=set)


def close(requirements: Iterable[Requirement], packages: dict[NormalizedName, Package]) -> Closure:
    """Follow requirements through their markers and extras, siblings by their wheels, others by what is installed.

    Raises: WheelTestError if a requirement is not installed here, or not in the range that is asked for.
    """
    closure = Closure()
    seen: set[tuple[NormalizedName, str]] = set()
    queue = list(requirements)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        version, declared = available(requirement, packages)
        if not requirement.specifier.contains(version, prereleases=True):
            raise WheelTestError(f"{requirement} is required, but {name} {version} is here.")
        (closure.siblings if name in packages else closure.third_party).add(name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += select(declared, extra)
    return closure


def select(requirements: Iterable[Requirement], extra: str) -> list[Requirement]:
    """Those that hold on this machine with one extra asked for ("": none)."""
    return [need for need in requirements if need.marker is None or need.marker.evaluate({"extra": extra})]


def available(requirement: Requirement, packages: dict[NormalizedName, Package]) -> tuple[str, list[Requirement]]:
    """The version at hand of a requirement's distribution, and what that one requires."""
    name = canonicalize_name(requirement.name)
    if name in packages:
        return packages[name].wheel.name.split("-")[1], packages[name].requirements()
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise WheelTestError(
            f"{requirement} is required but not installed in this environment.\n"
            "  If it was added to a pyproject.toml just now, run `make setup`; if nobody needs it, remove it there."
        ) from error
    return found.version, [Requirement(line) for line in found.requires or []]


def top_level(distribution: metadata.Distribution) -> Iterator[tuple[str, list[Path]]]:
    """Each top-level name that a distribution owns in site-packages, with its files there."""
    entries: dict[str, list[Path]] = {}
    for file in distribution.files or ():
        if file.parts[0] not in ("..", "__pycache__") and file.suffix != ".pth":
            entries.setdefault(file.parts[0], []).append(Path(file))
    yield from entries.items()


def link(names: Iterable[NormalizedName], target: Path) -> None:
    """Make distributions importable from `target`, a site-packages folder, by symbolic links into this environment."""
    shared: dict[str, int] = {}
    for installed in metadata.distributions():
        for entry, _ in top_level(installed):
            shared[entry] = shared.get(entry, 0) + 1
    for name in sorted(names):
        distribution = metadata.distribution(name)
        for entry, files in top_level(distribution):
            # A folder that several distributions fill (a namespace package) is taken apart: only this one's files.
            for item in files if shared[entry] > 1 else [Path(entry)]:
                place = target / item
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    place.symlink_to(Path(str(distribution.locate_file(""))) / item)


def build(folders: Iterable[Path], target: Path) -> dict[NormalizedName, Package]:
    """Build the wheel of each folder, without isolation: hatchling is in `.venv`."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    folders = list(folders)
    subprocess.run([*command, "--wheel-dir", str(target), *map(str, folders)], check=True)
    packages = {}
    for folder in folders:
        project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
        name = canonicalize_name(project["name"])
        (wheel,) = target.glob(f"{name.replace('-', '_')}-{project['version']}-*.whl")
        packages[name] = Package(folder, name, wheel)
    return packages


class CleanEnvironment:
    """A virtual environment that holds what it was given and nothing else, without pip."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        (self.site_packages,) = folder.glob("lib/python3*/site-packages")

    def add(self, closure: Closure, packages: dict[NormalizedName, Package]) -> None:
        """Link the third parties and install the siblings' wheels, those that are here already again."""
        link(closure.third_party, self.site_packages)
        wheels = [str(packages[name].wheel) for name in sorted(closure.siblings)]
        install = ["install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", "--no-warn-script-location"]
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *install, *wheels]
        subprocess.run(command, check=True)

    def run(self, *arguments: str) -> str | None:
        """Run its Python from its own folder, with no configuration of the user's. What it printed, if it failed."""
        kept = ("PATH", "LANG", "TMPDIR", "OMP_NUM_THREADS")
        keep = {name: value for name, value in os.environ.items() if name in kept}
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        environment = keep | {"HOME": str(home), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [str(self.python), "-I", "-B", *arguments], cwd=home, env=environment, timeout=1200, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return done.stdout if done.returncode else None


def importable(requirements: Iterable[Requirement]) -> set[str]:
    """Top-level modules that requirements provide, by what is installed here; a missing one provides its own name."""
    provided = metadata.packages_distributions()
    names = {canonicalize_name(need.name) for need in requirements}
    found = {module for module, owners in provided.items() if names & {canonicalize_name(owner) for owner in owners}}
    return found | {name.replace("-", "_") for name in names}


def check(package: Package, packages: dict[NormalizedName, Package], work: Path, tests: str) -> None:
    """Steps one and two for one package. Raises: WheelTestError if one fails.

    Args:
        tests: "none": step one alone. "one": each test function once. "all": with all parameters.
    """
    environment = CleanEnvironment(work / package.name)
    runtime = close([Requirement(package.name)], packages)
    environment.add(runtime, packages)
    optional = [need for need in package.requirements() if need.marker and "extra" in str(need.marker)]
    said = environment.run("-c", IMPORT_ALL, package.import_name, ",".join(importable(optional)))
    if said is not None:
        why = "a module cannot be imported with the declared requirements; declare what it imports."
        raise WheelTestError(f"{why}\n{said}")
    if package.name == CORE:
        if (said := environment.run("-m", "pluglm.cli", "plugins", "list")) is not None:
            raise WheelTestError(f"`pluglm plugins list` fails with no plugin installed.\n{said}")
        return
    own = package.folder / "tests"
    if not any(own.glob("**/test_*.py")):
        raise WheelTestError("there are no tests in its folder `tests`.")
    if tests == "none":
        return
    environment.add(close([Requirement(f"{package.name}[test]")], packages), packages)
    copy = work / f"{package.name}-tests" / "tests"
    shutil.copytree(own, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if tests == "one":
        (copy.parent / "conftest.py").write_text(ONE_OF_EACH, encoding="utf-8")
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(copy.parent), "-p", "no:cacheprovider"]
    if said := environment.run("-m", "pytest", "--quiet", *settings, "-m", MARKERS, str(copy)):
        raise WheelTestError(f"its tests fail when it is installed alone.\n{said}")


def distributions() -> list[Path]:
    found = [path.parent for folder in ("plugins", "contrib") for path in (ROOT / folder).glob("*/pyproject.toml")]
    return [ROOT, *sorted(found)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="*", type=Path, help="distributions to test (default: all)")
    parser.add_argument("--only", action="store_true", help="build no other wheel: the siblings are not needed")
    parser.add_argument("--tests", choices=("none", "one", "all"), default="one",
                        help="of each package: none, each function once, or with all parameters")  # fmt: skip
    options = parser.parse_args()
    wanted = [path.resolve() for path in options.folder]
    folders = wanted if options.only else [*distributions(), *(path for path in wanted if path not in distributions())]
    with tempfile.TemporaryDirectory(prefix="pluglm-wheels-") as temporary:
        work = Path(temporary)
        packages = build(folders, work / "wheels")
        chosen = [package for package in packages.values() if not wanted or package.folder in wanted]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            passed = list(pool.map(lambda package: report(package, packages, work, options.tests), chosen))
    if failures := passed.count(False):
        print(f"{failures} of the packages failed.")
    return bool(failures)


def report(package: Package, packages: dict[NormalizedName, Package], work: Path, tests: str) -> bool:
    """Check one package and say how it went."""
    start = time.monotonic()
    try:
        check(package, packages, work, tests)
    except (WheelTestError, subprocess.SubprocessError) as error:
        print(f"{package.name} FAILED: {error}", flush=True)
        return False
    print(f"{package.name} passed alone, from its wheel, in {time.monotonic() - start:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
