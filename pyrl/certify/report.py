"""docs/parity.md from a certificate."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import torch

from pyrl.certify.peers.base import AGREES, Comparison
from pyrl.certify.rule import DTYPES, Row
from pyrl.certify.run import BATCHES, Certificate
from pyrl.parity import DEVICE, MARGIN

HEAD = """# Parity certificate

What every loss of pyrl computes on every backend, measured against float64, and what the same loss
computes in TRL, Liger-Kernel and verl. Written by `pyrl certify`; to run it again:

    make certify

CI does, and one row above its bound fails it: the command lists the rows and exits with 1.

**The rule**, for the loss and for the gradient of every input, row by row:

    error(backend) <= error(plain torch, same dtype) + margin        margin: {margins}

An error is `|value - truth| / |truth|` over all elements (absolute where the truth is 0, infinite
where a value is not finite). The *truth* is float64 autograd of the oracle (`pyrl/ops/reference.py`
and `pyrl/ops/objective.py`) on packed inputs, nothing rounded before the comparison. *Plain torch*
is what one writes without this library: all logits in the row's dtype, `log_softmax` in fp32, the
formula in fp32, autograd. f16 gradients are formed under a loss scale, as one does. Where plain
torch is not finite, the bound is the margin alone.

A row's batch is drawn from the first seed where, by the oracle alone, the loss is no difference of
far larger terms and no token lies so near a clipping edge that rounding its half-precision logit
decides its gradient. Half-precision rows are root mean squares over {few} such batches (heads,
shapes, supports: {many}). Every row is held to the rule; the tables show the worst of the rows they
sum up, with one digit, as `loss / worst gradient`. **Bold** breaks the rule, an empty cell was not
run, *refuses*: the backend has no such op, raises `NotImplementedError` and never computes another.
"""

BEYOND = """Offsets beyond 2^31 elements (rows x vocabulary) would need gigabytes here; they are
tested on memory that is reserved and not touched:
`tests/native/test_support_rows.py::test_offsets_beyond_two_to_the_31` (C++),
`tests/kernels/test_support.py::test_offsets_beyond_two_to_the_31` (Triton),
`tests/ops/test_logits_logprob.py::test_rows_beyond_two_to_the_31` (the op).
"""

NOTES = {
    "policy_objective": "Every objective with every option it accepts, by log-prob and entropy: "
    "ragged with an empty completion, masked tokens, 30% missing old, reference and rollout "
    "log-probs; padded and complete on some options.",
    "linear_policy_loss": "Every objective with every option, from hidden states: gradients of "
    "hidden states, weight and bias.",
    "logits_policy_loss": "Every objective, with KL and entropy bonus, from given logits: gradient "
    "of the logits.",
    "heads": "What stands between hidden states and log-prob, under a loss that is formed in one "
    "pass (clip) and one that couples the tokens of a sequence.",
    "shapes": "Batches and vocabularies that break kernels, from hidden states and from logits. "
    "*padded = packed*: the padded call, with NaN behind every sequence, against the packed truth.",
    "sampling support": "The softmax of each token over its own CSR support (replay of top-k, "
    "top-p, min-p); plain torch masks the other logits with -inf.",
    "group_advantage": "Advantages, `keep` and metrics; groups as ids and as CSR offsets, of any "
    "size, of one, equal rewards, 0/1 rewards, a mean 10^4 times the spread, NaN rewards; every "
    "filter and mode, reward_map, population std. No plain torch: the bound is the margin alone.",
    "gae": "Advantages and returns; NaN behind the mask; terminated and bootstrapped ends; padded "
    "and packed; 65,536 tokens. No plain torch: the bound is the margin alone.",
    "value_loss": "Clipped and not, every aggregation, ragged, padded, all masked, empty. A torch "
    "formula under autograd; truth and plain torch are written out once more for this table.",
    "preference_loss": "DPO over pairs that share sequences and hold an empty one; smoothing, "
    "weights, denominators, no reference, missing reference log-probs; written out once more.",
    "kl_penalty, rewards_with_kl": "Estimates per token and summed into the reward; no backends.",
}


T = TypeVar("T")
K = TypeVar("K")


def markdown(certificate: Certificate) -> str:
    """The whole document; the same for the same results, whenever and wherever it is written."""
    margins = ", ".join(f"{DTYPES[d]} {m:g}" for d, m in MARGIN.items())
    text = [HEAD.format(margins=margins, few=BATCHES[0], many=BATCHES[1])]
    text += _environment(certificate)
    text += _summary(certificate)
    if certificate.failures:
        text += ["## Failures\n", *(f"- {failure}" for failure in certificate.failures), ""]
    for section in dict.fromkeys(row.section for row in certificate.rows):
        text += _section(certificate, section)
    text += _peers(certificate.peers)
    return "\n".join(text) + "\n"


def _environment(certificate: Certificate) -> list[str]:
    packages = []
    for name in ("torch", "triton", "numpy", "trl", "liger-kernel", "verl"):
        try:
            packages.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            packages.append(f"{name} absent")
    lines = ["## Environment\n", f"- {_device()}", f"- {', '.join(packages)}"]
    lines.append(f"- backends measured: {', '.join(f'`{name}`' for name in certificate.columns)}")
    for name in certificate.interpreted:
        lines.append(
            f"- `{name}` ran in its interpreter, for there is no GPU: the same kernels, slowly. It "
            "takes every fp32 row, except that `linear_policy_loss` comes with one option (KL and "
            "entropy bonus), as the options live in `policy_objective`, and 65,536 kept tokens; "
            "in half precision two objectives: a dtype changes loads and stores alone."
        )
    lines += [f"- not measured, `{name}`: {why}" for name, why in certificate.absent.items()]
    return [*lines, ""]


def _device() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.is_file() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _summary(certificate: Certificate) -> list[str]:
    columns = certificate.columns
    lines = [
        "## Summary\n",
        "The largest error of any quantity in any row, and of what share of its own bound the "
        "worst row made use.\n",
        *_header("section", "dtype", "rows", "plain torch", *columns, "bound used"),
    ]
    for section in dict.fromkeys(row.section for row in certificate.rows):
        for dtype in DTYPES:
            rows = [r for r in certificate.rows if (r.section, r.dtype) == (section, dtype)]
            if not rows:
                continue
            used = [row.used(b) for row in rows for b in row.errors]
            cells = [_cell(rows, b, kinds=False) for b in (None, *columns)]
            share = f"{100 * max(used, default=0.0):.0f}%"
            lines.append(_line(section, DTYPES[dtype], len(rows), *cells, share))
    passed = len(certificate.rows) - sum(bool(row.failures) for row in certificate.rows)
    return [*lines, "", f"{passed} of {len(certificate.rows)} rows keep the rule.\n", BEYOND]


def _section(certificate: Certificate, section: str) -> list[str]:
    columns = certificate.columns
    rows = [row for row in certificate.rows if row.section == section]
    lines = [f"## {section}\n", NOTES[section] + "\n"]
    quantities = dict.fromkeys(q for row in rows for e in row.errors.values() for q in e)
    lines += _header("quantity", "dtype", "plain torch", *columns)
    for quantity in quantities:
        for dtype, group in _by(rows, lambda row: row.dtype):
            cells = [_cell(group, b, (quantity,)) for b in (None, *columns)]
            lines.append(_line(quantity, DTYPES[dtype], *cells))
    if section != "logits_policy_loss":  # whose objectives are those of the tables above
        lines += ["", *_header("case", "dtype", "rows", "plain torch", *columns)]
        lines += _cases(rows, columns, lambda row: row.case)
    if section in ("policy_objective", "group_advantage"):
        lines += ["", *_header("option", "dtype", "rows", "plain torch", *columns)]
        lines += _cases(rows, columns, lambda row: row.option or "none")
    return [*lines, ""]


def _cases(rows: Sequence[Row], columns: Sequence[str], key: Callable[[Row], str]) -> list[str]:
    lines = []
    for name, same in _by(rows, key):
        for dtype, group in _by(same, lambda row: row.dtype):
            cells = [_cell(group, b) for b in (None, *columns)]
            lines.append(_line(name, DTYPES[dtype], len(group), *cells))
    return lines


def _cell(
    rows: Sequence[Row], backend: str | None, only: Sequence[str] = (), kinds: bool = True
) -> str:
    """The worst errors of a backend (None: plain torch) over rows: loss / gradient, or one."""
    if backend is not None and any(backend in row.refused for row in rows):
        return "refuses"
    found: dict[str, float] = {}
    for row in rows:
        errors = row.plain if backend is None else row.errors.get(backend)
        for quantity, error in (errors or {}).items():
            if not only or quantity in only:
                kind = "gradient" if kinds and not only and quantity.startswith("d") else "value"
                found[kind] = max(found.get(kind, 0.0), error)
    text = " / ".join(_number(found[kind]) for kind in ("value", "gradient") if kind in found)
    failed = any(f" · {backend}: " in failure for row in rows for failure in row.failures)
    return f"**{text or 'failed'}**" if backend and failed else text


def _by(items: Iterable[T], key: Callable[[T], K]) -> list[tuple[K, list[T]]]:
    """The items by key, in the order in which keys come first."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.0e}" if value < float("inf") else "NaN"


