"""What an evaluation's samples say: avg@k, pass@k, maj@k, lengths, each with its uncertainty.

Numpy only; `describe` turns the samples into one JSON-able dictionary. Lost samples (reward NaN)
are counted and left out; a prompt with fewer than k that are left has no pass@k and no maj@k.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

#: Resamples of the bootstrap.
RESAMPLES = 2000
#: maj@k averages over all subsets of k samples up to this many (so for every k of n <= 12), over
#: this many seeded ones where there are more.
SUBSETS = 1000
#: Entries of one block of the resamples' [R, P] counts: bounds the memory for very many prompts.
BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The samples of one prompt; every field but `domain` has one entry a sample."""

    rewards: Sequence[float]
    """NaN = lost."""
    lengths: Sequence[int]
    """Tokens."""
    truncated: Sequence[bool]
    empty: Sequence[bool]
    answers: Sequence[str | None] | None = None
    """Final answers, None where a completion has none; None: the task does not say."""
    unread: Sequence[bool] | None = None
    """Samples whose answer could not be told (the task's code failed): out of maj@k."""
    domain: str = ""
    scale: float = 1.0
    """What the rewards were multiplied by; a success is one of at least `success` before that."""


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n: the k of pass@k. ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"samples={n}: expected at least 1")
    return sorted({1 << i for i in range(n.bit_length())} | {n})


def pass_at_k(n: Any, c: Any, k: int) -> np.ndarray:
    """1 - C(n - c, k) / C(n, k): the share of the k-subsets of n samples that hold one of the c
    that succeeded, an unbiased estimate of the chance that k samples do (arXiv 2107.03374).

    n, c: integers or integer arrays [P]; returns float64 [P], NaN where n < k. The quotient is
    prod_{j<k} (1 - c / (n - j)), summed as logs, so a small chance among many samples keeps all its
    digits. ValueError for k < 1 and for c outside [0, n], with its position.
    """
    n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if k < 1:
        raise ValueError(f"k={k}: expected at least 1")
    wrong = np.flatnonzero((c < 0) | (c > n))
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(f"c[{i}]={c.flat[i]}: expected 0 to n[{i}]={n.flat[i]}")
    result = np.ones(n.shape)  # where fewer than k failed, every subset holds a success
    inner = n - c >= k
    left = n[inner][..., None] - np.arange(k)
    result[inner] = -np.expm1(np.log1p(-c[inner][..., None] / left).sum(-1))
    result[n < k] = math.nan
    return result + 0.0  # not -0.0


@functools.lru_cache(maxsize=64)
def _subsets(n: int, k: int, seed: int) -> np.ndarray:
    """[R, k]: all subsets of k of range(n), or `SUBSETS` drawn ones where there are more."""
    if math.comb(n, k) <= SUBSETS:
        return np.array(list(itertools.combinations(range(n), k)), dtype=np.int64)
    rng = np.random.default_rng([seed, n, k])
    return rng.random((SUBSETS, n)).argsort(axis=1)[:, :k]


def maj_at_k(
    answers: Sequence[str | None], rewards: Sequence[float], k: int, seed: int = 0
) -> float:
    """E over subsets of k of the n samples of r(a*), a* the answer that most of the subset give.

    r(a): mean reward of all samples with the answer a; given the votes, those in a subset are
    exchangeable, so it is also what they pay on average. Tied answers are chosen among at random:
    the value is the mean over them. Samples without an answer (None) do not vote; where nobody
    votes, one of them is chosen. For k = n the subset is everything: the plurality answer.
    Exact while there are at most `SUBSETS` subsets, else over `SUBSETS` seeded ones.
    NaN where n < k. ValueError for k < 1 and for unequal lengths.
    """
    n = len(answers)
    if k < 1:
        raise ValueError(f"k={k}: expected at least 1")
    if len(rewards) != n:
        raise ValueError(f"{n} answers and {len(rewards)} rewards: expected one each")
    if n < k:
        return math.nan
    labels = {a: i for i, a in enumerate(dict.fromkeys(a for a in answers if a is not None), 1)}
    codes = np.array([0 if a is None else labels[a] for a in answers])  # 0: does not vote
    reward = np.asarray(rewards, dtype=np.float64)
    counts = np.bincount(codes, minlength=len(labels) + 1)
    value = np.bincount(codes, reward, len(labels) + 1) / np.maximum(counts, 1)
    chosen = codes[_subsets(n, k, seed)]
    rows = np.arange(len(chosen))[:, None] * len(counts)
    votes = np.bincount((rows + chosen).ravel(), minlength=len(chosen) * len(counts))
    votes = votes.reshape(len(chosen), len(counts))
    votes[:, 0] = votes[:, 1:].sum(1) == 0  # elected where nobody votes
    winners = votes == votes.max(1, keepdims=True)
    return float(((winners * value).sum(1) / winners.sum(1)).mean())


