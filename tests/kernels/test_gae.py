"""gae_terms of Triton against the float64 oracle."""

from __future__ import annotations

import pytest
import torch

from pyrl.kernels import gae
from pyrl.kernels.tuning import GAE
from pyrl.ops import reference


@pytest.mark.parametrize("gamma, lam", ((1.0, 0.95), (0.9, 0.0), (0.0, 0.5), (1.0, 1.0)))
# Blocks of GAE.block tokens: empty, one, a full block, a token more, two blocks and a bit.
@pytest.mark.parametrize("length", (0, 1, GAE.block, GAE.block + 1, 2 * GAE.block + 3))
def test_matches_the_oracle(length: int, gamma: float, lam: float, device: torch.device) -> None:
    g = torch.Generator().manual_seed(length)
    bounds = torch.tensor([0, 3, 3, 3 + length, 7 + length])
    r, v = torch.randn(2, 7 + length, generator=g).unbind()
    keep = torch.rand(7 + length, generator=g) < 0.7
    r[~keep], v[~keep] = torch.nan, torch.inf
    arguments = [x.to(device) for x in (r, v, keep, bounds, torch.randn(4, generator=g))]
    expected = reference.gae(*arguments, gamma, lam)
    for a, e in zip(gae.gae_terms(*arguments, gamma, lam), expected, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-6, atol=1e-7)


def test_refuses_what_it_would_misread(device: torch.device) -> None:
    v, keep, bounds = torch.zeros(4), torch.ones(4, dtype=torch.bool), torch.tensor([0, 4])
    after = torch.zeros(1)
    for match, arguments in {
        "values: expected": (v, v[::2], keep, bounds, after),
        "keep: expected": (v, v, keep.int(), bounds, after),
        "bounds: expected": (v, v, keep, bounds.int(), after),
        "bootstrap: expected": (v, v, keep, bounds, after.double()),
    }.items():
        with pytest.raises(ValueError, match=match):
            gae.gae_terms(*arguments, 1.0, 0.95)
