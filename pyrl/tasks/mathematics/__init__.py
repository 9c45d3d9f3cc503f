"""Mathematics with final answers: data sets, or drawn problems where there are none."""

from pyrl.tasks.mathematics.task import Mathematics

__all__ = ["Mathematics"]
