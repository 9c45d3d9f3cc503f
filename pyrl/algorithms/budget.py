from dataclasses import dataclass


@dataclass(frozen=True)
class Draw:
    place: tuple
    count: int
    weight: float = 1.0
    group: int = 0


@dataclass
class PilotResult:
    accepted: int
    scored: int
    gradient_norm: float


class Uniform:
    needs_norms = False

    def __init__(self, prompts, n):
        self.prompts, self.n = prompts, n

    def plan(self, step, take, pilot):
        return [Draw(p, self.n) for p in take(self.prompts)]

    def metrics(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, s):
        pass


class GVM(Uniform):
    pass


class Online(Uniform):
    pass


Budget = Uniform
