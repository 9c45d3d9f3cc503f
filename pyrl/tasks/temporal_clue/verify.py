"""A second opinion on a puzzle: is its solution the only one, and is every clue needed?

Nothing here is shared with the generator. Its model is one-hot; this one has an integer room per
piece and time, tables for moves, element constraints for the murder, and its own geometry of the
plan, its own account of the rules and of every kind of clue.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyrl.tasks.temporal_clue.generate import Puzzle
    from pyrl.tasks.temporal_clue.world import World


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    true: bool
    """The puzzle's night keeps every rule, and its clues and the answers are true of it."""
    unique: bool
    """No other night, with another room of any piece at any time, another motive of any suspect,
    murderer, weapon, room or time, keeps the rules and makes the clues true."""
    needed: tuple[bool, ...]
    """Per clue: without it there is another such night."""

    @property
    def irredundant(self) -> bool:
        """Every clue is needed."""
        return all(self.needed)


class Undecided(RuntimeError):
    """The solver ran out of time."""


def verify(puzzle: Puzzle, *, seconds: float = 60.0) -> Verdict:
    """The verdict on a puzzle. Undecided when one of its questions takes longer than `seconds`;
    ValueError for a clue of an unknown kind."""
    night = Night(puzzle.world)
    clues = [night.truth(clue) for clue in puzzle.clues]
    answers = [night.truth(question.fact) for question in puzzle.questions]
    same = night.is_the_solution()
    needed = []
    for i, clue in enumerate(clues):
        # Any night that the others allow and this clue does not: the clue is what excludes it.
        needed.append(night.possible([*clues[:i], ~clue, *clues[i + 1 :]], seconds))
    return Verdict(
        true=night.possible([same, *clues, *answers], seconds),
        unique=not night.possible([~same, *clues], seconds),
        needed=tuple(needed),
    )


