"""A run around its loop: folder, checkpoints, evaluation, what is logged, how it ends."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pyrl.algorithms import Budget, Credit, Group, Place
from pyrl.packing import PackedBatch
from pyrl.trainer.checkpoint import FORMAT, CheckpointError, Checkpoints, write_aside
from pyrl.trainer.config import Config
from pyrl.trainer.console import Console
from pyrl.trainer.course import Course
from pyrl.trainer.data import derive_seed
from pyrl.trainer.evaluate import evaluate, heldout_metrics, sample_rows
from pyrl.trainer.interrupt import StopRequest
from pyrl.trainer.metrics import STEP_PHASES, Clock, peak_rss_mib
from pyrl.trainer.optimizer import MasterAdamW
from pyrl.trainer.packing_view import describe
from pyrl.trainer.recipe import ConfigError
from pyrl.trainer.report import write_report
from pyrl.trainer.resume import Progress, recover, restore
from pyrl.trainer.setting import Setting
from pyrl.trainer.setup import Parts, prepare
from pyrl.trainer.sinks import Sink, check_sinks, make_sinks
from pyrl.trainer.tracking import RunFolder, provenance

#: Steps in a row without a single score after which a run stops: its task is broken.
LOST_STEPS = 3


class UnscoredError(RuntimeError):
    """No completion of the last `LOST_STEPS` steps could be scored; the message says why."""


@dataclasses.dataclass
class Session:
    """Everything that is alive while a run is; made by `Session.open`."""

    config: Config
    folder: RunFolder
    console: Console
    stop: StopRequest
    checkpoints: Checkpoints
    parts: Parts
    optimizer: MasterAdamW
    progress: Progress
    sinks: list[Sink]
    clock: Clock
    checkpointed: int
    """Last step that a checkpoint holds."""
    course: Course
    """Stage, budget, credit, reference."""
    last_kl: float | None = None
    """Of the step that was logged last."""
    refused: int = -1
    """Last step whose checkpoint the disk refused."""
    lost_steps: int = 0
    """Steps in a row, up to the last one, in which every completion was lost."""
    lost_reason: str = ""
    """Why, in the words of one of them."""
    last_evaluation: dict[str, Any] | None = None
    """Details of the held-out evaluation that the last step ended with, if it did
    (see `evaluation_stats.describe`)."""

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, config: Config, path: Path, *, resume: bool, console: Console | None
    ) -> Iterator[Session]:
        """Checks and loads everything; on leaving, closes it whatever happened."""
        if resume and not (path / "config.toml").exists():
            raise ConfigError(f"{path} holds no run to go on with (no config.toml): leave --resume "
                              "out to start one there")  # fmt: skip
        if not resume and (path / "config.toml").exists():
            raise ConfigError(f"{path} already holds a run: add --resume to go on with it, or "
                              "choose another folder with --run")  # fmt: skip
        with contextlib.ExitStack() as stack:
            console = stack.enter_context(console or Console(config.train.steps))
            stop = stack.enter_context(StopRequest(console.message))
            folder = RunFolder(path, console.message)
            checkpoints = Checkpoints(folder.checkpoints_path, config.train.keep_checkpoints)
            saved = recover(folder, checkpoints, config, console.message) if resume else None
            try:
                check_sinks(config.tracking.sinks)
            except ModuleNotFoundError as error:
                raise ConfigError(f"tracking.sinks: {error}") from None
            parts = prepare(config)
            stack.callback(parts.close)
            optimizer = MasterAdamW(parts.policy.model, config.optimizer)
            progress = restore(saved, optimizer) if saved is not None else Progress()
            resume_step = progress.step if saved is not None else None
            course = Course.begin(config, parts, progress.step + 1)
            if saved is not None:
                course.load_state_dict(saved["parts"])
            del saved  # as large as the model and its moments
            folder.make()  # not earlier: a start that fails leaves nothing behind
            stack.callback(folder.close)
            if resume_step is not None:
                console.message(f"resuming after step {resume_step}")
                folder.truncate_after(resume_step)
            elif resume:
                kept = folder.set_aside()
                old = f"; what was recorded is kept in {' and '.join(kept)}" if kept else ""
                console.message(f"no checkpoint in {path} yet: starting from the first step{old}")
            folder.write_config(config.to_toml())
            sinks = make_sinks(
                config.tracking.sinks, folder, resume_step=resume_step, tell=console.message
            )
            for sink in sinks:
                stack.callback(sink.close)

            def on_phase(name: str) -> None:
                stop.announce()
                console.phase(name)

            at = -1 if resume_step is None else resume_step
            yield cls(config, folder, console, stop, checkpoints, parts, optimizer, progress,
                      sinks, Clock(on_phase), at, course)  # fmt: skip

    def begin(self) -> None:
        """Headline, notes, and the evaluation before the first step."""
        config, spec, policy = self.config, self.setting.spec, self.parts.policy
        self.console.banner(
            {
                "model": f"{config.model.name} ({config.model.dtype})",
                "parameters": f"{sum(p.numel() for p in policy.model.parameters()):,}"
                + (f" ({self.optimizer.trained:,} trained)" if policy.has_adapters else ""),
                "task": f"{config.task.name} ({len(self.parts.prompts):,} prompts)",
                "rollout": f"{config.rollout.engine}, {config.rollout.prompts_per_step} prompts x "
                f"{config.rollout.n} completions x {config.rollout.max_new_tokens} tokens",
                "loss": f"{config.loss.preset}: {spec.objective}, {spec.aggregation}"
                + (f", {spec.kl} x {spec.kl_coef}" if spec.needs_ref else ""),
                **self.course.facts(),
                "packing": "off, a sample a row"
                if config.train.packing == "off"
                else f"{config.train.packing}, rows of {config.train.tokens_per_row:,} tokens",
                "optimizer": f"AdamW, lr {config.optimizer.lr} {config.optimizer.schedule}",
                "seed": config.train.seed,
                "run": self.folder.path,
            }
        )
        for text in config.warnings():
            self.console.message(f"note: {text}")
        if self.progress.step == 0 and self.progress.heldout_before is None:
            self.progress.heldout_before = self.heldout("before")
        self._take_clock()  # what came before is no step's time

    @property
    def setting(self) -> Setting:
        """What the current step goes by."""
        return self.course.setting

    @property
    def budget(self) -> Budget:
        """How many completions each prompt gets."""
        return self.course.budget

    @property
    def credit(self) -> Credit:
        """What a step's rewards make its tokens worth."""
        return self.course.credit

    def take(self, count: int) -> list[Place]:
        """The places of the next `count` prompts, by the weights of the mixture."""
        mix = self.setting.config.task.mix
        weights = {domain: part.weight for domain, part in mix.items()}
        return self.parts.prompts.take(self.progress.drawn, count, weights)

    def enter_step(self) -> None:
        """Before a step: the stage that it is in, with the reset that it may begin with."""
        stage = self.course.enter(self.progress.step + 1)
        self.optimizer.max_grad_norm = self.setting.config.optimizer.max_grad_norm
        if stage is not None:
            name = stage.name or f"{self.course.stage + 1} of {len(self.config.stages)}"
            self.console.message(f"stage {name}: steps {self.progress.step + 1} to "
                                 f"{self.progress.step + stage.steps}")  # fmt: skip
            if stage.reset:
                self.reset_reference("the stage begins with one")

    def reset_if_due(self) -> None:
        """After a step: the reference becomes the policy where `[reset]` says so."""
        step = self.progress.step
        found = self.last_evaluation
        validation = None if found is None else found["blended"]["mean"]
        reason = self.course.reason_to_reset(step, validation, self.last_kl)
        if reason is not None:
            self.reset_reference(reason)

    def reset_reference(self, reason: str) -> None:
        """The reference becomes the policy, and AdamW starts anew if `reset.optimizer` says so."""
        optimizer = self.config.reset.optimizer
        if self.parts.reference is not None:
            self.parts.reference.reset(self.parts.policy)
        if optimizer:
            self.optimizer.reset()
        self.course.rule.restart(self.progress.step)
        self.progress.resets += 1
        self.progress.reset_step = self.progress.step
        what = ["reference"] * (self.parts.reference is not None) + ["optimizer"] * optimizer
        self.console.message(
            f"after step {self.progress.step}: {' and '.join(what) or 'nothing to'} reset, {reason}"
        )

    def goes_on(self) -> bool:
        """Whether there is another step to do."""
        self.stop.announce()
        return self.progress.step < self.config.train.steps and not self.stop.requested

    def heldout(self, label: str) -> dict[str, float] | None:
        """Evaluates on the held-out prompts, with the same noise every time; None without any."""
        if not self.parts.heldout:
            return None
        with self.clock("evaluate"):
            found = evaluate(
                self.parts.engine,
                self.parts.scorer,
                self.parts.policy.tokenizer,
                self.parts.heldout,
                self.parts.heldout_params,
                seed=derive_seed(self.config.train.seed, 0, "held-out"),
                success=self.config.eval.success,
                weights=self.config.reset.blend or None,
                scales=self.config.task.scales,
            )
        self.last_evaluation = found.details
        step = self.progress.step
        self.folder.append_evaluation({"step": step, "label": label, "details": found.details})
        self.console.evaluation(label, found.result, found.details)
        if label in ("before", "after"):
            rows = sample_rows(found.groups, step, label, len(found.groups))
            self.folder.append_samples(rows)
        return found.result

    def keep_packing(self, step: int, rows: Sequence[PackedBatch]) -> None:
        """packing.json, for the report: what packing made of the step's samples."""
        if rows:
            self.folder.write_packing({"step": step, **describe(rows)})

    def log(self, metrics: dict[str, Any], sampled: Sequence[Group], seconds: float) -> None:
        """A finished step: times, memory, periodic evaluation; then everywhere metrics go."""
        config, now = self.config, self.progress
        spent = self._take_clock()
        metrics["tokens_per_second"] = metrics["sampled_tokens"] / seconds
        metrics["seconds"] = seconds
        metrics |= {f"seconds_{phase}": spent[phase] for phase in STEP_PHASES}
        metrics["peak_rss_mib"] = peak_rss_mib()
        now.step = metrics["step"]
        now.seconds += seconds
        now.sampled_tokens += metrics["sampled_tokens"]
        now.samples += metrics["samples"]
        metrics["samples_total"] = now.samples
        if self.parts.reference is not None:
            metrics["reference_age"] = now.step - 1 - now.reset_step
            metrics["reference_resets"] = now.resets
        now.peak_rss_mib = max(now.peak_rss_mib, metrics["peak_rss_mib"])
        self.last_kl, self.last_evaluation = metrics.get("kl"), None
        every = config.eval.every
        due = every and now.step % every == 0 and now.step < config.train.steps
        if due and self.heldout(f"step {now.step}") and self.last_evaluation:
            metrics |= heldout_metrics(self.last_evaluation)
        rows = sample_rows(sampled, now.step, "train", config.tracking.samples_per_step)
        self.folder.append_samples(rows)
        self.folder.append_metrics(metrics)
        for sink in self.sinks:
            sink.log(now.step, metrics)
        self.console.step(metrics)
        attempts = [attempt for group in sampled for attempt in group.attempts]
        if metrics["nan_rewards"] < len(attempts):
            self.lost_steps = 0
        else:
            self.lost_steps += 1
            self.lost_reason = next((a.error for a in attempts if a.error), "unknown")

    def checkpoint(self, due: bool | None = None) -> None:
        """Saves when due (by default: every `train.checkpoint_every` steps).

        A disk that refuses costs this checkpoint, never the run or the checkpoint before.
        """
        step, every = self.progress.step, self.config.train.checkpoint_every
        if due is None:
            due = every > 0 and step % every == 0
        if not due or step == self.checkpointed:
            return
        state = {
            "format": FORMAT,
            "identity": self.config.identity(),
            "progress": dataclasses.asdict(self.progress),
            "optimizer": self.optimizer.state_dict(),
            "parts": self.course.state_dict(self.progress.resets),
        }
        try:
            with self.clock("checkpoint"):
                self.checkpoints.save(step, state)
        except CheckpointError as error:
            if step != self.refused:  # said once, however often it is tried
                self.console.message(f"warning: {error}; training goes on")
            self.refused = step
        else:
            self.checkpointed = step

    def stop_if_nothing_scores(self) -> None:
        """UnscoredError, with a checkpoint, once `LOST_STEPS` steps in a row were lost whole."""
        if self.lost_steps < LOST_STEPS:
            return
        self.checkpoint(due=True)
        raise UnscoredError(
            f"no completion of the last {LOST_STEPS} steps could be scored (last reason: "
            f"{self.lost_reason}). Mend the task; --run {self.folder.path} --resume then goes on "
            f"after step {max(self.checkpointed, 0)}"
        )

    def finish(self) -> dict[str, Any]:
        """After the last step: checkpoint, evaluation, model, summary, report.

        After Ctrl-C only the checkpoint; returns {"interrupted": step} then, else the summary,
        with "unsaved" when the disk took neither checkpoint nor model.
        """
        now, config = self.progress, self.config
        self.checkpoint(due=True)
        if self.stop.requested:
            kept = self.checkpoints.latest()
            source = kept.name if kept else "the start"
            self.console.message(
                f"stopped after step {now.step}; to go on from {source}: "
                f"pyrl train {self.folder.config_path} --run {self.folder.path} --resume"
            )
            return {"interrupted": now.step}
        # Without a step nothing has changed, and a second evaluation would say the same.
        after = self.heldout("after") if now.step else now.heldout_before
        self._take_clock()
        summary: dict[str, Any] = {
            "model": config.model.name,
            "task": config.task.name,
            "seed": config.train.seed,
            "heldout_before": now.heldout_before,
            "heldout_after": after,
            "steps": now.step,
            "seconds": now.seconds,
            "seconds_by_phase": now.seconds_by_phase,
            "samples": now.samples,
            "tokens_per_second": now.sampled_tokens / now.seconds if now.seconds else None,
            "peak_rss_mib": max(now.peak_rss_mib, peak_rss_mib()),
            "run": str(self.folder.path),
            **provenance(),
        }
        if config.train.save_model:
            with self._tolerant("the final model"):
                write_aside(self.folder.model_path, lambda path: self.parts.policy.save(str(path)))
                summary["model_path"] = str(self.folder.model_path)
        self.checkpoint(due=True)  # once more, if it was refused before the evaluation
        if self.checkpointed != now.step and "model_path" not in summary:
            summary["unsaved"] = True
            self.console.message(
                f"warning: the weights after step {now.step} are saved nowhere: make room, and "
                "--resume repeats the steps since the last checkpoint"
            )
        self.folder.flush()
        with self._tolerant("summary.json"):
            self.folder.write_summary(summary)
        with self._tolerant("the report"):
            summary["report"] = str(write_report(self.folder.path))
        self.console.finish(summary)
        return summary

    @contextlib.contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        """A disk that refuses `what` costs just that."""
        try:
            yield
        except (OSError, SafetensorError) as error:  # safetensors wraps the disk's own errors
            self.console.message(f"warning: {what} could not be written: {error}; "
                                 "--resume tries again from the last checkpoint")  # fmt: skip

    def _take_clock(self) -> dict[str, float]:
        spent = self.clock.take()
        totals = self.progress.seconds_by_phase
        for phase, seconds in spent.items():
            totals[phase] = totals.get(phase, 0.0) + seconds
        return spent
