"""The modules beside this file can be imported by its tests."""

from __future__ import annotations

import sys
from pathlib import Path

# Test folders are no packages (importlib mode), so the module beside this file is found by its folder.
sys.path.insert(0, str(Path(__file__).parent))
