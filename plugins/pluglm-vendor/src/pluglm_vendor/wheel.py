"""Writes the wheel of a recipe. The same recipe under the same name gives the same bytes, on every machine.

The format is the packaging specification's (wheel 1.0, metadata 2.4, PEP 639 for licences), written with zipfile: there
is nothing to compile, and a build backend would want a network or a network's cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from pluglm.errors import SaveError
from pluglm.kinds import KINDS
from pluglm.manifest import parse_manifest
from pluglm.static_filter import ANY
from pluglm.vendored import RECORD
from pluglm_vendor.recipe import Recipe

#: The oldest time a zip can state: a wheel says nothing about when it was made.
_EPOCH = (1980, 1, 1, 0, 0, 0)
#: What runs recipes. The ranges are those of this release's siblings.
RUNTIME = ("pluglm>=0.1,<0.2", "pluglm-hf>=0.1,<0.2")
INIT = '''\
"""{summary}

Made by `pluglm vendor` from {source}. The recipe lies in `recipe`, its digests in `recipe.json`.
"""

from pluglm import hookimpl


@hookimpl
def pluglm_build_decoding(request):
    """Check the recipe against its digests and make it a strategy."""
    from pluglm_hf.recipes import vendored_strategy

    return vendored_strategy(__name__, request)
'''


def distribution(name: str) -> str:
    """Of a recipe that is called `name`."""
    return f"pluglm-recipe-{name}"


def write_wheel(recipe: Recipe, name: str, requirements: Sequence[Requirement], out: Path) -> Path:
    """Write the wheel into the folder `out`, whole or not at all, and return its path.

    Args:
        name: what users will type. requirements: of the recipe; they become the wheel's own.
    Raises: SaveError.
    """
    package = distribution(name).replace("-", "_")
    content = _content(recipe, name, package, requirements)
    path = out / f"{package}-{recipe.version}-py3-none-any.whl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".vendor-", dir=out) as place:
            draft = Path(place) / "draft"
            with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
                for place_in, data in content.items():
                    entry = zipfile.ZipInfo(place_in, _EPOCH)
                    entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same on every system
                    archive.writestr(entry, data, zipfile.ZIP_DEFLATED, 9)
            os.replace(draft, path)  # noqa: PTH105 - as Path.replace; one file system, so it is whole or not there
    except OSError as error:
        raise SaveError(
            f"{path} was not written.", why=str(error), fix="Name another folder with --out.", path=str(path)
        ) from error
    return path


def _content(recipe: Recipe, name: str, package: str, requirements: Sequence[Requirement]) -> dict[str, bytes]:
    """Every file of the wheel, RECORD last."""
    licences = [paper for paper in sorted(recipe.papers) if paper.startswith("LICENSE")]
    info = f"{package}-{recipe.version}.dist-info"
    content: dict[str, bytes] = {
        f"{package}/__init__.py": INIT.format(summary=_summary(recipe, name), source=recipe.source).encode(),
        f"{package}/pluglm.json": _manifest(recipe, name),
        f"{package}/{RECORD}": _json(
            {
                "schema": 1,
                "source": recipe.source,
                "repo": recipe.repo,
                "commit": recipe.commit,
                "files": recipe.table,
                "digest": recipe.digest,
            }
        ),
        **{f"{package}/recipe/{path}": recipe.files[path] for path in sorted(recipe.files)},
        **{f"{package}/{paper}": recipe.papers[paper] for paper in sorted(recipe.papers) if paper not in licences},
        **{f"{info}/licenses/{paper}": recipe.papers[paper] for paper in licences},
        f"{info}/METADATA": _metadata(recipe, name, requirements, licences),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: pluglm-vendor\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[{KINDS['decoding'].group}]\n{name} = {package}\n".encode(),
    }
    record = "".join(f"{path},sha256={_urlsafe(data)},{len(data)}\n" for path, data in content.items())
    content[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    return content


def _summary(recipe: Recipe, name: str) -> str:
    return f"The decoding method {name}, vendored from {recipe.repo}."


def _manifest(recipe: Recipe, name: str) -> bytes:
    facts = {
        "kind": "decoding",
        "name": name,
        "summary": _summary(recipe, name),
        "api": f">={KINDS['decoding'].version},<{int(KINDS['decoding'].version.split('.')[0]) + 1}",
        "features": [ANY],  # a recipe's arguments are its own; what it does not take is refused when it is called
    }
    manifest = {"schema": 1, "distribution": distribution(name), "providers": [facts]}
    parse_manifest(manifest, "the manifest of the wheel")
    return _json(manifest)


def _metadata(recipe: Recipe, name: str, requirements: Sequence[Requirement], licences: Sequence[str]) -> bytes:
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {distribution(name)}",
        f"Version: {recipe.version}",
        f"Summary: {_summary(recipe, name)}",
        "Requires-Python: >=3.11",
        *(f"License-File: {licence}" for licence in licences),
        *(f"Requires-Dist: {text}" for text in dict.fromkeys((*RUNTIME, *map(str, requirements)))),
        "",
        f"Source: {recipe.source}",
        f"Digest of its files: sha256 {recipe.digest}",
        "",
    ]
    return "\n".join(lines).encode()


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
