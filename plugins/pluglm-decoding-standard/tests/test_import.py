"""Importing the package costs nothing."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, pluglm_decoding_standard as p; p.greedy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
