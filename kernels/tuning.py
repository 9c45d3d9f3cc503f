"""Every block size and warp count, in one place. Chosen by reading registers, spills and vector
widths of the compiled kernels (benchmarks/aot_triton.py); re-measure here before changing a kernel.
"""

from __future__ import annotations

from typing import NamedTuple


class StatsTile(NamedTuple):
    """A row is read `steps * lanes` logits at a time; each lane keeps its own running maximum, so
    that the loop over the row needs no exchange between warps."""

    steps: int
    lanes: int
    warps: int


class Tile(NamedTuple):
    """`block` elements a program."""

    block: int
    warps: int


class GroupTile(NamedTuple):
    """`groups` groups a program, `lanes` samples of each at a time."""

    groups: int
    lanes: int
    warps: int


def stats_tile(vocabulary: int, itemsize: int) -> StatsTile:
    """16-byte loads: 8 elements of 2 bytes or 4 of 4 bytes a thread and step."""
    if vocabulary <= 4096:
        return StatsTile(steps=1, lanes=1024, warps=4)
    if itemsize == 2:
        return StatsTile(steps=4, lanes=2048, warps=8)
    return StatsTile(steps=4, lanes=1024, warps=8)


def grad_tile(vocabulary: int, itemsize: int) -> Tile:
    """One tile a program, so that occupancy hides the loads of the row's scalars."""
    if vocabulary <= 4096:
        return Tile(block=1024, warps=4)
    return Tile(block=4096 if itemsize == 2 else 2048, warps=4)


#: Entries of a support at a time, and elements of its row zeroed at a time.
SUPPORT = Tile(block=512, warps=4)
SUPPORT_ZEROS = 4096

#: Tokens of a program of the objective at a time, without and with sequences (whose running sums
#: stay in registers), and rows of partial sums that its last program adds at a time.
OBJECTIVE = Tile(block=512, warps=8)
SEQUENCE_OBJECTIVE = Tile(block=256, warps=8)
OBJECTIVE_ROWS = 32
#: Registers a thread of it may use: left to choose, ptxas spills a few to fit one program more.
OBJECTIVE_REGISTERS = 255

#: A warp a group, two float64 rewards a thread: groups of thousands stay bearable, groups of 8 cost
#: only idle lanes. With four rewards a thread the batch's methods take 255 registers.
GROUPS = GroupTile(groups=4, lanes=64, warps=4)
#: Most programs of group_advantage; each takes several tiles and leaves one set of sums.
GROUP_PROGRAMS = 1024

#: Tokens of a sequence that gae scans at a time.
GAE = Tile(block=256, warps=4)
