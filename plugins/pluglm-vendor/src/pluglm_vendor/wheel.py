"""Writes the wheel of a recipe or kernel. The same one under the same name gives the same bytes, on every machine.

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
from pluglm_vendor.bundle import Bundle

#: The oldest time a zip can state: a wheel says nothing about when it was made.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_wheel(bundle: Bundle, name: str, requirements: Sequence[Requirement], out: Path) -> Path:
    """Write the wheel into the folder `out`, whole or not at all, and return its path.

    Args:
        name: what users will type. requirements: of what was fetched; they become the wheel's own.
    Raises: SaveError.
    """
    package = bundle.distribution(name).replace("-", "_")
    content = _content(bundle, name, package, requirements)
    stored = {f"{package}/{bundle.place}/{file}" for file in bundle.binaries}  # they hardly shrink, and are large
    path = out / f"{package}-{bundle.version}-{bundle.tag}.whl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".vendor-", dir=out) as place:
            draft = Path(place) / "draft"
            with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
                for place_in, data in content.items():
                    entry = zipfile.ZipInfo(place_in, _EPOCH)
                    entry.create_system, entry.external_attr = 3, 0o644 << 16  # the same on every system
                    how = zipfile.ZIP_STORED if place_in in stored else zipfile.ZIP_DEFLATED
                    archive.writestr(entry, data, how, 9)
            os.replace(draft, path)  # noqa: PTH105 - as Path.replace; one file system, so it is whole or not there
    except OSError as error:
        raise SaveError(
            f"{path} was not written.", why=str(error), fix="Name another folder with --out.", path=str(path)
        ) from error
    return path


def _content(bundle: Bundle, name: str, package: str, requirements: Sequence[Requirement]) -> dict[str, bytes]:
    """Every file of the wheel, RECORD last."""
    licences = [paper for paper in sorted(bundle.papers) if paper.startswith("LICENSE")]
    info = f"{package}-{bundle.version}.dist-info"
    content: dict[str, bytes] = {
        f"{package}/__init__.py": bundle.init.format(summary=bundle.summary(name), source=bundle.source).encode(),
        f"{package}/pluglm.json": _manifest(bundle, name),
        f"{package}/{bundle.record_name}": _json(
            {
                "schema": 1,
                "source": bundle.source,
                "repo": bundle.repo,
                "commit": bundle.commit,
                **bundle.record(),
                "files": bundle.table,
                "digest": bundle.digest,
            }
        ),
        **{f"{package}/{bundle.place}/{path}": bundle.files[path] for path in sorted(bundle.files)},
        **{f"{package}/{paper}": bundle.papers[paper] for paper in sorted(bundle.papers) if paper not in licences},
        **{f"{info}/licenses/{paper}": bundle.papers[paper] for paper in licences},
        f"{info}/METADATA": _metadata(bundle, name, requirements, licences),
        f"{info}/WHEEL": _wheel(bundle.tag),
        f"{info}/entry_points.txt": f"[{KINDS[bundle.kind].group}]\n{name} = {package}\n".encode(),
    }
    record = "".join(f"{path},sha256={_urlsafe(data)},{len(data)}\n" for path, data in content.items())
    content[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    return content


def _manifest(bundle: Bundle, name: str) -> bytes:
    api = KINDS[bundle.kind].version
    facts = {
        "kind": bundle.kind,
        "name": name,
        "summary": bundle.summary(name),
        "api": f">={api},<{int(api.split('.')[0]) + 1}",
        **bundle.facts(),
    }
    manifest = {"schema": 1, "distribution": bundle.distribution(name), "providers": [facts]}
    parse_manifest(manifest, "the manifest of the wheel")
    return _json(manifest)


def _metadata(bundle: Bundle, name: str, requirements: Sequence[Requirement], licences: Sequence[str]) -> bytes:
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {bundle.distribution(name)}",
        f"Version: {bundle.version}",
        f"Summary: {bundle.summary(name)}",
        "Requires-Python: >=3.11",
        *(f"License-File: {licence}" for licence in licences),
        *(f"Requires-Dist: {text}" for text in dict.fromkeys((*bundle.runtime, *map(str, requirements)))),
        "",
        f"Source: {bundle.source}",
        f"Digest of its files: sha256 {bundle.digest}",
        "",
    ]
    return "\n".join(lines).encode()


def _wheel(tag: str) -> bytes:
    pure = "true" if tag.endswith("-any") else "false"
    return f"Wheel-Version: 1.0\nGenerator: pluglm-vendor\nRoot-Is-Purelib: {pure}\nTag: {tag}\n".encode()


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
