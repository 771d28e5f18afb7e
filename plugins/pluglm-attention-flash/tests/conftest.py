"""What the tests share: the kit for one variant, and the kernels that run on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for fake_kernels, in whatever folder the tests lie
