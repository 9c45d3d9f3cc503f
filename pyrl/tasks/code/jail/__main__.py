"""Runs one request of `pyrl.tasks.code.sandbox`; see `supervisor`."""

import gc
import importlib
import os
import sys

# The folder above this one, for as long as it takes to find this one as a package: not pyrl's.
sys.path[0] = os.path.dirname(os.path.abspath(sys.path[0]))
supervisor = importlib.import_module("jail.supervisor")
sys.path.pop(0)
gc.freeze()  # forks share the pages of what exists by now
program = supervisor.main(sys.argv[1])
program()  # here ends every frame of ours: a program finds none below its own
