"""Builds wheels with hatchling in a process of its own: `python wheels.py FOLDER…` prints the path of each.

A wheel is built from a copy of a plugin's sources, outside the repository; it lands in the folder's `dist`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hatchling.build import build_wheel

from pluglm.manifest_build import build_manifest

for folder in sys.argv[1:]:
    if not (Path(folder) / "keep-manifest").exists():
        build_manifest(Path(folder))
    os.chdir(folder)
    print(Path(folder) / "dist" / build_wheel("dist"))
