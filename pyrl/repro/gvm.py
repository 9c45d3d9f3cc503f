"""Sampling budgets that minimise gradient variance (GVM, arXiv 2505.02391): tabular policies."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch

from pyrl.algorithms.allocate import allocate_budget
from pyrl.repro.claim import Arm, Chart, Claim, Result, Table, rounded
from pyrl.repro.statistics import t_interval

FREE = "variance ratio, pilot not counted"
PAID = "variance ratio, pilot counted"
#: What uniform would know only from a pilot of its own: which prompts can be solved.
KNOWING = "variance ratio, pilot counted, uniform on the seen prompts alone"
EVERY = "squared error ratio, pilot counted, all prompts"
#: Column suffixes of the tables.
SHORT = {FREE: "", PAID: ", counted", KNOWING: ", counted, seen alone", EVERY: ", all prompts"}
PILOT, EXACT, NEYMAN = "GVM, pilot estimates", "GVM, true p and G", "Neyman, true moments"
REUSED = "GVM, pilot samples reused"


class Moments(NamedTuple):
    """Of the accepted samples' gradients g = ∇(-log π), float64 [P] each."""

    rate: np.ndarray
    """p: probability that a sample is accepted."""
    norm: np.ndarray
    """G: E[|g| | accepted]."""
    second: np.ndarray
    """E[|g|² | accepted]."""
    mean: np.ndarray
    """|E[g | accepted]|²."""


