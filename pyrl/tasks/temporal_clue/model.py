"""The rules of a night and its clues as a CP-SAT model: is there another night that fits?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pyrl.tasks.temporal_clue.facts import Fact
from pyrl.tasks.temporal_clue.world import World

#: One worker and a limit in CP-SAT's own seconds: the same result on every machine, at any load.
#: The rest saves time: 100 short searches of a puzzle cost less than one round of probing.
PARAMETERS = {
    "num_workers": 1,
    "random_seed": 0,
    "max_deterministic_time": 5.0,  # 13,957 searches took 0.09 at most
    "cp_model_presolve": False,  # must be: see `Nights.other`
    "use_sat_inprocessing": False,  # 4 to 6 times faster without
    "cp_model_probing_level": 0,
    "linearization_level": 0,
    "symmetry_level": 0,
}


class Undecided(Exception):
    """CP-SAT reached its deterministic limit."""


class Nights:
    """Every night with the true one's names, grid and motive counts, other than the true one.

    One-hot (piece, time) -> room, suspect -> motive, murderer, weapon, room, time. Exactly one
    suspect in the murder room at the murder time, he the murderer; the weapon there; the victim
    there from then on. Suspects and victim stay or go to a neighbouring room; a weapon changes
    rooms only together with some suspect. As many suspects of each motive as in truth.

    A literal is CP-SAT's: v for variable v, −v − 1 for its negation. Definitions of auxiliary
    variables and the clauses of clues are written once and kept; `other` appends the chosen clues
    to a copy of the rules.
    """

    def __init__(self, world: World) -> None:
        try:
            from ortools.sat.python import cp_model, cp_model_helper
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'Temporal Clue puzzles need OR-Tools: pip install "pyrl[tasks]"'
            ) from error
        self._cp, self._helper, self._world = cp_model, cp_model_helper, world
        self._solver = cp_model.CpSolver()
        parameters = self._solver.parameters
        parameters.search_branching = cp_model_helper.SatParameters.SearchBranching.FIXED_SEARCH
        for name, value in PARAMETERS.items():
            setattr(parameters, name, value)
        self._model = cp_model.CpModel()
        self._proto: Any = self._model.proto
        self._clues: dict[Fact, list[list[int]]] = {}
        self._memo: dict[tuple, Any] = {}
        s, r, t = len(world.suspects), len(world.rooms), len(world.times)
        self._at = [[self._one_hot(r) for _ in range(t)] for _ in world.paths]  # [P][T][R]
        self._motive = [self._one_hot(len(world.motives)) for _ in world.suspect_motives]
        self._murderer, self._weapon = self._one_hot(s), self._one_hot(len(world.weapons))
        self._room, self._time = self._one_hot(r), self._one_hot(t)
        self._counts()
        self._walks()
        self._murder()
        self._clause([-v - 1 for v in self._truth()])

    # Rules.

    def _counts(self) -> None:
        world = self._world
        for motive in range(len(world.motives)):
            linear = self._proto.constraints.add().linear
            linear.vars.extend(own[motive] for own in self._motive)
            linear.coeffs.extend(1 for _ in self._motive)
            count = world.motive_count(motive)
            linear.domain.extend((count, count))

    def _walks(self) -> None:
        world, n = self._world, len(self._world.suspects)
        nearby = [world.neighbours(room) for room in range(len(world.rooms))]
        for piece, at in enumerate(self._at):
            for time in range(1, len(at)):
                before, now = at[time - 1], at[time]
                if not n <= piece < world.victim:
                    for room, ways in enumerate(nearby):
                        self._clause([-before[room] - 1, now[room], *(now[to] for to in ways)])
                        self._clause([-now[room] - 1, before[room], *(before[b] for b in ways)])
                    continue
                for room, ways in enumerate(nearby):
                    self._clause([-before[room] - 1, now[room], *(now[to] for to in ways)])
                    for to in ways:
                        steps = [self._step(s, time, room, to) for s in range(n)]
                        self._clause([-before[room] - 1, -now[to] - 1, *steps])

    def _step(self, suspect: int, time: int, a: int, b: int) -> int:
        """True only if the suspect moved from a to b at the time."""
        at = self._at[suspect]
        return self._implies_all(at[time - 1][a], at[time][b])

    def _murder(self) -> None:
        world, n = self._world, len(self._world.suspects)
        for time, is_time in enumerate(self._time):
            for room, is_room in enumerate(self._room):
                here = [-is_time - 1, -is_room - 1]
                for suspect, is_murderer in enumerate(self._murderer):
                    there = self._at[suspect][time][room]
                    self._clause([*here, -is_murderer - 1, there])
                    self._clause([*here, -there - 1, is_murderer])
                for weapon, is_weapon in enumerate(self._weapon):
                    self._clause([*here, -is_weapon - 1, self._at[n + weapon][time][room]])
                self._clause([*here, self._at[world.victim][time][room]])
        # Once he is there at the time of the murder, he stays.
        for time in range(1, len(self._time)):
            dead = self._any(self._time[:time])
            before, now = self._at[world.victim][time - 1], self._at[world.victim][time]
            for a, b in zip(before, now, strict=True):
                self._clause([-dead - 1, -a - 1, b])

    def _truth(self) -> list[int]:
        """The variables that are true in the true world."""
        world = self._world
        true = [
            at[time][room]
            for at, path in zip(self._at, world.paths, strict=True)
            for time, room in enumerate(path)
        ]
        true += [own[m] for own, m in zip(self._motive, world.suspect_motives, strict=True)]
        true += [self._murderer[world.murderer], self._weapon[world.weapon]]
        return [*true, self._room[world.room], self._time[world.time]]

    # Variables and clauses.

    def _new(self) -> int:
        variables = self._proto.variables
        variables.add().domain.extend((0, 1))
        return len(variables) - 1

    def _one_hot(self, size: int) -> list[int]:
        literals = [self._new() for _ in range(size)]
        self._proto.constraints.add().exactly_one.literals.extend(literals)
        return literals

    def _clause(self, literals: Iterable[int]) -> None:
        self._proto.constraints.add().bool_or.literals.extend(literals)

    def _implies_all(self, *literals: int) -> int:
        """A variable that implies all the literals."""
        key = ("implies", *literals)
        if key not in self._memo:
            self._memo[key] = new = self._new()
            for literal in literals:
                self._clause([-new - 1, literal])
        return self._memo[key]

    def _all(self, *literals: int) -> int:
        """A variable that is true exactly if all the literals are."""
        key = ("all", *literals)
        if key not in self._memo:
            self._memo[key] = new = self._new()
            for literal in literals:
                self._clause([-new - 1, literal])
            self._clause([new, *(-literal - 1 for literal in literals)])
        return self._memo[key]

    def _any(self, literals: Iterable[int]) -> int:
        """A literal that is true exactly if one of the literals is."""
        return -self._all(*(-literal - 1 for literal in literals)) - 1

    # Clues.

    def clauses(self, fact: Fact) -> list[list[int]]:
        """Clauses that hold exactly if the fact does, over variables of the model."""
        if fact not in self._clues:
            self._clues[fact] = self._encode(*fact)
        return self._clues[fact]

    def _encode(self, kind: str, *args: Any) -> list[list[int]]:
        if kind in ("xor", "iff"):
            f, g = (self._place(part) for part in args)
            sign = g if kind == "xor" else -g - 1
            return [[f, sign], [-f - 1, -sign - 1]]
        if kind in ("murderer", "murder_weapon", "murder_room", "murder_time"):
            return [[getattr(self, "_" + kind.removeprefix("murder_"))[args[0]]]]
        if kind == "motive":
            return [[self._motive[args[0]][args[1]]]]
        if kind == "murder_motive":
            both = zip(self._murderer, self._motive, strict=True)
            return [[-is_murderer - 1, own[args[0]]] for is_murderer, own in both]
        if kind.endswith("carried") or kind == "carried_murder_weapon":
            return self._carried(kind, *args)
        if kind.endswith("_of"):
            return self._beside(kind.removesuffix("_of"), *args)
        role, relation, args = self._role(kind, args)
        return getattr(self, "_fact_" + relation)(role, *args)

    def _role(self, kind: str, args: tuple) -> tuple[tuple, str, tuple]:
        """Whom a fact is about, ("piece", p), ("murderer",), …; the relation; its arguments."""
        for prefix in ("murder_weapon", "murderer", "motive"):
            if kind.startswith(prefix + "_"):
                named = args[:1] if prefix == "motive" else ()
                return (prefix, *named), kind.removeprefix(prefix + "_"), args[len(named) :]
        return ("piece", args[0]), kind, args[1:]

    def _choices(self, role: tuple) -> list[tuple[int, int]]:
        """(literal, piece): the role is this piece if the literal is true."""
        if role[0] == "murderer":
            return [(literal, s) for s, literal in enumerate(self._murderer)]
        if role[0] == "murder_weapon":
            return [(v, len(self._world.suspects) + w) for w, v in enumerate(self._weapon)]
        return [(own[role[1]], s) for s, own in enumerate(self._motive)]

    def _several(self, role: tuple) -> bool:
        return role[0] == "motive" and self._world.motive_count(role[1]) > 1

    def _place(self, fact: Fact) -> int:
        """A literal that is true exactly if a place ("at", "murderer_at", …) is."""
        role, _, (time, room) = self._role(fact[0], fact[1:])
        return self._literal(role, time, room)

    def _there(self, role: tuple, time: int, room: int) -> list[list[int]]:
        """Clauses that hold exactly if the role was, or one of its suspects was, in the room."""
        if role[0] == "piece":
            return [[self._at[role[1]][time][room]]]
        pairs = [(v, self._at[p][time][room]) for v, p in self._choices(role)]
        if self._several(role):
            return [[self._all(*pair) for pair in pairs]]
        return [[-v - 1, at] for v, at in pairs]

    def _literal(self, role: tuple, time: int, room: int) -> int:
        """A literal that is true exactly if the clauses of `_there` hold."""
        if role[0] == "piece":
            return self._at[role[1]][time][room]
        key = (role, time, room)
        if key not in self._memo:
            there = self._there(role, time, room)
            if self._several(role):
                self._memo[key] = self._any(there[0])
            else:  # the role is one piece: ¬found implies that it was not there
                self._memo[key] = found = self._new()
                for v, at in there:
                    self._clause([-found - 1, v, at])
                    self._clause([found, v, -at - 1])
        return self._memo[key]

    def _fact_at(self, role: tuple, time: int, room: int) -> list[list[int]]:
        return self._there(role, time, room)

    def _fact_with(self, role: tuple, other: int, time: int) -> list[list[int]]:
        return [
            [-there - 1, *clause]
            for room, there in enumerate(self._at[other][time])
            for clause in self._there(role, time, room)
        ]

    _fact_same_room = _fact_with

    def _fact_together(self, role: tuple, other: int, room: int) -> list[list[int]]:
        times = range(len(self._world.times))
        both = [(self._literal(role, t, room), self._at[other][t][room]) for t in times]
        return [[self._implies_all(*pair) for pair in both]]

    def _fact_moved(self, role: tuple, time: int, a: int, b: int) -> list[list[int]]:
        if time < 1:
            return [[]]
        if not self._several(role):
            return self._there(role, time - 1, a) + self._there(role, time, b)
        return [[self._all(v, self._step(s, time, a, b)) for v, s in self._choices(role)]]

    def _carried(self, kind: str, *args: int) -> list[list[int]]:
        *named, time, a, b = args
        carrier = self._role(kind, tuple(named))[0]
        weapon: tuple = ("piece", len(self._world.suspects) + named[-1])
        if kind == "carried_murder_weapon":
            carrier, weapon = ("piece", named[0]), ("murder_weapon",)
        return self._fact_moved(carrier, time, a, b) + self._fact_moved(weapon, time, a, b)

    def _beside(self, direction: str, piece: int, other: int, time: int) -> list[list[int]]:
        clauses: list[list[int]] = []
        for room, there in enumerate(self._at[other][time]):
            here = self._world.beside(room, direction)
            clauses.append([-there - 1] + ([] if here is None else [self._at[piece][time][here]]))
        return clauses

    # Solving.

    def other(self, must: Iterable[Fact], rather: Iterable[Fact] = ()) -> World | None:
        """Another night in which all facts of `must` hold; None if there is none.

        Of those it is one in which the first fact of `rather` holds, if any such is; of those one
        in which the second holds, and so on. Undecided if CP-SAT reaches its limit.
        """
        known = [clause for fact in must for clause in self.clauses(fact)]
        wishes = [self.clauses(fact) for fact in rather]  # may add variables, hence before the copy
        model = self._model.clone()
        proto = model.proto
        for clause in known:
            proto.constraints.add().bool_or.literals.extend(clause)
        # Decisions in this order, each true first: what is false at the end was implied by those
        # before it. Presolve would also fix variables whose value is merely possible.
        strategy = proto.search_strategy.add()
        strategy.domain_reduction_strategy = (
            self._helper.DecisionStrategyProto.DomainReductionStrategy.SELECT_MAX_VALUE
        )
        for clauses in wishes:
            if len(clauses) == 1 and len(clauses[0]) == 1 and clauses[0][0] >= 0:
                wish = clauses[0][0]
            else:
                wish = len(proto.variables)
                proto.variables.add().domain.extend((0, 1))
                for clause in clauses:
                    proto.constraints.add().bool_or.literals.extend([-wish - 1, *clause])
            term = strategy.exprs.add()
            term.vars.append(wish)
            term.coeffs.append(1)
        status = self._solver.solve(model)
        if status == self._cp.INFEASIBLE:
            return None
        if status not in (self._cp.OPTIMAL, self._cp.FEASIBLE):
            raise Undecided(f"CP-SAT stopped: {self._solver.status_name(status)}")
        return self._read(self._solver.response_proto.solution)

    def _read(self, values: Any) -> World:
        def chosen(literals: list[int]) -> int:
            return next(i for i, v in enumerate(literals) if values[v])

        return replace(
            self._world,
            suspect_motives=tuple(map(chosen, self._motive)),
            paths=tuple(tuple(map(chosen, at)) for at in self._at),
            murderer=chosen(self._murderer),
            weapon=chosen(self._weapon),
            room=chosen(self._room),
            time=chosen(self._time),
        )
