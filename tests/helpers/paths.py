"""Directories of this repository."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PYTHONPATH = os.pathsep.join(
    (str(ROOT / "tests"), str(ROOT))
)  # of a subprocess that imports dwt_jax or helpers
