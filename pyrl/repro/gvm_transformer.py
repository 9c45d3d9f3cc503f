"""GVM's budgets on a frozen transformer: per-sample gradients of every right completion."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyrl.algorithms.allocate import allocate_budget
from pyrl.repro.claim import Arm, Chart, Claim, Result, Table, rounded
from pyrl.repro.gvm import FREE, KNOWING, PAID, SHORT, counted
from pyrl.repro.statistics import t_interval
from pyrl.repro.tiny import completion_logprob, questions, tiny_policy, warm_start

#: Parameters whose gradient's norm is G: the embedding (as the public code), the head, all.
PARTS = ("embedding", "head", "all")
REUSED = "GVM (embedding), pilot samples reused"
#: The bar that is set here, below the paper's claim of less than 1.
BELOW = 0.9
#: Seeds 0-4 were looked at while the number of seeds was chosen, and are not used.
FIRST = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Prompts of the pool, samples a prompt, and supervised steps before freezing."""

    prompts: int = 48
    samples: int = 8
    pilot: int = 8
    warm: int = 75
    replicates: int = 2000


class Pool(NamedTuple):
    """The right completions of the pool's prompts, C in all, with gradients g = ∇(-log π)."""

    prompt: np.ndarray
    """[C]: the prompt of each completion."""
    chance: np.ndarray
    """[C]: its probability under the policy."""
    gram: np.ndarray
    """[C, C]: inner products of the gradients of all parameters."""
    norms: dict[str, np.ndarray]
    """Part → [C]: norm of the part's gradient."""


def measure(setting: Setting, seed: int) -> Pool:
    """A policy of its own, warm-started and frozen, and every gradient of its pool."""
    model = tiny_policy(seed, tie_word_embeddings=False)
    warm_start(model, setting.warm, seed)
    every = questions()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    prompt, chance, gradients = [], [], []
    for i, chosen in enumerate(order[: setting.prompts].tolist()):
        question, answers = every[chosen]
        for answer in answers:
            logprob = completion_logprob(model, torch.tensor([question]), torch.tensor([answer]))
            parts = torch.autograd.grad(-logprob[0], list(model.parameters()))
            prompt.append(i)
            chance.append(float(logprob.detach().double().exp()))
            gradients.append(torch.cat([part.reshape(-1) for part in parts]))
    table = torch.stack(gradients)
    norms = {part: _norms(model, table, part) for part in PARTS}
    gram = (table @ table.T).double().numpy()
    return Pool(np.array(prompt), np.array(chance), gram, norms)


def _norms(model: Any, table: Tensor, part: str) -> np.ndarray:
    wanted = {
        "embedding": model.get_input_embeddings().weight,
        "head": model.get_output_embeddings().weight,
    }.get(part)
    total = torch.zeros(len(table), dtype=torch.float64)
    start = 0
    for parameter in model.parameters():
        piece = table[:, start : start + parameter.numel()]
        start += parameter.numel()
        if wanted is None or parameter is wanted:
            total += piece.double().square().sum(1)
    return total.sqrt().numpy()


class Truth(NamedTuple):
    """Per prompt [P], of a pool: `gvm.Moments`, with the inner products of the mean gradients."""

    rate: np.ndarray
    second: np.ndarray
    products: np.ndarray
    """[P, P]: E[g_i | accepted] · E[g_j | accepted]."""


def truth(pool: Pool) -> Truth:
    """Exact moments: the right completions are enumerated."""
    one = (pool.prompt[None] == np.arange(pool.prompt.max() + 1)[:, None]).astype(float)
    rate = one @ pool.chance
    given = one * pool.chance / rate[:, None]
    return Truth(rate, given @ np.diag(pool.gram), given @ pool.gram @ given.T)


def error(true: Truth, budget: np.ndarray, seen: np.ndarray) -> float:
    """E|ĝ - g|² of ĝ = sum over seen prompts of 1/(n_i p_i) sum over accepted of g: the variance,
    and the squared bias where a seen prompt got no sample."""
    single = true.second / true.rate - np.diag(true.products)
    missing = (seen & (budget == 0)).astype(float)
    some = seen & (budget > 0)
    return float((single[some] / budget[some]).sum() + missing @ true.products @ missing)


