"""Runs one request of `pyrl.tasks.code.sandbox`; see `supervisor`."""

import gc
import os
import sys

_HERE = sys.path[0]  # this folder, as it was run
sys.path[0] = os.path.dirname(os.path.abspath(_HERE))
__package__ = "jail"  # PEP 366: the relative import below finds the folder, not pyrl

from . import supervisor  # noqa: E402

sys.path.pop(0)
gc.freeze()  # forks share the pages of what exists by now
program = supervisor.main(sys.argv[1])
program()  # here ends every frame of ours: a program finds none below its own
