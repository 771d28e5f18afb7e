"""The page that shows how to write an attention backend is true: its package passes the conformance kit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pluglm.manifest_build import build_manifest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "write-an-attention-backend.md"
FILES = {
    "toml": ["pyproject.toml"],
    "python": ["src/acme_attention_mini/__init__.py", "src/acme_attention_mini/mini.py", "tests/test_contract.py"],
}


@pytest.mark.slow
def test_the_backend_of_the_page_passes_the_kit(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for language, names in FILES.items():
        found = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
        assert len(found) == len(names)
        for name, text in zip(names, found, strict=True):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    build_manifest(tmp_path)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "src")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d\d passed", result.stdout)