def bootstrap(pool: Pool, true: Truth, budget: np.ndarray, seen: np.ndarray, draws: int) -> float:
    """The same error from `draws` replicates of ĝ, each drawing every prompt's n_i samples anew."""
    generator = np.random.default_rng(0)
    weight = np.zeros((draws, len(pool.prompt)))
    for i in np.flatnonzero(seen):
        mine = pool.prompt == i
        chances = pool.chance[mine]
        weight[:, mine] = -chances / true.rate[i]
        if budget[i]:
            outcomes = [*chances, max(0.0, 1 - chances.sum())]
            counts = generator.multinomial(budget[i], outcomes, size=draws)[:, :-1]
            weight[:, mine] += counts / (budget[i] * true.rate[i])
    return float(((weight @ pool.gram) * weight).sum(1).mean())


def pilot(pool: Pool, true: Truth, samples: int, seed: int) -> tuple[np.ndarray, dict]:
    """p̂ [P], and Ĝ [P] of every part, from `samples` a prompt."""
    generator = np.random.default_rng(seed)
    rate = np.zeros(len(true.rate))
    norm = {part: np.zeros(len(rate)) for part in PARTS}
    for i in range(len(rate)):
        mine = pool.prompt == i
        chances = pool.chance[mine]
        counts = generator.multinomial(samples, [*chances, max(0.0, 1 - chances.sum())])[:-1]
        rate[i] = counts.sum() / samples
        for part in PARTS:
            norm[part][i] = counts @ pool.norms[part][mine] / max(1, counts.sum())
    return rate, norm


def ratios(setting: Setting, seed: int) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """(quantity, arm) → error over uniform's on the seen prompts, as `gvm.ratios`; and the
    bootstrap's ratio and other observations."""
    pool = measure(setting, seed)
    true = truth(pool)
    rate, norm = pilot(pool, true, setting.pilot, seed)
    seen = rate > 0
    once = setting.samples * setting.prompts
    each = setting.samples + setting.pilot

    def full(budget: np.ndarray) -> np.ndarray:
        found = np.zeros(len(seen), dtype=np.int64)
        found[seen] = budget
        return found

    flat = np.ones(int(seen.sum()))
    uniform = full(allocate_budget(flat, flat, once))
    base = error(true, uniform, seen)
    plain = error(true, np.full(len(seen), each), seen)
    knowing = error(true, full(allocate_budget(flat, flat, each * setting.prompts)), seen)
    budgets = {part: full(allocate_budget(rate[seen], norm[part][seen], once)) for part in PARTS}
    found = {(FREE, _name(part)): error(true, budgets[part], seen) / base for part in PARTS}
    one = (pool.prompt[None] == np.arange(len(rate))[:, None]).astype(float)
    exact = (one * pool.chance) @ pool.norms["all"] / true.rate
    best = allocate_budget(true.rate[seen], exact[seen], once)
    found[FREE, "GVM, true p and G"] = error(true, full(best), seen) / base
    best = allocate_budget(
        true.rate[seen], np.sqrt(np.diag(true.products)[seen]), once,
        method="neyman", second_moment=true.second[seen],
    )  # fmt: skip
    found[FREE, "Neyman, true moments"] = error(true, full(best), seen) / base
    total = once + setting.pilot * int(seen.sum())
    reuse = allocate_budget(rate[seen], norm["embedding"][seen], total, minimum=setting.pilot)
    spent = {
        _name("embedding"): error(true, budgets["embedding"], seen),
        REUSED: error(true, full(reuse), seen),
    }
    found |= {(PAID, arm): value / plain for arm, value in spent.items()}
    found |= {(KNOWING, arm): value / knowing for arm, value in spent.items()}
    drawn = [
        bootstrap(pool, true, budget, seen, setting.replicates)
        for budget in (budgets["embedding"], uniform)
    ]
    low, middle, high = np.quantile(true.rate, (0.1, 0.5, 0.9))
    seen_by = {
        "bootstrap": drawn[0] / drawn[1],
        "seen": float(seen.mean()),
        "low": low,
        "middle": middle,
        "high": high,
    }
    return found, seen_by


def _name(part: str) -> str:
    return f"GVM ({part})"


