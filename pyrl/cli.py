"""The command line: `pyrl train`, `eval`, `report`, `puzzles`, `certify`, `repro`, `bench`, `env`.

Every value of a recipe is a flag, `--section.key VALUE`; both go through `pyrl.trainer.recipe`.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from pyrl.trainer import recipe
from pyrl.trainer.config import Config, flags

INTERRUPTED = 130  # as a shell reports a program that SIGINT ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 1 (it failed), 2 (bad input), 130 (Ctrl-C)."""
    # transformers imports torchao where it is installed, which warns of GPU kernels on a CPU.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    argv, options = _prepared(sys.argv[1:] if argv is None else argv)
    args, rest = _parser().parse_known_args(argv)
    for key, value in options.items():
        setattr(args, key, value)
    try:
        if rest:
            raise recipe.ConfigError(_unknown(rest[0], args.command))
        for key, value in options.items():
            if value is None:
                raise recipe.ConfigError(f"--{key}: expected a value")
        return int(args.run_command(args))
    except ValueError as error:  # ConfigError included: the user's input, named in the message
        print(f"pyrl {args.command}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not type(error).__module__.startswith("pyrl."):
            raise  # not one of ours: the traceback is what helps
        print(f"pyrl {args.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that may not be written, ...
        print(f"pyrl {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("aborted", file=sys.stderr)
        return INTERRUPTED


def train(args: argparse.Namespace) -> int:
    """`pyrl train RECIPE`"""
    source, folder = args.recipe, args.run
    if source is None:
        if folder is None or not args.resume:
            raise recipe.ConfigError("give a RECIPE.toml, or --run FOLDER --resume")
        source = folder / "config.toml"
    config = recipe.load(source, _overrides(args))
    if folder is None:
        folder = _run_folder(Path(config.tracking.folder), source.stem, args.resume)
    from pyrl.trainer.loop import train as run

    result = run(config, folder, resume=args.resume)
    return INTERRUPTED if "interrupted" in result else int("unsaved" in result)


def evaluate(args: argparse.Namespace) -> int:
    """`pyrl eval MODEL`: 1 when no completion could be scored."""
    overrides = _overrides(args) | {"train.steps": "0", "model.name": repr(args.model)}
    if args.task:
        overrides["task.name"] = repr(args.task)
    for key in ("prompts", "samples"):
        if getattr(args, key) is not None:
            overrides[f"eval.{key}"] = str(getattr(args, key))
    config = recipe.load(args.recipe, overrides)
    import io
    import json
    import math

    from rich.console import Console

    from pyrl.trainer.evaluation_page import as_json, write_evaluation
    from pyrl.trainer.evaluation_run import print_evaluation, remarks, run_evaluation

    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)  # not after the work
    progress = Console(stderr=True)  # standard output is for the result
    with progress.status("starting") as status:  # draws on a terminal only
        found, conditions = run_evaluation(config, lambda name: status.update(f"{name} …"))
    if args.json:
        print(json.dumps(as_json(found, conditions)))
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a log that cannot hold a dash gets a "?"
        print_evaluation(Console(highlight=False), found, conditions)
    if args.out is not None:
        page = write_evaluation(args.out, found, conditions)
        print(page, file=sys.stderr if args.json else sys.stdout)
    if math.isnan(found.result["mean"]):
        print(f"pyrl eval: {'; '.join(remarks(found))}", file=sys.stderr)
        return 1
    return 0


def report(args: argparse.Namespace) -> int:
    """`pyrl report RUN`"""
    if not args.run.is_dir():
        raise recipe.ConfigError(f"{args.run}: no such run folder")
    from pyrl.trainer.report import write_report

    print(write_report(args.run))
    return 0


def environment(args: argparse.Namespace) -> int:
    """`pyrl env`"""
    from pyrl import env_report

    env_report.main()
    return 0


def certificate(args: argparse.Namespace) -> int:
    """`pyrl certify`"""
    import torch

    if not torch.cuda.is_available():
        # Triton's kernels then run in its interpreter: right or wrong is the same.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from pyrl.certify import report
    from pyrl.certify.run import certify

    found = certify(quick=args.quick)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(report.markdown(found))
    for failure in found.failures:
        print(f"FAILED {failure}")
    print(f"{len(found.rows)} rows, {len(found.failures)} failures: {args.out}")
    return 1 if found.failures else 0


def reproductions(args: argparse.Namespace) -> int:
    """`pyrl repro`"""
    from pyrl.repro.run import reproduce

    # A quick run shows nothing and must not replace results that do.
    out = args.out or (None if args.quick else Path("docs"))
    reproduce(args.names, seeds=args.seeds, quick=args.quick, out=out)
    return 0


def benchmarks(args: argparse.Namespace) -> int:
    """`pyrl bench`: benchmarks/run.py of the checkout that this package runs from."""
    import subprocess

    script = Path(__file__).resolve().parents[1] / "benchmarks" / "run.py"
    if not script.exists():
        raise recipe.ConfigError(
            f"no {script}: benchmarks are not part of an installed wheel. Get the sources, "
            "`pip install -e '.[bench]'` there, then `pyrl bench` or `make bench`"
        )
    given: list[str] = []
    for name in ("only", "rounds", "out"):
        if getattr(args, name) is not None:
            given += [f"--{name}", str(getattr(args, name))]
    given += [f"--{name}" for name in ("quick", "all", "static") if getattr(args, name)]
    if args.implementations:
        given += ["--implementations", *args.implementations]
    return subprocess.run([sys.executable, str(script), *given], check=False).returncode


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="pyrl",
        description="Reinforcement learning of language models through fused losses.",
        epilog="`pyrl COMMAND --help` lists every flag of a command.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Any, summary: str, usage: str = "", more: str = ""
    ) -> argparse.ArgumentParser:
        found = commands.add_parser(
            name,
            usage=f"pyrl {name} {usage}".strip(),
            help=summary,
            description=f"{summary}\n\n{more}".strip(),
            formatter_class=style,
            allow_abbrev=False,
        )
        found.set_defaults(run_command=run)
        return found

    one = command(
        "train",
        train,
        "Train a model by a recipe.",
        "RECIPE.toml [--run DIR] [--resume] [--section.key VALUE ...]",
        "Leaves a run folder: config.toml, metrics.jsonl, samples.jsonl, checkpoints/, model/,\n"
        "summary.json, curves.png, report.html. Ctrl-C finishes the step, saves and stops.\n"
        "Values are written as in TOML: --optimizer.lr 1e-5 --tracking.sinks '[\"tensorboard\"]'\n"
        '--task.options.NAME VALUE; "none" unsets one.',
    )
    one.add_argument("recipe", nargs="?", type=Path, help="TOML file (with --resume: optional)")
    one.add_argument("--run", type=Path, help="run folder (default: made in tracking.folder)")
    one.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    _add_flags(one)

    one = command(
        "eval",
        evaluate,
        "Score a model on a task's held-out prompts.",
        "MODEL [--task NAME] [--recipe RECIPE.toml] [--json] [--out DIR] [--section.key VALUE ...]",
        "Prints avg@k, pass@k, maj@k with 95% intervals, lengths and format, a row a domain.\n"
        "With the --recipe of a run, RUN/config.toml, the numbers are those of its own evaluation.",
    )
    one.add_argument("model", help="Hugging Face id or folder, for example RUN/model")
    one.add_argument("--task", help="same as --task.name")
    one.add_argument("--prompts", type=int, help="same as --eval.prompts")
    one.add_argument("--samples", type=int, help="same as --eval.samples")
    one.add_argument("--recipe", type=Path, help="recipe to take everything else from")
    one.add_argument("--json", action="store_true", help="print one JSON object")
    one.add_argument("--out", type=Path, help="folder for eval.json, eval.html, samples.jsonl")
    _add_flags(one)

    one = command("report", report, "Write curves.png and report.html of a run again.", "RUN")
    one.add_argument("run", type=Path, help="run folder")

    one = command(
        "certify",
        certificate,
        "Measure every loss on every backend against float64; write docs/parity.md.",
        "[--out FILE] [--quick]",
        "Exit status 1 when a row breaks the bound that the document states.",
    )
    one.add_argument("--out", type=Path, default=Path("docs/parity.md"), help="the document")
    one.add_argument("--quick", action="store_true", help="a few rows of each kind")

    from pyrl.tasks.temporal_clue import command as puzzles

    one = command("puzzles", puzzles.run, puzzles.SUMMARY, puzzles.USAGE, puzzles.MORE)
    puzzles.add_arguments(one)

    from pyrl.repro.registry import MINIATURES

    names = "\n".join(f"  {name:<17} {each.summary}" for name, each in MINIATURES.items())
    one = command(
        "repro",
        reproductions,
        "Run miniatures of published claims; write docs/reproductions.md.",
        "[NAME ... | all] [--seeds N] [--quick] [--out DIR]",
        "Prints each claim as published, ours with seeds and intervals, and the verdict: agrees,\n"
        f"disagrees or undecided. Without a name: the document again, from the results kept.\n\n"
        f"{names}",
    )
    one.add_argument("names", nargs="*", metavar="NAME", help="miniatures, or all")
    one.add_argument("--seeds", type=int, help="instead of each miniature's own number")
    one.add_argument("--quick", action="store_true", help="tiny sizes: only that the code runs")
    one.add_argument(
        "--out", type=Path, help="folder of the document (default: docs; with --quick: none)"
    )

    one = command(
        "bench",
        benchmarks,
        "Time the ops and the trainer beside their peers; write benchmarks/RESULTS.md.",
        "[--only NAME [--implementations NAME ...]] [--quick] [--all] [--static]\n"
        "                  [--rounds N] [--out DIR]",
        "From a checkout: starts benchmarks/run.py, as `make bench` does. The whole takes under\n"
        "20 minutes on 2 cores; Ctrl-C keeps what is finished.",
    )
    one.add_argument(
        "--only",
        metavar="NAME",
        help="linear_policy_loss, logits_policy_loss, small_ops, packing, shared_prefix, "
        "trainer_step, memory, or report (RESULTS.md again, no timing)",
    )
    one.add_argument("--quick", action="store_true", help="seconds; proves the machinery only")
    one.add_argument("--all", action="store_true", help="every cell and more rounds: hours")
    one.add_argument("--static", action="store_true", help="GPU kernels, compiled and counted")
    one.add_argument("--rounds", type=int, help="instead of each benchmark's own number")
    one.add_argument("--implementations", nargs="+", metavar="NAME", help="with --only: these rows")
    one.add_argument("--out", type=Path, help="folder of the result files and of their report")

    command("env", environment, "Print versions, devices, backends and why any is absent.")
    return parser


def _add_flags(parser: argparse.ArgumentParser) -> None:
    groups: dict[str, Any] = {}
    for key, field in flags():
        section = key.split(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"[{section}]")
        text = " ".join((field.description or "").split())
        groups[section].add_argument(
            f"--{key}",
            dest=key,
            metavar=_metavar(field),
            # argparse formats help with %, and a missing flag must not hide the recipe's value.
            help=f"{text} (default: {_default(field)})".replace("%", "%%"),
            default=argparse.SUPPRESS,
        )


def _metavar(field: FieldInfo) -> str:
    inner = [hint for hint in typing.get_args(field.annotation) if hint is not type(None)]
    choices = [a for hint in (field.annotation, *inner)
               for a in typing.get_args(hint) if isinstance(a, str)]  # fmt: skip
    if choices:
        return "{" + ",".join(dict.fromkeys(choices)) + "}"
    hint: Any = field.annotation
    if type(None) in typing.get_args(hint):
        hint = typing.get_args(inner[0])[0] if typing.get_args(inner[0]) else inner[0]
    return str(getattr(hint, "__name__", "value")).upper()


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else str(value)


def _overrides(args: argparse.Namespace) -> dict[str, str]:
    return {key: value for key, value in vars(args).items() if "." in key}


def _prepared(argv: Sequence[str]) -> tuple[list[str], dict[str, str | None]]:
    """What argparse can read, and what it cannot: `--task.options.NAME VALUE`, whose names a task
    makes up. A value that is a negative number is tied to its flag: argparse takes -1e-3 for one.
    """
    rest: list[str] = []
    found: dict[str, str | None] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith(("--task.options.", "--rollout.options.")):
            found[key] = value if equals else words.pop(0) if words else None
        elif word.startswith("--") and "." in key and not equals and _negative(words[:1]):
            rest.append(f"{word}={words.pop(0)}")
        else:
            rest.append(word)
    return rest, found


def _negative(words: Sequence[str]) -> bool:
    try:
        return bool(words) and words[0].startswith("-") and float(words[0]) is not None
    except ValueError:
        return False


def _run_folder(parent: Path, name: str, resume: bool) -> Path:
    if not resume:
        return parent / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    found = sorted(path for path in parent.glob(f"{name}-*") if (path / "config.toml").exists())
    if not found:
        raise recipe.ConfigError(f"nothing to resume: no run {name}-* in {parent}")
    return found[-1]


def _unknown(argument: str, command: str) -> str:
    if not argument.startswith("--"):
        return f"unexpected argument {argument!r}"
    key = argument[2:].split("=")[0]
    section = key.split(".")[0]
    if command in ("train", "eval") and "." in key:
        if section in Config.model_fields:
            return recipe.unknown_key(key, f"--{key}")
        known = list(Config.model_fields)
    else:
        known = ["run", "resume", *(name for name, _ in flags())] if command == "train" else []
    close = difflib.get_close_matches(section if "." in key else key, known, n=1)
    guess = f" (did you mean --{close[0]}?)" if close else ""
    return f"unknown flag {argument!r}{guess}; `pyrl {command} --help` lists all"


if __name__ == "__main__":
    sys.exit(main())
