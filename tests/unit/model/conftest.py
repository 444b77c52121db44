"""Makes the helpers in ``support`` importable by the tests of this folder, from tests/numerics."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "numerics" / "support"))
