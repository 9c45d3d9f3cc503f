"""What installed peers compute on the same inputs, beside our float64 oracle."""

from __future__ import annotations

import importlib
from importlib import metadata

from pyrl.certify.peers.base import Comparison, judge

#: Name, distribution, and the module here that runs its code: `cases()` → the comparisons.
PEERS = (
    ("TRL", "trl", "pyrl.certify.peers.trl"),
    ("Liger-Kernel", "liger-kernel", "pyrl.certify.peers.liger"),
    ("verl", "verl", "pyrl.certify.peers.verl"),
)


def compare() -> list[Comparison]:
    """Every case of the peers that can be imported, and a row that says why for the others."""
    found = []
    for name, package, module in PEERS:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            found.append(Comparison(name, "all", ran=False, verdict="not installed"))
            continue
        try:
            cases = list(importlib.import_module(module).cases())
        except ImportError as error:
            verdict = f"version {version} cannot be imported: {error}"
            found.append(Comparison(name, "all", ran=False, verdict=verdict))
            continue
        found += [judge(f"{name} {version}", case) for case in cases]
    return found