def transformer(seeds: int, quick: bool) -> Result:
    """Gradient variance under each budget, relative to uniform, of a frozen transformer."""
    usual = Setting(prompts=8, replicates=50) if quick else Setting()
    runs = [ratios(usual, seed) for seed in range(FIRST, FIRST + seeds)]
    result = Result(
        name="gvm-transformer",
        title="Budgets by gradient variance, a frozen transformer",
        paper="arXiv 2505.02391",
        published="As for the tabular version: budgets from a pilot's accept rates and gradient "
        f"norms lower the gradient's variance at equal N. Our own bar is a ratio below {BELOW:g}.",
        regime="Two-layer Llama, D = 32, vocabulary 320, head untied (39,072 parameters); a toy "
        "task on two digits (copy, successor, any two digits of equal sum, both below the larger, "
        f"both above the smaller), answers of two tokens, 1 to 81 of them right; {usual.warm} "
        "supervised steps so that accept rates spread, then frozen. Pool: "
        f"{usual.prompts} random questions; N = {usual.samples} samples a prompt on average, pilot "
        f"N' = {usual.pilot} each, T = 1. G is the norm of the gradient of the embedding (as in "
        "the public code), of the head, or of all parameters; the variance is always that of all. "
        "A seed is a model, its warm start, its questions and its pilot.",
        figure="Mean squared error of ĝ = Σ_i 1/(n_i p_i) Σ_accepted ∇(-log π) over all "
        "parameters, over uniform's; both over the *seen* prompts, those with an accepted pilot "
        "sample. Exact, as every right answer can be listed with its probability and its gradient; "
        f"the table has the same from {usual.replicates} replicates drawn from that pool. *Pilot "
        "not counted*: uniform spends the same N·P samples on the seen prompts too. *Pilot "
        "counted* (judged): uniform without a pilot, N + N' samples on every prompt, those on "
        "unseen ones included. Reported beside it: *uniform on the seen prompts alone*, which has "
        "(N + N')·P samples and, for nothing, the pilot's knowledge of where to spend them.",
        caveats=[
            "One frozen policy a seed: nothing here says how the ratio moves during training.",
            "Short answers: a gradient norm differs less between samples than with long ones.",
            "Five seeds were looked at when the number of seeds was chosen; they are not among "
            "these. The length of the warm start was chosen by the accept rates alone.",
            "The gradient of the unseen prompts (their share is in the table) is in neither arm's "
            "error: no bias for the pilot's arms, and no credit for the uniform arm whose samples "
            "do estimate it. That favours the pilot, as *uniform on the seen prompts alone* "
            "favours uniform. An earlier version judged the latter as *pilot counted*: the "
            "baseline was changed, to what the text said, with figures in sight.",
            "The other caveats of the tabular version hold here too.",
        ],
    )
    result.arms = [Arm(*key, rounded([found[key] for found, _ in runs])) for key in runs[0][0]]
    result.claims = [Claim(FREE, _name(part), "below", 1.0) for part in PARTS]
    result.claims += [Claim(FREE, _name(part), "below", BELOW, "our bar") for part in PARTS]
    result.claims += [
        Claim(FREE, "GVM, true p and G", "below", BELOW, "our bar"),
        Claim(FREE, "Neyman, true moments", "below", BELOW, "our bar"),
        Claim(PAID, _name("embedding"), "below", 1.0, counted(result, _name("embedding"))),
        Claim(PAID, REUSED, "reported", 1.0, "ours"),
        Claim(KNOWING, _name("embedding"), "reported", 1.0),
        Claim(KNOWING, REUSED, "reported", 1.0),
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
    rows = [_row(f"{usual.warm} (judged)", runs)]
    others = range(FIRST, FIRST + min(seeds, 5))
    for warm in () if quick else (50, 150):
        setting = dataclasses.replace(usual, warm=warm)
        rows.append(_row(str(warm), [ratios(setting, seed) for seed in others]))
    columns = [f"{arm}{SHORT[kind]}" for kind, arm in runs[0][0]]
    columns = ["supervised steps", "accept rates, 10/50/90%", "prompts seen", *columns]
    columns.append(f"{_name('embedding')}, replicates")
    result.tables = [
        Table(
            "By length of the warm start: mean ratio",
            columns,
            rows,
            f"The first row has all seeds, the others {len(others)} of them.",
        )
    ]
    return result


def _row(name: str, runs: list) -> list[str]:
    mean = {key: float(np.mean([seen[key] for _, seen in runs])) for key in runs[0][1]}
    spread = f"{mean['low']:.2f}/{mean['middle']:.2f}/{mean['high']:.2f}"
    cells = [f"{t_interval([found[key] for found, _ in runs]).mean:.3f}" for key in runs[0][0]]
    return [name, spread, f"{mean['seen']:.0%}", *cells, f"{mean['bootstrap']:.3f}"]