def error(moments: Moments, budget: np.ndarray) -> float:
    """sum_i (E[|g_i|²]/p_i - |E g_i|²) / n_i, and |E g_i|² where n_i = 0: the exact mean squared
    error of ĝ = sum_i 1/(n_i p_i) sum over accepted of g, expectations given acceptance.

    Prompts without a sample are a bias, not a variance; adding up their squares takes gradients of
    different prompts to be orthogonal, as a table's are.
    """
    single = moments.second / moments.rate - moments.mean
    return float(np.where(budget > 0, single / np.maximum(budget, 1), moments.mean).sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Logits spread N(0, 1), and offset N(0, 1), one a prompt, on the prompt's correct actions."""

    prompts: int = 64
    actions: int = 32
    correct: int = 4
    samples: int = 8
    pilot: int = 8
    spread: float = 1.0
    offset: float = 2.0


def draw(setting: Setting, seed: int) -> tuple[Moments, np.ndarray, np.ndarray]:
    """True moments, and p̂ and Ĝ of a pilot, [P] each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.prompts, setting.actions)
    logits = setting.spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    level = setting.offset * torch.randn(shape[0], 1, generator=generator, dtype=torch.float64)
    logits[:, : setting.correct] += level
    policy = logits.softmax(-1)
    # ∇(-log π(a)) = π - e_a with respect to the prompt's own logits
    gradient = policy[:, None] - torch.eye(shape[1], dtype=torch.float64)[: setting.correct]
    accepted = policy[:, : setting.correct]
    rate = accepted.sum(-1)
    given = accepted / rate[:, None]
    norms = gradient.norm(dim=-1)
    moments = Moments(
        rate.numpy(),
        (given * norms).sum(-1).numpy(),
        (given * norms**2).sum(-1).numpy(),
        (given[..., None] * gradient).sum(1).square().sum(-1).numpy(),
    )
    tries = torch.multinomial(policy, setting.pilot, replacement=True, generator=generator)
    right = tries < setting.correct
    found = norms.gather(1, tries.clamp(max=setting.correct - 1)) * right
    count = right.sum(-1)
    estimate = found.sum(-1) / count.clamp(min=1)
    return moments, (count / setting.pilot).numpy(), estimate.numpy()


def ratios(setting: Setting, seed: int) -> dict[tuple[str, str], float]:
    """(quantity, arm) → error over uniform's; but for EVERY both on the *seen* prompts alone, those
    with an accepted pilot sample.

    The arms spend N P samples on the S seen of P prompts, and N' P on the pilot. Uniform has a seen
    prompt draw N P/S (FREE), N + N' (PAID: as it would without a pilot), or (N + N') P/S (KNOWING).
    EVERY: PAID over all prompts, an unseen one's missing gradient the pilot arms' bias.
    """
    every, rate, norm = draw(setting, seed)
    seen = rate > 0
    true = Moments(*(field[seen] for field in every))
    rate, norm = rate[seen], norm[seen]
    once = setting.samples * setting.prompts
    each = setting.samples + setting.pilot
    unseen = float(every.mean[~seen].sum())

    def uniform(total: int) -> float:
        return error(true, allocate_budget(np.ones_like(rate), np.ones_like(rate), total))

    def gvm(p: np.ndarray, g: np.ndarray) -> float:
        return error(true, allocate_budget(p, g, once))

    # A pilot sample is a sample: every prompt has that many, on average over those seen, already.
    reuse = allocate_budget(rate, norm, once + setting.pilot * len(rate), minimum=setting.pilot)
    neyman = allocate_budget(
        true.rate, np.sqrt(true.mean), once, method="neyman", second_moment=true.second
    )
    base = uniform(once)
    found = {
        (FREE, PILOT): gvm(rate, norm) / base,
        (FREE, EXACT): gvm(true.rate, true.norm) / base,
        (FREE, NEYMAN): error(true, neyman) / base,
    }
    spent = {PILOT: gvm(rate, norm), REUSED: error(true, reuse)}
    plain = error(true, np.full(len(rate), each))
    knowing = uniform(each * setting.prompts)
    everywhere = error(every, np.full(setting.prompts, each))
    found |= {(PAID, arm): value / plain for arm, value in spent.items()}
    found |= {(KNOWING, arm): value / knowing for arm, value in spent.items()}
    found |= {(EVERY, arm): (value + unseen) / everywhere for arm, value in spent.items()}
    return found


#: The description fixes sizes and samples, not how hard the prompts are.
OTHERS = {
    "offset 0": {"offset": 0.0},
    "offset 1": {"offset": 1.0},
    "offset 3": {"offset": 3.0},
    "spread 0.5": {"spread": 0.5},
    "spread 2": {"spread": 2.0},
    "16 pilot samples a prompt": {"pilot": 16},
}


def tabular(seeds: int, quick: bool) -> Result:
    """Exact gradient variance under each budget, relative to uniform."""
    usual = Setting(prompts=12) if quick else Setting()
    result = Result(
        name="gvm",
        title="Budgets by gradient variance, tabular policies",
        paper="arXiv 2505.02391",
        published="Giving prompt i a number of samples n_i ∝ G_i / sqrt(p_i + α/p_i^(β-1)), from "
        "the accept rate p_i and gradient norm G_i that a pilot estimates, lowers the variance of "
        "the gradient of RAFT++ and GRPO at equal N, and speeds training up 2-4 times in steps. "
        "The paper's curves do not count the pilot's samples.",
        regime=f"{usual.prompts} prompts x {usual.actions} actions, {usual.correct} of them "
        f"correct; logits {usual.spread:g}·N(0, 1), and one {usual.offset:g}·N(0, 1) a prompt on "
        f"its correct actions, so that accept rates spread over (0, 1); N = {usual.samples} "
        f"samples a prompt on average, pilot N' = {usual.pilot} each; `allocate_budget` with "
        "α = 1e-3, β = 2. A seed is a policy and its pilot.",
        figure="Exact mean squared error of ĝ = Σ_i 1/(n_i p_i) Σ_accepted ∇(-log π), no sampling "
        "involved, over uniform's; both over the *seen* prompts, those with an accepted pilot "
        "sample. With S of P prompts seen, the arms spend N·P samples on the S. *Pilot not "
        "counted*: uniform spends N·P on the S too, as the paper's comparison over the same "
        "accepted prompts. *Pilot counted*: uniform without a pilot, N + N' samples on "
        "every prompt, those on unseen ones included. Beside it: *uniform on the seen "
        "prompts alone*, which is given (N + N')·P samples and, for nothing, the pilot's knowledge "
        "of where to spend them; and *all prompts*, where the error is over all P and an unseen "
        "prompt's gradient, missing from the pilot's arms, counts as their bias.",
        caveats=[
            f"On average {_seen(usual, seeds):.0%} of the prompts are seen. The gradient of the "
            "others is in neither arm's error (but for *all prompts*): no bias for the pilot's "
            "arms, and no credit for the uniform arm whose samples do estimate it. That favours "
            "the pilot, as *uniform on the seen prompts alone* favours uniform; where the two are "
            "on different sides of 1, the sign of *pilot counted* rests on the convention.",
            "*All prompts* adds it, and is smaller nonetheless: the unbiased 1/p estimate of a "
            "rarely solved prompt has a squared error far above that of no estimate, and a few "
            "such prompts decide uniform's sum. It shows what this estimator costs there, no "
            "merit of a pilot.",
            "An earlier version judged *uniform on the seen prompts alone* under the name of "
            "*pilot counted*: the baseline was changed, to what the text said, with figures in "
            "sight.",
            "The estimator divides by the true p_i; in training one divides by a count.",
            "*Pilot samples reused* trains on the pilot too, and gives every prompt at least N'. "
            "Reused samples also chose the budget; that small dependence is not counted.",
            "A lower variance is no proof of faster learning, which is not measured here.",
        ],
    )
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(seeds):
        for key, value in ratios(usual, seed).items():
            found[key].append(value)
    result.arms = [Arm(*key, rounded(values)) for key, values in found.items()]
    result.claims = [Claim(FREE, arm, "below", 1.0) for arm in (PILOT, EXACT, NEYMAN)]
    # Not judged: its sign hangs on what the uniform budget is taken to know.
    result.claims.append(Claim(PAID, PILOT, "reported", 1.0, counted(result, PILOT)))
    result.claims.append(Claim(PAID, REUSED, "reported", 1.0, "ours, not the paper's"))
    result.claims += [
        Claim(kind, arm, "reported", 1.0) for kind in (KNOWING, EVERY) for arm in (PILOT, REUSED)
    ]
    result.charts = [
        Chart("Pilot not counted", "variance over uniform's", quantity=FREE, mark=1.0),
        Chart("Pilot counted", "variance over uniform's", quantity=PAID, mark=1.0),
        Chart(
            "Counted, uniform on the seen alone",
            "variance over uniform's",
            quantity=KNOWING,
            mark=1.0,
        ),
    ]
    if not quick:
        result.tables = [_others(usual, seeds)]
    return result


def counted(result: Result, arm: str) -> str:
    """The note beside a verdict that counts the pilot: what the other baseline makes of it."""
    other = result.arm(KNOWING, arm).estimate.mean
    return f"the paper does not count it; {other:.2f} over uniform on the seen prompts alone"


def _seen(setting: Setting, seeds: int) -> float:
    """Share of the prompts that have an accepted pilot sample."""
    return float(np.mean([(draw(setting, seed)[1] > 0).mean() for seed in range(seeds)]))


def _others(usual: Setting, seeds: int) -> Table:
    rows = []
    for name, change in OTHERS.items():
        setting = dataclasses.replace(usual, **change)  # type: ignore[arg-type]
        found = [ratios(setting, seed) for seed in range(seeds)]
        rates = np.concatenate([draw(setting, seed)[0].rate for seed in range(seeds)])
        spread = "/".join(f"{q:.2f}" for q in np.quantile(rates, (0.1, 0.5, 0.9)))
        cells = [f"{t_interval([f[key] for f in found]).mean:.3f}" for key in found[0]]
        below = sum(f[FREE, PILOT] < 1 for f in found)
        rows.append([name, spread, f"{_seen(setting, seeds):.0%}", *cells, f"{below} of {seeds}"])
    columns = [f"{arm}{SHORT[kind]}" for kind, arm in found[0]]
    return Table(
        "The same under other choices: mean ratio",
        [
            "changed",
            "accept rates, 10/50/90%",
            "prompts seen",
            *columns,
            f"seeds below 1 ({PILOT})",
        ],
        rows,
    )
