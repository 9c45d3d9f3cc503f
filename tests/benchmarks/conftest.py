"""The benchmarks import each other by bare name; they are run as scripts, not as a package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