def _line(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _header(*names: str) -> list[str]:
    left = ("section", "case", "option", "quantity", "dtype", "peer", "theirs", "ours", "verdict")
    return [_line(*names), "|" + "".join("---|" if n in left else "---:|" for n in names)]


def _peers(comparisons: Sequence[Comparison]) -> list[str]:
    lines = [
        "## Peers\n",
        "Their own code on the same fp32 inputs, against our float64 oracle: relative distance of "
        f"the loss (or value) and of the gradients. *agrees*: both within {AGREES:g}. Where theirs "
        "is another formula the verdict says which and why ours is what it is; the run holds them "
        "to that formula, and fails when a difference that is named here is gone. Without a "
        "counterpart in `LossSpec`, and not compared: verl's clip_cov, kl_cov, dro and "
        "bypass_mode, TRL's top_entropy_quantile.\n",
    ]
    for peer, rows in _by(comparisons, lambda row: row.peer):
        lines.append(f"### {peer}\n")
        if not all(row.ran for row in rows):
            lines += [rows[0].verdict, ""]
            continue
        lines += _header("case", "theirs", "ours", "loss", "gradient", "verdict")
        for row in rows:
            gradient = "" if row.gradient is None else _number(row.gradient)
            cells = (row.case, row.theirs, row.ours, _number(row.loss), gradient, row.verdict)
            lines.append(_line(*cells))
        lines.append("")
    return lines
