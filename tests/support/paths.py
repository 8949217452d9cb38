"""Where things lie in the repository, and what a process of its own needs to find."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DATA = ROOT / "tests" / "data"
ORACLE = ROOT / "tests" / "oracle"

SHARED = (ROOT / "tests" / "support", ROOT / "tests" / "uses")
PYTHONPATH = os.pathsep.join(map(str, (ROOT, *SHARED)))
