"""Drawing tokens from logits: truncation, inverse CDF, and the exact log-prob of the draw."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from .protocol import SamplingParams

#: Vocabulary entries summed per block of the two-level inverse CDF.
BLOCK = 256
#: Candidates sorted for top-p before falling back to sorting the whole row.
CANDIDATES = 1024
#: Logits handled at a time.
CHUNK = 1 << 20


def uniforms(seed: int, prompt: int, sample: int, count: int) -> np.ndarray:
    """[count] float32 in [0, 1): the noise of one completion, a pure function of its arguments.

    Counter-based (Philox), so a completion's noise does not depend on what else is in the batch,
    and a longer `count` only appends. 24 random bits each.
    """
    mask = (1 << 64) - 1
    key = np.array([seed & mask, ((prompt & 0xFFFFFFFF) << 32) | (sample & 0xFFFFFFFF)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count, dtype=np.float32)


def request_seed(seed: int, prompt: int) -> int:
    """vLLM's 62-bit seed for prompt number `prompt`, to which it adds 0..n-1 for its samples.

    Hashed, so that neighbouring seeds and prompts do not share their samples' noise.
    """
    digest = hashlib.blake2b(f"{seed}:{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def sample(logits: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """x = truncate(logits / temperature); token = min{v: cumsum(softmax(x))_v > u}; logp of it.

    logits [B, V] any float dtype; uniform [B] in [0, 1); returns token [B] int64, logp [B] fp32.
    All arithmetic in fp32, positions inside the CDF in fp64. `temperature=0`: token = argmax, logp
    at temperature 1 (the greedy distribution itself has none worth reporting).
    """
    # A few rows at a time: the fp32 copies stay in the CPU's cache, and memory is bounded.
    step = max(1, CHUNK // logits.shape[-1])
    parts = [
        _sample(rows, noise, params)
        for rows, noise in zip(logits.split(step), uniform.split(step), strict=True)
    ]
    return torch.cat([token for token, _ in parts]), torch.cat([logp for _, logp in parts])


def _sample(logits: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    x = logits.float()
    if params.temperature == 0:
        token = x.argmax(-1)
        return token, x.gather(-1, token[:, None])[:, 0] - x.logsumexp(-1)
    x = truncate(x / params.temperature, params.top_k, params.top_p)
    peak = x.amax(-1, keepdim=True)
    weight = x.sub_(peak).exp_()  # [B, V], the unnormalised probabilities
    token, total = _inverse_cdf(weight, uniform)
    chosen = logits.gather(-1, token[:, None]).float() / params.temperature
    return token, (chosen - peak)[:, 0] - total.log().float()


def truncate(x: Tensor, top_k: int, top_p: float) -> Tensor:
    """x with the tokens outside the top-k, then the top-p set at -inf. x [B, V] fp32.

    Among equal values the top-p set may keep either; the sum of what is kept is the same.
    """
    vocab = x.shape[-1]
    if 0 < top_k < vocab:
        bound = x.topk(top_k, dim=-1).values[:, -1:]
        x = x.masked_fill(x < bound, -torch.inf)
    if top_p >= 1:
        return x
    # Sorting a whole vocabulary is slow and the nucleus is nearly always small: look for it among
    # the best candidates, and sort in full only the rows whose candidates do not reach top_p.
    lse = x.logsumexp(-1, keepdim=True)
    count = min(CANDIDATES, vocab)
    best, index = x.topk(count, dim=-1)
    mass = (best - lse).exp().cumsum(-1)
    if count < vocab:
        short = (mass[:, -1] < top_p).nonzero()[:, 0]
        if len(short):
            x = x.clone()
            full, order = x[short].sort(dim=-1, descending=True)
            x[short] = _nucleus(x[short], full, order, lse[short], top_p)
            rest = (mass[:, -1] >= top_p).nonzero()[:, 0]
            x[rest] = _nucleus(x[rest], best[rest], index[rest], lse[rest], top_p)
            return x
    return _nucleus(x, best, index, lse, top_p)


def _nucleus(x: Tensor, best: Tensor, index: Tensor, lse: Tensor, top_p: float) -> Tensor:
    """Keep sorted candidate j while the mass *before* it is below top_p; the rest -> -inf."""
    prob = (best - lse).exp()
    keep = prob.cumsum(-1) - prob < top_p
    keep[:, 0] = True
    kept = torch.where(keep, best, -torch.inf)
    return torch.full_like(x, -torch.inf).scatter(-1, index, kept)


def _inverse_cdf(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """First index [B] whose running sum of weight [B, V] exceeds u * total; total [B] in fp64.

    Two levels: running sums over blocks of `BLOCK` entries, then inside the chosen block. An entry
    of weight 0 is never chosen: the running sum does not exceed anything there that it did not
    exceed before.
    """
    rows, vocab = weight.shape
    pad = -vocab % BLOCK
    if pad:
        weight = torch.nn.functional.pad(weight, (0, pad))
    blocks = weight.view(rows, -1, BLOCK)
    outer = blocks.sum(-1).double().cumsum(-1)  # [B, V / BLOCK]
    total = outer[:, -1]
    target = (uniform.double() * total)[:, None]
    block = _first_above(outer, target)
    before = torch.where(block > 0, outer.gather(-1, (block - 1).clamp(min=0)), 0.0)
    chosen = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    inner = _first_above(chosen.double().cumsum(-1), target - before)
    return (block * BLOCK + inner)[:, 0], total


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """[B, 1] index of the first running sum > target, at most the last index where it still grows.

    The cap matters when rounding leaves `target` at or above the last sum.
    """
    last = (running < running[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum((running <= target).sum(-1, keepdim=True), last)
