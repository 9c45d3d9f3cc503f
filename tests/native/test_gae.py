"""csrc/cpu/gae.cpp against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from pyrl import _native
from pyrl.ops import reference

if _native.native_reason() is not None:
    pytest.skip(_native.native_reason(), allow_module_level=True)

terms = torch.ops.pyrl_native.gae_terms


def arguments(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    rewards, values = torch.randn(2, tokens, generator=g).unbind()
    keep = torch.rand(tokens, generator=g) < 0.7
    rewards[~keep], values[~keep] = torch.nan, torch.inf
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return rewards, values, keep, bounds, torch.randn(len(lengths), generator=g)


@pytest.mark.parametrize("gamma, lam", ((1.0, 0.95), (0.9, 0.0), (0.0, 0.5), (1.0, 1.0)))
# Empty and single sequences, and enough sequences for several grains of threads.
@pytest.mark.parametrize("lengths", ([], [0], [1], [5, 0, 33], [3] * 600), ids=len)
def test_against_float64(lengths, gamma, lam):
    batch = arguments(lengths)
    actual, expected = terms(*batch, gamma, lam), reference.gae(*batch, gamma, lam)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-7)


def test_bad_arguments_are_named():
    rewards, values, keep, bounds, bootstrap = arguments([2, 3])

    def refuses(match, *batch):
        with pytest.raises(RuntimeError, match=match):
            terms(*batch, 1.0, 0.95)

    refuses("values must be float32", rewards, values.double(), keep, bounds, bootstrap)
    refuses("keep must be bool", rewards, values, keep.int(), bounds, bootstrap)
    refuses(r"bounds must have shape \[3\]", rewards, values, keep, bounds[:2], bootstrap)
    short = torch.tensor([0, 2, 4])
    refuses("bounds must run from 0 to 5", rewards, values, keep, short, bootstrap)
    falls = torch.tensor([0, 6, 5])
    refuses(r"bounds\[2\]=5 is less", rewards, values, keep, falls, bootstrap)


def test_opcheck():
    rewards, values, keep, bounds, bootstrap = arguments([2, 3])
    torch.library.opcheck(terms, (rewards, values, keep, bounds, bootstrap, 0.9, 0.8))