class Night:
    """What may have happened: integer variables under the rules, and literals that say whether a
    fact holds."""

    def __init__(self, world: World) -> None:
        try:
            from ortools.sat.python import cp_model
        except ModuleNotFoundError as error:
            raise ValueError(f'{error}; pip install "pyrl[tasks]"') from error
        self._cp = cp_model
        self._model = model = cp_model.CpModel()
        self._world = world
        self._literals: dict[Any, Any] = {}
        self._suspects, self._times = len(world.suspects), len(world.times)
        weapons, self._rooms = len(world.weapons), len(world.rooms)
        pieces = self._suspects + weapons + 1

        def choice(count: int) -> Any:
            return model.new_int_var(0, count - 1, "")

        #: where[piece][time], who[…]: the variables of one solution.
        self.where = [[choice(self._rooms) for _ in world.times] for _ in range(pieces)]
        self.motive = [choice(len(world.motives)) for _ in world.suspect_motives]
        self.murderer, self.weapon = choice(self._suspects), choice(weapons)
        self.room, self.time = choice(self._rooms), choice(self._times)
        self.murderer_path = [self._murderers(t) for t in range(self._times)]
        self.weapon_path = [
            self._element(self.weapon, [self._arm(w)[t] for w in range(weapons)])
            for t in range(self._times)
        ]
        self._moves()
        self._murder()
        for motive in range(len(world.motives)):
            having = [self._equals(own, motive) for own in self.motive]
            model.add(sum(having) == world.suspect_motives.count(motive))

    def possible(self, literals: Sequence[Any], seconds: float) -> bool:
        """Whether a night under the rules makes all literals true."""
        model = self._model.clone()
        model.add_bool_and(literals)
        solver = self._cp.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.max_time_in_seconds = seconds
        status = solver.solve(model)
        if status in (self._cp.OPTIMAL, self._cp.FEASIBLE):
            return True
        if status != self._cp.INFEASIBLE:
            raise Undecided(f"undecided after {seconds:g} s: {solver.status_name(status)}")
        return False

    def is_the_solution(self) -> Any:
        """The literal: every variable has the value that it has in the world."""
        w = self._world
        pairs = [
            *zip(itertools.chain(*self.where), itertools.chain(*w.paths), strict=True),
            *zip(self.motive, w.suspect_motives, strict=True),
            (self.murderer, w.murderer), (self.weapon, w.weapon),
            (self.room, w.room), (self.time, w.time),
        ]  # fmt: skip
        return self._all([self._equals(variable, value) for variable, value in pairs])

    def truth(self, fact: Any) -> Any:
        """The literal that is true exactly where the fact is."""
        kind, rest = fact[0], fact[1:]
        if kind == "xor":
            return ~self._same_truth(self.truth(rest[0]), self.truth(rest[1]))
        if kind == "iff":
            return self._same_truth(self.truth(rest[0]), self.truth(rest[1]))
        simple = {
            "murderer": self.murderer, "murder_weapon": self.weapon,
            "murder_room": self.room, "murder_time": self.time,
        }  # fmt: skip
        if kind in simple:
            return self._equals(simple[kind], rest[0])
        if kind == "motive":
            return self._equals(self.motive[rest[0]], rest[1])
        if kind == "murder_motive":
            return self._any(
                [
                    self._all([self._equals(self.murderer, s), self._equals(own, rest[0])])
                    for s, own in enumerate(self.motive)
                ]
            )
        directions = ("north_of", "south_of", "west_of", "east_of")
        if kind in directions:
            return self._beside(kind, rest[0], rest[1], rest[2])
        return self._any(
            [self._all([*given, self._of_path(kind, path, left)]) for given, path, left in
             self._subjects(kind, rest)]
        )  # fmt: skip

    def _subjects(self, kind: str, rest: tuple[Any, ...]) -> list[tuple[list[Any], Any, Any]]:
        """(literals under which, the path that is spoken of, the other arguments), each way."""
        if kind.startswith("motive_"):
            return [
                ([self._equals(own, rest[0])], self.where[s], rest[1:])
                for s, own in enumerate(self.motive)
            ]
        if kind.startswith("murderer_"):
            return [([], self.murderer_path, rest)]
        if kind.startswith("murder_weapon_"):
            return [([], self.weapon_path, rest)]
        return [([], self.where[rest[0]], rest[1:])]

    def _of_path(self, kind: str, path: list[Any], rest: tuple[Any, ...]) -> Any:
        """What a kind, whoever it is about, says of a path."""
        if kind.endswith("moved"):
            return self._goes(path, *rest)
        if kind == "carried_murder_weapon":
            return self._all([self._goes(path, *rest), self._goes(self.weapon_path, *rest)])
        if kind.endswith("carried"):
            arm = self._arm(rest[0])
            return self._all([self._goes(path, *rest[1:]), self._goes(arm, *rest[1:])])
        if kind.endswith("together"):
            other, room = self.where[rest[0]], rest[1]
            return self._any(
                [
                    self._all([self._equals(a, room), self._equals(b, room)])
                    for a, b in zip(path, other, strict=True)
                ]
            )
        if kind == "same_room" or kind.endswith("_with"):
            return self._same(path[rest[1]], self.where[rest[0]][rest[1]])
        if kind == "at" or kind.endswith("_at"):
            return self._equals(path[rest[0]], rest[1])
        raise ValueError(f"clue of unknown kind {kind!r}")

    def _goes(self, path: list[Any], time: int, a: int, b: int) -> Any:
        if time == 0:
            return self._any([])
        return self._all([self._equals(path[time - 1], a), self._equals(path[time], b)])

    def _arm(self, weapon: int) -> list[Any]:
        return self.where[self._suspects + weapon]

    def _murderers(self, time: int) -> Any:
        return self._element(self.murderer, [self.where[s][time] for s in range(self._suspects)])

    def _moves(self) -> None:
        columns = self._world.columns
        steps = [
            (a, b)
            for a, b in itertools.product(range(self._rooms), repeat=2)
            if a == b or abs(a - b) == columns or (abs(a - b) == 1 and a // columns == b // columns)
        ]
        for path in self.where:
            for before, after in itertools.pairwise(path):
                self._model.add_allowed_assignments([before, after], steps)
        carriers = self.where[: self._suspects]
        for weapon in range(len(self._world.weapons)):
            arm = self._arm(weapon)
            for t in range(1, self._times):
                with_someone = [
                    self._all([self._same(s[t - 1], arm[t - 1]), self._same(s[t], arm[t])])
                    for s in carriers
                ]
                self._model.add_bool_or([self._same(arm[t - 1], arm[t]), *with_someone])

    def _murder(self) -> None:
        places = [self._element(self.time, path) for path in self.where]
        suspects, arms = places[: self._suspects], places[self._suspects : -1]
        self._model.add(sum(self._same(place, self.room) for place in suspects) == 1)
        self._model.add_element(self.murderer, suspects, self.room)
        self._model.add_element(self.weapon, arms, self.room)
        for t, place in enumerate(self.where[-1]):
            earlier = self._model.new_bool_var("")
            self._model.add(self.time > t).only_enforce_if(earlier)
            self._model.add(self.time <= t).only_enforce_if(~earlier)
            self._model.add(place == self.room).only_enforce_if(~earlier)

    def _beside(self, kind: str, p: int, q: int, time: int) -> Any:
        """Row by row: a room north is `columns` less, a room east one more unless the row ends."""
        columns = self._world.columns
        step = {"north_of": -columns, "south_of": columns, "west_of": -1, "east_of": 1}[kind]
        first, second = self.where[p][time], self.where[q][time]
        there = self._reified(("step", step, first.index, second.index), first, second + step)
        if kind in ("north_of", "south_of"):
            return there
        edge = 0 if step < 0 else columns - 1
        at_edge = [self._equals(second, r) for r in range(self._rooms) if r % columns == edge]
        return self._all([there, *(~each for each in at_edge)])

    def _element(self, index: Any, variables: list[Any]) -> Any:
        target = self._model.new_int_var(0, self._rooms - 1, "")
        self._model.add_element(index, variables, target)
        return target

    def _equals(self, variable: Any, value: int) -> Any:
        return self._reified(("equals", variable.index, value), variable, value)

    def _same(self, a: Any, b: Any) -> Any:
        if a.index == b.index:
            return self._all([])
        return self._reified(("same", *sorted((a.index, b.index))), a, b)

    def _same_truth(self, a: Any, b: Any) -> Any:
        return self._reified(("iff", *sorted((a.index, b.index))), a, b)

    def _reified(self, name: Any, a: Any, b: Any) -> Any:
        if name not in self._literals:
            literal = self._literals[name] = self._model.new_bool_var("")
            self._model.add(a == b).only_enforce_if(literal)
            self._model.add(a != b).only_enforce_if(~literal)
        return self._literals[name]

    def _all(self, literals: list[Any]) -> Any:
        if len(literals) == 1:
            return literals[0]
        literal = self._model.new_bool_var("")
        self._model.add_bool_and(literals).only_enforce_if(literal)
        self._model.add_bool_or([~each for each in literals]).only_enforce_if(~literal)
        return literal

    def _any(self, literals: list[Any]) -> Any:
        return ~self._all([~each for each in literals])
