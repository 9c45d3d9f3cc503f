"""The training loop: sample → score → advantages → pack → log-probs → update → sync → log."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrl.algorithms import Group, minibatches
from pyrl.packing import PackedBatch, Sample
from pyrl.trainer.config import Config
from pyrl.trainer.console import Console
from pyrl.trainer.data import permutation
from pyrl.trainer.gather import gather
from pyrl.trainer.metrics import batch_metrics, loss_metrics, signal_share
from pyrl.trainer.optimizer import learning_rate
from pyrl.trainer.preflight import preflight
from pyrl.trainer.rows import logprobs, pack_rows, policy_loss
from pyrl.trainer.session import Session


def train(
    config: Config, folder: Path, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Runs `config` in `folder`; returns what summary.json holds, or {"interrupted": step}.

    `resume` goes on from the newest checkpoint in `folder`, to the same numbers as a run that was
    never broken off. ValueError before the first step for anything that cannot work.
    UnscoredError when nothing has been scored for several steps.
    """
    with Session.open(config, folder, resume=resume, console=console) as session:
        preflight(session)
        sync(session, session.progress.step)
        session.begin()
        while session.goes_on():
            session.enter_step()
            train_step(session)
            session.reset_if_due()
            session.checkpoint()
            session.stop_if_nothing_scores()
        return session.finish()


def train_step(session: Session) -> None:
    """One batch: sampled, scored, learned from, logged."""
    parts, clock, setting, credit = session.parts, session.clock, session.setting, session.credit
    policy, spec, config = parts.policy, setting.spec, setting.config
    step, start, backend = session.progress.step + 1, time.perf_counter(), config.train.backend

    # Sample and score, as the budget says.
    gathered = gather(session, step)
    batch = gathered.batch
    terms = setting.add_terms(gathered.sampled, step)

    # Advantages, minibatches (one optimizer update each), rows (one micro-batch each).
    device = policy.head().weight.device
    told = credit.assign(batch)
    minis = minibatches(
        batch,
        spec,
        parts=config.train.updates_per_step,
        order=permutation(config.train.seed, step, "minibatches", len(batch)).tolist(),
        mask_truncated=config.train.mask_truncated,
        whole_groups=credit.whole_groups,
        dense=credit.dense,
    )
    rows = [pack_rows(mini.samples, config.train, device) for mini in minis]
    session.keep_packing(step, [row for part in rows for row in part])

    # Log-probs from before the first update. With a single update the policy is still the one that
    # sampled: the ratio is 1, with gradient, and its forward need not be computed twice.
    on_policy = config.train.updates_per_step * config.train.passes == 1
    needs_ref = spec.needs_ref or credit.needs_ref
    kl_to_step = needs_ref and config.train.reference == "step"
    old: list[list[Tensor | None]] = [[None] * len(part) for part in rows]
    ref: list[list[Tensor | None]] = [[None] * len(part) for part in rows]
    with clock("logprob"):
        if kl_to_step or not on_policy or credit.needs_old:
            old = [[logprobs(policy, row, spec, backend) for row in part] for part in rows]
        if kl_to_step:
            ref = old
        elif needs_ref and parts.reference is not None:
            initial = parts.reference.policy
            ref = [[logprobs(initial, row, spec, backend) for row in part] for part in rows]
        rows = credit.begin(rows)

    # Update. Denominators are those of the whole minibatch, so that the rows' losses just add up.
    lr = learning_rate(step, config.train.steps, config.optimizer)
    losses: list[dict[str, Tensor]] = []
    norms: list[float] = []
    gaps: list[Tensor] = []
    with clock("update"):
        for i, mini in list(enumerate(minis)) * config.train.passes:
            part = credit.reweigh(rows[i], ref[i], lambda row: logprobs(policy, row, spec, backend))
            for row, old_logprob, ref_logprob in zip(part, old[i], ref[i], strict=True):
                out = policy_loss(
                    policy,
                    row,
                    spec,
                    old_logprob=None if on_policy else old_logprob,
                    ref_logprob=ref_logprob if spec.needs_ref else None,
                    denominator=mini.denominator,
                    backend=backend,
                )
                out.loss.backward()
                losses.append(out.metrics)
                if not norms:  # nothing has been updated since sampling
                    gaps.append(rollout_gap(out.logprob, row))
                del out
            if part:
                norms.append(session.optimizer.step(lr))
                credit.learn(rows[i], lr / config.optimizer.lr if config.optimizer.lr else 1.0)
    if not norms:
        session.console.message(f"step {step}: no update, {why_no_gradient(batch, config)}")
    elif not all(map(math.isfinite, norms)):
        session.console.message(f"step {step}: a gradient is not finite, and was not applied")

    canary = sync(session, step)

    metrics: dict[str, Any] = {"step": step, **batch_metrics(gathered)}
    metrics |= loss_metrics(losses, len(norms), spec)
    metrics |= {k: told[k] for k in ("filtered", "pairs") if k in told}
    if not credit.dense:  # else the critic's values decide
        metrics["signal_share"] = signal_share(batch)
    metrics |= terms | credit.metrics() | session.budget.metrics()
    metrics |= {
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        "lr": lr,
        "updates": len(norms),
        "tokens": config.train.passes * sum(row.num_tokens for part in rows for row in part),
        "shared_tokens": config.train.passes
        * sum(row.sample_tokens - row.num_tokens for part in rows for row in part),
        "skipped_tokens": config.train.passes * sum(mini.skipped_tokens for mini in minis),
        "rollout_gap_max": float(torch.stack(gaps).max()) if gaps else None,
        "canary_max_diff": canary,
    }
    session.log(metrics, gathered.sampled, time.perf_counter() - start)


