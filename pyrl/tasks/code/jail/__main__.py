"""`python jail MODE` runs one request of `pyrl.tasks.code.sandbox` (see `supervisor`), `python jail
serve` as many as come (see `launcher`)."""

import importlib
import os
import sys

# The folder above this one, for as long as it takes to find this one as a package: not pyrl's.
sys.path[0] = os.path.dirname(os.path.abspath(sys.path[0]))
launcher = importlib.import_module("jail.launcher")
sys.path.pop(0)
program = launcher.serve() if sys.argv[1] == "serve" else launcher.supervisor.main(sys.argv[1])
while program is not None:  # a supervisor, then a program: it finds no frame of ours below its own
    program = program()
