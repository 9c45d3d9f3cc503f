"""docs/parity.md from a certificate."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from pyrl.certify.run import Certificate
from pyrl.parity import DEVICE, MARGIN

HEAD = """# Parity certificate

Written by `pyrl certify` (`make certify`), which CI runs; any row above its bound fails the build.

Each number is the largest relative error `|value - truth| / |truth|` over the loss and every
gradient, and over the shapes tried, against float64 autograd of the oracle (`reference`). The
rule, per quantity: error(backend) <= error(plain torch, same dtype) + {margins}. *plain torch*
builds the whole `[T, V]` logits in the row's dtype and takes autograd through `log_softmax`.
**Bold** breaks the rule.

Measured on: {machine}.
"""

NOTES = {
    "policy_objective": "Loss and gradients by log-prob and entropy, fp32 inputs; ragged, padded "
    "and with 30% missing log-probs. Plain torch is the formula under autograd in float64, so the "
    "bound is the margin alone.",
    "linear_policy_loss": "Loss and gradients of hidden states, weight and bias, with KL and "
    "entropy bonus, on a ragged batch.",
    "logits_policy_loss": "The same from given logits: loss and gradient of the logits.",
    "heads": "What stands between hidden states and log-prob.",
    "shapes": "Batches and vocabularies that break kernels.",
    "group_advantage": "Advantages; groups of any size, a group of one, equal rewards, a mean 10^4 "
    "times the spread, NaN rewards.",
}
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def markdown(certificate: Certificate) -> str:
    """The whole document."""
    margins = ", ".join(f"{DTYPES[d]} {m:g}" for d, m in MARGIN.items())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy"))
    text = [HEAD.format(margins=margins, machine=f"{platform.machine()} {DEVICE.type}, {versions}")]
    if certificate.absent:
        text.append("Not measured here:\n")
        text += [f"- `{name}`: {reason}" for name, reason in certificate.absent.items()]
        text.append("")
    for section in dict.fromkeys(row.section for row in certificate.rows):
        text += _section(certificate, section)
    text += _peers(certificate)
    if certificate.failures:
        text += ["\n## Failures\n", *(f"- {failure}" for failure in certificate.failures)]
    return "\n".join(text) + "\n"


def _section(certificate: Certificate, section: str) -> list[str]:
    columns = certificate.columns
    lines = [f"## {section}\n", NOTES[section] + "\n"]
    lines.append("| case | dtype | plain torch | " + " | ".join(columns) + " |")
    lines.append("|---|---|---:|" + "---:|" * len(columns))
    for row in certificate.rows:
        if row.section != section:
            continue
        cells = [_number(max(row.plain.values()))]
        for backend in columns:
            cell = _number(max(row.errors[backend].values()))
            failed = any(f" · {backend}: " in failure for failure in row.failures)
            cells.append(f"**{cell}**" if failed else cell)
        lines.append(f"| {row.name} | {DTYPES[row.dtype]} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _peers(certificate: Certificate) -> list[str]:
    lines = [
        "## Peers\n",
        "Their own code on the same inputs in fp32, against our float64 oracle. *agrees*: loss "
        "and gradients within 1e-4. Where a peer differs on purpose or by defect, the row says by "
        "which formula, and the test holds it to that formula.\n",
        "| peer | case | loss | gradient | verdict |",
        "|---|---|---:|---:|---|",
    ]
    for peer in certificate.peers:
        numbers = f"{_number(peer.loss)} | {_number(peer.gradient)}" if peer.ran else "– | –"
        lines.append(f"| {peer.peer} | {peer.case} | {numbers} | {peer.verdict} |")
    return lines