def sync(session: Session, version: int) -> float | None:
    """Gives the engine the new weights, then compares both on the canary; returns its max |Δ|.

    CanaryError when they differ by more than the coarser dtype's rounding.
    """
    parts, backend = session.parts, session.config.train.backend
    # An fp32 engine beside a half-precision trainer follows the fp32 masters, and is held to them.
    exact = parts.engine.dtype == torch.float32
    with session.clock("sync"), session.optimizer.exact(exact):
        parts.engine.sync(parts.policy.named_weights(), version)
        if parts.canary is None:
            return None
        weight = parts.policy.head().weight
        sample = Sample(prompt=parts.canary.prompt, completion=parts.canary.completion)
        (row,) = pack_rows([sample], session.config.train, weight.device)
        plain = dataclasses.replace(session.setting.spec, temperature=1.0)
        ours = logprobs(parts.policy, row, plain, backend)[row.loss_mask].tolist()
        coarser = max(weight.dtype, parts.engine.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return parts.canary.check(parts.engine, ours, coarser)


def rollout_gap(logprob: Tensor | None, row: PackedBatch) -> Tensor:
    """max_t |trainer's log-prob - engine's| over the row's loss tokens: how far from on-policy."""
    assert logprob is not None and row.rollout_logprob is not None
    return (logprob - row.rollout_logprob)[row.loss_mask].abs().max()


def why_no_gradient(groups: Sequence[Group], config: Config) -> str:
    """In words, for the step that had nothing to learn from."""
    attempts = [attempt for group in groups for attempt in group.attempts]
    if all(math.isnan(attempt.reward) for attempt in attempts):
        first = next((a.error for a in attempts if a.error), "unknown")
        return f"because no completion could be scored (first reason: {first})"
    if config.train.mask_truncated and all(a.finish_reason == "length" for a in attempts):
        return "because every completion was truncated and train.mask_truncated is on"
    if all(group.zero_variance for group in groups):
        return (
            "because all rewards are equal inside every group (too easy, too hard, or too few "
            "completions per prompt)"
        )
    return "because no completion that counts has an advantage"
