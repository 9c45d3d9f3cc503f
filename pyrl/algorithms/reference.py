"""When the reference policy is reset to the policy: `ResetRule`, and the figure that it watches."""

from __future__ import annotations

import math
import statistics
from typing import Any

#: Steps since the last reset before a KL can be a spike: the median of fewer says little.
KL_STEPS = 5


class ResetRule:
    """A pure state machine: at each step, whether the reference is to be reset, and why.

    every       this many steps have passed since the last reset
    drop_tol    validation < best - drop_tol
    patience    this many evaluations in a row without validation > best + min_delta; `best` is the
                last value that improved so, or the first
    kl_spike    the step's KL > kl_spike * the median of the steps' before it since the last reset,
                of which there are at least 5, and which is not 0

    tried in this order; 0 and None turn a condition off. After a reset `best` is the newest
    validation, and the counts and the median start anew. KL to a fresh reference starts at 0 and
    grows: as t^2, it is 4 times its median, so a kl_spike below that resets a healthy run. A figure
    that is None or not finite is not looked at. Source: ProRL, arXiv 2507.12507 (no thresholds are
    published).
    """

    def __init__(
        self,
        patience: int = 0,
        min_delta: float = 0.0,
        drop_tol: float | None = None,
        every: int = 0,
        kl_spike: float | None = None,
    ) -> None:
        for name, count in (("patience", patience), ("every", every)):
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise ValueError(f"{name} = {count!r}: expected a whole number >= 0")
        for name, value in (("min_delta", min_delta), ("drop_tol", drop_tol)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} = {value!r}: expected a finite number >= 0")
        if kl_spike is not None and not 1 < kl_spike < math.inf:
            raise ValueError(f"kl_spike = {kl_spike!r}: expected a finite number > 1")
        self.patience, self.min_delta, self.drop_tol = patience, min_delta, drop_tol
        self.every, self.kl_spike = every, kl_spike
        self.best: float | None = None
        self.newest: float | None = None
        self.stalled = 0
        self.last_reset = 0
        self.kls: list[float] = []

    def observe(self, step: int, *, validation: float | None, kl: float | None) -> str | None:
        """The reason for a reset after `step` (1, 2, ...), which has then been counted, or None.

        validation: that of an evaluation after this step; None: there was none.
        """
        validation, kl = _finite(validation), _finite(kl)
        if validation is not None:
            self.newest = validation
        reason = self._reason(step, validation, kl)
        if reason is not None:
            self.restart(step)
        elif kl is not None and self.kl_spike is not None:
            self.kls.append(kl)
        return reason

    def restart(self, step: int) -> None:
        """There was a reset after `step`: all is counted from there."""
        self.best, self.stalled = self.newest, 0
        self.last_reset, self.kls = step, []

    def _reason(self, step: int, validation: float | None, kl: float | None) -> str | None:
        best = self.best
        if validation is not None:
            if best is None or validation > best + self.min_delta:
                self.best, self.stalled = validation, 0
            else:
                self.stalled += 1
        if self.every and step - self.last_reset >= self.every:
            return f"every {self.every} steps"
        if validation is not None and best is not None:
            fall = best - validation
            if self.drop_tol is not None and fall > self.drop_tol:
                return f"validation fell by {fall:.4g} from {best:.4g}"
            if self.patience and self.stalled >= self.patience:
                return (
                    f"validation {validation:.4g} has not improved on {best:.4g} by "
                    f"{self.min_delta:g} in {self.stalled} evaluations"
                )
        if kl is not None and self.kl_spike is not None and len(self.kls) >= KL_STEPS:
            median = statistics.median(self.kls)
            if median > 0 and kl > self.kl_spike * median:
                return f"KL {kl:.4g} above {self.kl_spike:g} times {median:.4g}, the steps' median"
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; plain JSON."""
        return {
            "best": self.best,
            "newest": self.newest,
            "stalled": self.stalled,
            "last_reset": self.last_reset,
            "kls": list(self.kls),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.best, self.newest = state["best"], state["newest"]
        self.stalled, self.last_reset = state["stalled"], state["last_reset"]
        self.kls = list(state["kls"])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
