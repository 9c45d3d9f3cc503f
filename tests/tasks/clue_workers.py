"""Stand-ins for `write._make` in its processes, which import this file by its name."""

import os
import time

from pyrl.tasks.temporal_clue.write import _Made


def mixed(seed, level):
    """Seed 1 fails, 2 repeats 0, 4 is late, the process of 5 ends."""
    if seed == 4:
        time.sleep(60)
    if seed == 5:
        os._exit(3)
    if seed == 1:
        return _Made(None)
    return _Made(b"%d\n" % seed, str(0 if seed == 2 else seed), 0.5)


def repeated(seed, level):
    return _Made(b"\n", "the same")


def ends(seed, level):
    os._exit(3)