def bootstrap(values: np.ndarray, seed: int | Sequence[int] = 0) -> tuple[np.ndarray, np.ndarray]:
    """Column means of values [P, S] over prompts, NaN left out: (means [S], resampled [R, S]).

    One set of R = `RESAMPLES` resamples of the P prompts serves all S statistics; a resample with
    none of a statistic's prompts is NaN there. Deterministic in `seed`.
    """
    prompts, width = values.shape
    if prompts == 0:
        return np.full(width, math.nan), np.full((RESAMPLES, width), math.nan)
    valid = ~np.isnan(values)
    count = valid.sum(0)
    means = np.divide(
        np.where(valid, values, 0).sum(0), count, out=np.full(width, math.nan), where=count > 0
    )
    # About the mean, so that equal values have an interval of no width at all; and a mean of values
    # is never outside them, whatever rounding says.
    centred = np.where(valid, values - means, 0)
    least = np.where(valid, values, math.inf).min(0)
    most = np.where(valid, values, -math.inf).max(0)
    rng = np.random.default_rng(seed)
    parts = []
    size = max(1, BLOCK // prompts)
    for begin in range(0, RESAMPLES, size):
        rows = min(size, RESAMPLES - begin)
        draws = rng.integers(prompts, size=(rows, prompts))
        draws += np.arange(rows)[:, None] * prompts
        times = np.bincount(draws.ravel(), minlength=rows * prompts).reshape(rows, prompts)
        drawn = times @ valid.astype(np.float64)
        parts.append(
            np.divide(times @ centred, drawn, out=np.full((rows, width), math.nan), where=drawn > 0)
        )
    return means, np.clip(means + np.concatenate(parts), least, most)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _interval(mean: float, resampled: np.ndarray) -> dict[str, float | None]:
    """Mean and the middle 95% of its resamples; None where there is nothing."""
    drawn = resampled[~np.isnan(resampled)]
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn.size else (math.nan, math.nan)
    return {"mean": _number(mean), "low": _number(low), "high": _number(high)}


def describe(
    outcomes: Sequence[Outcome],
    *,
    success: float = 1.0,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that is known of an evaluation, as JSON can hold it (None = nothing to say it
    from).

    `overall`, and `domains` (name -> the same; {} where no prompt has one), each with prompts,
    samples, lost, lost_prompts (without a scored sample); mean, low, high: avg@k and its 95%
    bootstrap interval over prompts; std between a prompt's samples; `pass` and `majority`
    (k -> mean, low, high, prompts; None without answers); length (mean, p50, p90, max tokens);
    truncated, empty, answered (shares of all samples); solved (never, sometimes, always: shares of
    the scored prompts). A sample succeeds with a reward of at least `success`.
    `blended`: the weighted mean of the domains' means, equal weights unless `weights` gives some
    (a domain that it does not name counts 0); without domains the overall mean.

    ValueError for a success that is not finite, and for weights that are negative, not finite, all
    0, or of a domain that is not there.
    """
    if not math.isfinite(success):
        raise ValueError(f"success={success}: expected a finite number")
    ks = powers(max((len(o.rewards) for o in outcomes), default=1))
    overall, _ = _table(outcomes, ks, success, seed, seed)
    found: dict[str, Any] = {
        "success": float(success),
        "ks": ks,
        "subsets": SUBSETS,
        "resamples": RESAMPLES,
        "overall": overall,
        "domains": {},
    }
    names = list(dict.fromkeys(o.domain for o in outcomes))
    if names in ([], [""]):
        names = []
    means: dict[str, tuple[float, np.ndarray]] = {}
    for name in names:
        own = [o for o in outcomes if o.domain == name]
        # Seeded by its name: a domain's interval does not depend on the others', nor is it drawn
        # in step with theirs.
        table, drawn = _table(own, ks, success, seed, [seed, zlib.crc32(name.encode())])
        found["domains"][name] = table
        means[name] = (math.nan if table["mean"] is None else table["mean"], drawn)
    share = _shares(names, weights)
    if not means:
        found["blended"] = {**{k: overall[k] for k in ("mean", "low", "high")}, "weights": {}}
        return found
    used = {name: weight for name, weight in share.items() if weight}
    mean = sum(weight * means[name][0] for name, weight in used.items())
    total = sum((weight * means[name][1] for name, weight in used.items()), np.zeros(RESAMPLES))
    found["blended"] = {**_interval(mean, total), "weights": share}
    return found


def _shares(names: Sequence[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Weights that sum to 1, in the order of the domains."""
    if not weights:
        return dict.fromkeys(names, 1 / len(names)) if names else {}
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"weights[{name!r}]: the domains are {', '.join(names) or 'none'}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights[{name!r}]={weight}: expected a finite number >= 0")
    total = sum(weights.values())
    if total == 0:
        raise ValueError(f"weights={dict(weights)}: every weight is 0")
    return {name: weights.get(name, 0.0) / total for name in names}


def _table(
    outcomes: Sequence[Outcome],
    ks: Sequence[int],
    success: float,
    seed: int,
    draw_seed: int | Sequence[int],
) -> tuple[dict[str, Any], np.ndarray]:
    """The statistics of some prompts, and the resamples [R] of their mean."""
    every = [np.asarray(o.rewards, dtype=np.float64) for o in outcomes]
    kept = [(o, ~np.isnan(r)) for o, r in zip(outcomes, every, strict=True)]
    scored = [r[mask] for r, (_, mask) in zip(every, kept, strict=True)]
    n = np.array([len(r) for r in scored], dtype=np.int64)
    least = [success * o.scale for o in outcomes]
    c = np.array([(r >= x).sum() for r, x in zip(scored, least, strict=True)], dtype=np.int64)
    here = n > 0
    columns = [np.array([r.mean() if len(r) else math.nan for r in scored])]
    columns += [pass_at_k(n, c, k) for k in ks]
    told = any(o.answers is not None for o in outcomes)
    if told:
        voters = [_voters(o, mask) for o, mask in kept]
        columns += [np.array([maj_at_k(a, r, k, seed) for a, r in voters]) for k in ks]
    # Only prompts with a score take part: the others would thin the resamples and say nothing.
    values = np.stack(columns, 1).astype(np.float64)[here]
    means, resampled = bootstrap(values, draw_seed)

    def column(i: int) -> dict[str, Any]:
        held = int((~np.isnan(values[:, i])).sum())
        return {**_interval(means[i], resampled[:, i]), "prompts": held}

    spread = [r.var(ddof=1) for r in scored if len(r) > 1]
    first = 1 + len(ks)
    lengths = np.array([x for o in outcomes for x in o.lengths], dtype=np.float64)
    samples = sum(map(len, every))
    return {
        "prompts": int(here.sum()),
        "samples": int(n.sum()),
        "lost": samples - int(n.sum()),
        "lost_prompts": int((~here).sum()),
        **_interval(means[0], resampled[:, 0]),
        "std": math.sqrt(float(np.mean(spread))) if spread else None,
        "pass": {str(k): column(1 + i) for i, k in enumerate(ks)},
        "majority": {str(k): column(first + i) for i, k in enumerate(ks)}
        if told and not np.isnan(values[:, first:]).all()
        else None,
        "length": {
            "mean": float(lengths.mean()),
            "p50": float(np.quantile(lengths, 0.5)),
            "p90": float(np.quantile(lengths, 0.9)),
            "max": int(lengths.max()),
        }
        if lengths.size
        else None,
        "truncated": _share([x for o in outcomes for x in o.truncated]),
        "empty": _share([x for o in outcomes for x in o.empty]),
        "answered": _share(
            [a is not None for o in outcomes for a, lost in _answers(o) if not lost]
        ),
        "solved": {
            "never": _share((c[here] == 0).tolist()),
            "sometimes": _share(((c[here] > 0) & (c[here] < n[here])).tolist()),
            "always": _share((c[here] == n[here]).tolist()),
        },
    }, resampled[:, 0]


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if len(flags) else None


def _voters(outcome: Outcome, scored: np.ndarray) -> tuple[list[str | None], list[float]]:
    """(answers, rewards) of the samples that were scored and whose answer, or lack of one, is
    known."""
    triples = zip(_answers(outcome), outcome.rewards, scored, strict=False)  # no answers: none
    used = [(answer, reward) for (answer, lost), reward, ok in triples if ok and not lost]
    return [answer for answer, _ in used], [reward for _, reward in used]


def _answers(outcome: Outcome) -> list[tuple[str | None, bool]]:
    """(answer, whether it could not be told) of every sample; [] where the task does not say."""
    answers = outcome.answers or []
    return list(zip(answers, outcome.unread or [False] * len(answers), strict=True))
