"""`pyrl eval`: a recipe's held-out evaluation on its own, and what it prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table
from rich.text import Text

from pyrl.trainer import evaluation_views as views
from pyrl.trainer.config import Config
from pyrl.trainer.console import duration, evaluation_text, number
from pyrl.trainer.data import derive_seed
from pyrl.trainer.evaluate import Evaluation, evaluate
from pyrl.trainer.html import safe_text


def run_evaluation(
    config: Config, on_phase: Callable[[str], None] = lambda name: None
) -> tuple[Evaluation, dict[str, Any]]:
    """The evaluation that training with `config` begins with, and its conditions.

    ValueError as `prepare`; for eval.prompts = 0 too. on_phase hears load, sample and score.
    """
    from pyrl.trainer.setup import prepare

    if config.eval.prompts == 0:
        raise ValueError("eval.prompts = 0: there is nothing to evaluate")
    on_phase("load")
    parts = prepare(config)
    try:
        params = parts.heldout_params
        found = evaluate(
            parts.engine,
            parts.scorer,
            parts.policy.tokenizer,
            parts.heldout,
            params,
            seed=derive_seed(config.train.seed, 0, "held-out"),
            success=config.eval.success,
            weights=config.reset.blend or None,
            scales=config.task.scales,
            on_phase=on_phase,
        )
        tokens = sum(len(a.tokens) for group in found.groups for a in group.attempts)
        conditions = {
            "model": config.model.name,
            "dtype": config.model.dtype,
            "device": str(parts.policy.head().weight.device),
            "task": config.task.name,
            "task_options": config.task.options,
            "prompts": len(found.groups),
            "samples_per_prompt": params.n,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_new_tokens": params.max_new_tokens,
            "seed": config.train.seed,
            "engine": parts.engine.name,
            "sampled_tokens": tokens,
            "seconds": found.seconds["sample"] + found.seconds["score"],
            "seconds_sample": found.seconds["sample"],
            "seconds_score": found.seconds["score"],
            "tokens_per_second": tokens / found.seconds["sample"],
        }
    finally:
        parts.close()
    return found, conditions


def remarks(found: Evaluation) -> list[str]:
    """What the tables leave out, in words; what a task raised is made safe to show."""
    details, overall = found.details, found.details["overall"]
    said = []
    if overall["lost"]:
        said.append(f"samples lost: {overall['lost']:,} (first reason: {details['lost_reason']})")
    if details["answers_absent"]:
        said.append(f"no maj@k: {details['answers_absent']}")
    return [safe_text(text, 400) for text in said]


def print_evaluation(
    console: RichConsole, found: Evaluation, conditions: Mapping[str, Any]
) -> None:
    """The headline, every statistic of the whole, a row a domain, and the conditions."""
    details = found.details
    headline = f"{conditions['model']} on {conditions['task']}, held-out: "
    console.print(Text(headline + evaluation_text(found.result)), soft_wrap=True)
    ks, votes = views.powers_of(details, "pass"), views.powers_of(details, "majority")
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", style="bold")
    table.add_column()
    for name, value, span in views.rows(details["overall"], ks, votes):
        table.add_row(name, value, span)
    console.print(table)
    if details["domains"]:
        console.print(_domains(details, console.width))
        console.print()
    for text in remarks(found):
        console.print(Text(text, style="yellow"), soft_wrap=True)
    c = conditions
    console.print(
        Text(
            f"temperature {c['temperature']:g}, at most {c['max_new_tokens']} tokens, seed "
            f"{c['seed']}, {c['engine']} {c['dtype']} on {c['device']}; {duration(c['seconds'])}, "
            f"{number(c['tokens_per_second'], 0)} tokens/s sampled",
            style="dim",
        ),
        soft_wrap=True,
    )


def _domains(details: Mapping[str, Any], width: int) -> Table:
    """A row a domain; a narrow terminal shows the first columns, which matter most."""
    k = str(details["ks"][-1])
    rows: list[tuple[str, list[str]]] = []
    for _, name, own in views.domain_rows(details):
        mean = [f"{own['prompts']:,}", views.number(own["mean"]), views.span(own)]
        success = [views.number(views.look(own, what, k, "mean")) for what in ("pass", "majority")]
        length = views.number(views.look(own, "length", "mean"), 1)
        rows.append(
            (name, [*mean, *success, length, views.percent(own["truncated"]), f"{own['lost']:,}"])
        )
    blended = details["blended"]
    text = ["", views.number(blended["mean"]), views.span(blended)]
    rows.append(("blended", [*text, *[""] * 5]))
    heads = ["prompts", f"avg@{k}", "95% interval", f"pass@{k}", f"maj@{k}", "tokens", "cut off"]
    heads.append("lost")
    columns = list(zip(heads, zip(*(cells for _, cells in rows), strict=True), strict=True))
    if details["overall"]["majority"] is None:
        del columns[4]
    sizes = [2 + max(map(len, (head, *cells))) for head, cells in columns]
    room = width - min(24, max(len(name) for name, _ in rows))
    while columns and sum(sizes[: len(columns)]) > room:
        columns.pop()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("domain", overflow="fold")
    for head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for i, (name, _) in enumerate(rows):
        table.add_row(Text(name), *(cells[i] for _, cells in columns))
    return table
