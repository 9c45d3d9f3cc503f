"""`pytest benchmarks`: these files import each other by bare name, as the runner does."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# `python -m pytest` puts the checkout on the path, where a peer that looks for the package
# `kernels` would find the folder of that name. The installed package does not need it there.
sys.path[:] = [str(HERE), *(p for p in sys.path if Path(p).resolve() != HERE.parent)]
