"""What a miniature hands back: arms, claims about them, charts and tables. Data only; the verdicts
are worked out from the values of the seeds whenever they are read.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, Literal, get_args

from pyrl.repro.statistics import Estimate, paired, t_interval

Direction = Literal["above", "below", "reported"]


class Verdict(enum.Enum):
    """What the interval of a difference says of a claimed direction."""

    AGREES = "agrees"
    DISAGREES = "disagrees"
    UNDECIDED = "undecided"
    REPORTED = "no verdict"


def judge(difference: Estimate, direction: Direction) -> Verdict:
    """Agrees where the interval excludes 0 in the claimed direction, disagrees where it does in the
    other, else undecided; a difference that is only reported has no verdict."""
    if direction == "reported":
        return Verdict.REPORTED
    low, high = difference.low, difference.high
    if direction == "below":
        low, high = -high, -low
    return Verdict.AGREES if low > 0 else Verdict.DISAGREES if high < 0 else Verdict.UNDECIDED


@dataclasses.dataclass(frozen=True)
class Arm:
    """One figure of one arm, a value a seed; arms of a quantity share their seeds, in order."""

    quantity: str
    name: str
    values: list[float]

    @property
    def estimate(self) -> Estimate:
        """Mean and 95% t interval over the seeds."""
        return t_interval(self.values)


@dataclasses.dataclass(frozen=True)
class Claim:
    """`left` is above or below `right` in a quantity; `right` may be a number."""

    quantity: str
    left: str
    direction: Direction
    right: str | float
    note: str = ""

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(
                f"direction={self.direction!r}: expected one of {list(get_args(Direction))}"
            )

    @property
    def text(self) -> str:
        """The claim in words, without its quantity."""
        if self.direction == "reported" and self.right == 0:
            return self.left
        right = self.right if isinstance(self.right, str) else f"{self.right:g}"
        sign = {"above": ">", "below": "<", "reported": "−"}[self.direction]
        return f"{self.left} {sign} {right}"


@dataclasses.dataclass(frozen=True)
class Line:
    """y over x: a row a seed, drawn as mean and interval; a reference is one row, dashed."""

    name: str
    x: list[float]
    y: list[list[float]]
    reference: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over a common axis, or, without lines, the arms of `quantity` as points."""

    title: str
    y_label: str
    x_label: str = ""
    lines: list[Line] = dataclasses.field(default_factory=list)
    quantity: str = ""
    mark: float | None = None
    """A value of the quantity to compare with: a thin line."""
    scale: Literal["linear", "zero", "logit"] = "linear"
    """Of the y axis; zero: linear, from 0."""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as they are printed."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclasses.dataclass
class Result:
    """One miniature, run. Everything but `name`, `title`, `paper` and `published` may be empty:
    a comparison of another kind is tables, charts, text and images of its own."""

    name: str
    title: str
    paper: str
    published: str
    """The claim as the paper has it, with its figures."""
    regime: str = ""
    """What was run, so that it can be run again."""
    figure: str = ""
    """How the judged quantity is worked out."""
    caveats: list[str] = dataclasses.field(default_factory=list)
    arms: list[Arm] = dataclasses.field(default_factory=list)
    claims: list[Claim] = dataclasses.field(default_factory=list)
    charts: list[Chart] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    images: list[str] = dataclasses.field(default_factory=list)
    """Images made elsewhere, as paths from the document's folder."""
    text: str = ""
    """Markdown that stands after the tables."""
    conditions: dict[str, Any] = dataclasses.field(default_factory=dict)
    """seconds, seeds, quick, commit, versions, cpu: filled by the runner."""

    def arm(self, quantity: str, name: str) -> Arm:
        """ValueError names what there is."""
        for arm in self.arms:
            if (arm.quantity, arm.name) == (quantity, name):
                return arm
        known = [f"{arm.quantity}: {arm.name}" for arm in self.arms]
        raise ValueError(f"no arm {name!r} of {quantity!r}; there are {known}")

    def difference(self, claim: Claim) -> Estimate:
        """left - right seed by seed, its mean and 95% t interval."""
        left = self.arm(claim.quantity, claim.left).values
        if isinstance(claim.right, str):
            right = self.arm(claim.quantity, claim.right).values
        else:
            right = [float(claim.right)] * len(left)
        if len(left) != len(right):
            raise ValueError(f"{claim.text}: {len(left)} seeds against {len(right)}")
        return paired(left, right)

    def verdict(self, claim: Claim) -> Verdict:
        """`judge` of the claim's difference."""
        return judge(self.difference(claim), claim.direction)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        """ValueError on an unknown key: a file of another version, or a typing error."""
        values = dict(values)
        kinds: dict[str, Any] = {"arms": Arm, "claims": Claim, "charts": Chart, "tables": Table}
        for key, kind in kinds.items():
            values[key] = [_made(kind, dict(item), key) for item in values.get(key, [])]
        return _made(cls, values, "result")


def _made(kind: Any, values: dict[str, Any], where: str) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; expected some of {sorted(known)}")
    if kind is Chart:
        values["lines"] = [_made(Line, dict(line), "lines") for line in values.get("lines", [])]
    return kind(**values)


def rounded(values: Any, digits: int = 5) -> list[float]:
    """Numbers for a result: `digits` significant ones, as nothing rests on more."""
    return [float(f"{float(v):.{digits}g}") if math.isfinite(v) else float(v) for v in values]
