"""A sampling budget that needs no pilot: what was learned from also says what to sample next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

from pyrl.algorithms.allocate import allocate_budget
from pyrl.algorithms.budget import Pilot, PilotResult, Take
from pyrl.algorithms.draws import (
    Draw,
    Place,
    PromptWeight,
    Share,
    check_kind,
    check_weight,
    check_whole,
    draws_of,
    step_metrics,
)


class Online:
    """Budgets without a pilot, from what the prompts' last visits showed. Ours, not the paper's.

    The first time a prompt is met it gets `n` samples. Later the step's other samples, n for each
    prompt already known, are allocated as by `GVM`, but at least 1 a prompt, so that no estimate
    dies. Estimates are of the visits so far, each `decay` times what the next one counts: p̂ =
    accepted / scored, G = the mean norm over the accepted. key: what tells prompts apart, such as
    (domain, position modulo the data set's size); of strings, numbers and tuples.
    maximum, group_size, prompt_weight as in `GVM`; "inverse_np" leaves prompts met the first time
    at 1, and takes half an acceptance of the samples remembered as the least.

    ValueError for settings that cannot work.
    """

    needs_norms = True

    def __init__(
        self,
        prompts: int,
        n: int,
        *,
        key: Callable[[Place], Hashable],
        decay: float = 0.5,
        alpha: float = 1e-3,
        beta: float = 2.0,
        prompt_weight: PromptWeight = "none",
        group_size: int = 0,
        minimum: int = 1,
        maximum: int | None = None,
    ) -> None:
        most = n if maximum is None else maximum
        check_whole(
            prompts=(prompts, 1),
            n=(n, 1),
            group_size=(group_size, 0),
            minimum=(minimum, 1),
            maximum=(most, n),
        )
        if minimum > n:
            raise ValueError(f"minimum={minimum}: above the n={n} samples of a prompt on average")
        check_weight(prompt_weight)
        allocate_budget([], [], 0, alpha=alpha, beta=beta)  # checks these two
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay!r}: expected a number in [0, 1]")
        self.prompts, self.n, self.key, self.decay = prompts, n, key, decay
        self.prompt_weight, self.group_size = prompt_weight, group_size
        self._options: dict[str, Any] = {
            "alpha": alpha,
            "beta": beta,
            "minimum": minimum,
            "maximum": maximum,
        }
        self._seen: dict[Hashable, _Visits] = {}
        self._metrics: dict[str, float] = {}

    def plan(self, step: int, take: Take, pilot: Pilot) -> list[Draw]:
        """See `Budget.plan`; there is no pilot."""
        places = take(self.prompts)
        visits = [self._seen.get(self.key(place)) for place in places]
        known = [v for v in visits if v is not None]
        rates, norms = [v.rate for v in known], [v.norm for v in known]
        counts = iter(allocate_budget(rates, norms, self.n * len(known), **self._options).tolist())
        shares = [
            Share(place, self.n, None) if v is None else Share(place, next(counts), v.least_rate)
            for place, v in zip(places, visits, strict=True)
        ]
        draws = draws_of(shares, self.prompt_weight, self.group_size)
        self._metrics = {
            "budget_known_share": len(known) / len(places),
            "budget_max": float(max(share.samples for share in shares)),
            **step_metrics(draws),
        }
        return draws

    def observe(self, results: Mapping[Place, PilotResult]) -> None:
        """Prompts none of whose samples were scored stay as they were."""
        for place, r in results.items():
            if r.scored:
                old = self._seen.get(self.key(place), _Visits(0.0, 0.0, 0.0))
                self._seen[self.key(place)] = _Visits(
                    self.decay * old.accepted + r.accepted,
                    self.decay * old.scored + r.scored,
                    self.decay * old.norms + r.accepted * r.gradient_norm,
                )

    def metrics(self) -> dict[str, float]:
        """Of the step: budget_known_share (of prompts met before), max, prompts, samples."""
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        seen = [[key, *visits] for key, visits in self._seen.items()]
        return {"kind": "online", "seen": seen, "metrics": dict(self._metrics)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Budget.load_state_dict`."""
        check_kind(state, "online")
        self._seen = {_key(key): _Visits(*visits) for key, *visits in state["seen"]}
        self._metrics = dict(state["metrics"])


class _Visits(NamedTuple):
    """Sums over a prompt's visits, the older the less."""

    accepted: float
    scored: float
    norms: float

    @property
    def rate(self) -> float:
        return self.accepted / self.scored

    @property
    def least_rate(self) -> float:
        return max(self.accepted, 0.5) / self.scored

    @property
    def norm(self) -> float:
        return self.norms / self.accepted if self.accepted else 0.0


def _key(value: Any) -> Hashable:
    """Tuples come back from JSON as lists."""
    return tuple(_key(v) for v in value) if isinstance(value, list) else value
