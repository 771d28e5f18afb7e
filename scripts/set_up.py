"""Bring `.venv` up to date with constraints.txt and every pyproject.toml of the repository.

Run by each target of the Makefile, with any Python from 3.11 on and nothing installed. Two digests in `.venv` say what
was done: one of the third-party packages, one of this repository's. A step whose digest still holds is skipped, so a
second run costs a few milliseconds; a healthy environment made by hand is brought up to date, never thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "pluglm-set-up.json"
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = ("dev", "bench", "test", "testing", "train")
FIRST_PARTY = re.compile(r"pluglm(-[a-z0-9-]+)?(?![A-Za-z0-9._-])")


def projects() -> list[Path]:
    """The folder of every distribution in this repository, the core first."""
    found = [path.parent for folder in ("plugins", "contrib") for path in (ROOT / folder).glob("*/pyproject.toml")]
    return [ROOT, *sorted(found)]


def third_party() -> list[str]:
    """Requirements on packages from outside this repository, of all distributions and of the extras we develop with."""
    import tomllib  # 3.11: imported late, so that an older Python gets as far as the message in main()

    requirements: set[str] = set()
    for folder in projects():
        tables = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
        requirements.update(tables["build-system"]["requires"], tables["project"].get("dependencies", []))
        for extra, needs in tables["project"].get("optional-dependencies", {}).items():
            if extra in EXTRAS:
                requirements.update(needs)
    return sorted(need for need in requirements if not FIRST_PARTY.match(need))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def say(text: str) -> None:
    print(f"set-up: {text}", file=sys.stderr, flush=True)  # stdout belongs to the target: `make demo > file`


def run(what: str, *arguments: str) -> None:
    """Run `python -m pip install …` in the environment; on failure stop with pip's own output above."""
    say(f"{what} …")
    start = time.monotonic()
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", *arguments]
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        sys.exit(f"set-up: {what} failed; pip says why above. Once it is mended, run the same make target again.")
    say(f"{what} took {time.monotonic() - start:.0f} s")


def healthy() -> bool:
    """Whether the environment's interpreter starts, is of a version we support, and has pip."""
    question = "import pip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))"
    if not PYTHON.exists():
        return False
    return subprocess.run([str(PYTHON), "-c", question], capture_output=True, check=False).returncode == 0


def already_done() -> dict[str, str]:
    """The digests of the steps that were completed; none if there is no stamp or it cannot be read."""
    try:
        done = json.loads(STAMP.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return done if isinstance(done, dict) and PYTHON.exists() else {}


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        sys.exit(
            f"set-up: this is Python {sys.version.split()[0]}, pluglm needs 3.11 to 3.14.\n"
            "  Name another one: make PYTHON=python3.12 …"
        )
    needs = third_party()
    pins = CONSTRAINTS.read_text("utf-8")
    wanted = {
        "third_party": digest(pins, *needs),
        "packages": digest(str(ROOT), *((folder / "pyproject.toml").read_text("utf-8") for folder in projects())),
    }
    done = already_done()
    if done == wanted:
        return
    if not healthy():
        say(f"making {VENV.name} with Python {sys.version.split()[0]} …")
        venv.create(VENV, clear=True, with_pip=True)
        done = {}
    if done.get("third_party") != wanted["third_party"]:
        # torch alone and first: a resolver that chooses it along with the others may fetch gigabytes of CUDA libraries.
        torch = next(line for line in pins.splitlines() if line.startswith("torch=="))
        run(torch, torch, "-c", str(CONSTRAINTS))
        run("third-party packages", *needs, "-c", str(CONSTRAINTS))
    # One call, without isolation: hatchling is there, so nothing is fetched and no environment is made per package.
    editables = [part for folder in projects() for part in ("--editable", str(folder))]
    run(f"{len(projects())} packages of this repository", "--no-deps", "--no-build-isolation", *editables)
    STAMP.write_text(json.dumps(wanted), "utf-8")


if __name__ == "__main__":
    main()
