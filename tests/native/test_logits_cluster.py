"""The one-read kernel's algorithm (csrc/logits_policy.h), emulated thread by thread on the host,
against the float64 oracle: what can be shown of the GPU kernel without a GPU."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyrl
from pyrl.losses.linear import gradient_scale
from pyrl.ops.policy_objective import collect
from pyrl.ops.shapes import layout
from pyrl.ops.spec import LossSpec

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the source checkout"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler on PATH"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Half a spacing of what is written, and a part of fp32 arithmetic.
ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 2**-8 + 3e-6, torch.float16: 2**-11 + 3e-6}
#: f16 below 2^-14 is spaced by 2^-24.
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-24}
#: Shared memory of a CTA where two share an SM of an H100 (228 KiB, 1 KiB reserved for each CTA).
H100 = 233472 // 2 - 1024

SPECS = {
    "clip": LossSpec(dual_clip=2.0, delta=4.0, kl_coef=0.05, entropy_coef=0.01),
    "reinforce": LossSpec(objective="reinforce", kl="k2", kl_coef=0.05, correction="tis"),
    "cispo": LossSpec.preset(
        "cispo",
        aggregation="token_mean",
        cispo_high=1.2,
        kl="abs",
        kl_coef=0.1,
        correction="icepop",
    ),
    "sapo": LossSpec.preset(
        "sapo", aggregation="token_mean", kl="k3_st", kl_coef=0.1, kl_clamp=0.2
    ),
    "dppo": LossSpec.preset(
        "dppo", aggregation="token_mean", dppo_divergence="kl", kl="k1", kl_coef=0.1
    ),
    "mis": LossSpec(kl="k3", kl_coef=0.1, kl_ratio_weighted=True, correction="mis"),
    "negative": LossSpec(logit_scale=-0.7, entropy_coef=0.1),
    "capped": LossSpec(softcap=7.0, logit_scale=-1.5, entropy_coef=0.1),
}


class RowIndex(ctypes.Structure):
    _fields_ = [("stride", ctypes.c_int64), ("index", ctypes.c_void_p)]


class LogitsRows(ctypes.Structure):
    _fields_ = [
        ("z", ctypes.c_void_p), ("at", RowIndex), ("dtype", ctypes.c_int),
        ("vocab", ctypes.c_int64), ("target", ctypes.c_void_p),
        ("inv_temperature", ctypes.c_void_p),
        ("logit_scale", ctypes.c_float), ("softcap", ctypes.c_float),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = [
        ("rows", LogitsRows), ("dz", ctypes.c_void_p), ("at", RowIndex),
        *((name, ctypes.c_void_p) for name in ("logprob", "entropy", "lse")),
        *((name, ctypes.c_void_p) for name in ("old", "ref", "rollout")),
        *((name, ctypes.c_void_p) for name in ("advantage", "weight", "keep")),
    ]  # fmt: skip


class Job(ctypes.Structure):
    _fields_ = [
        ("batch", Batch), ("params", ctypes.c_void_p), ("n", ctypes.c_int64),
        ("ctas", ctypes.c_int32), ("slots", ctypes.c_int32), ("clusters", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The emulation, compiled for CTAs of so many warps and copies of so many packs."""
    folder, built = tmp_path_factory.mktemp("cluster"), {}

    def load(warps, packs):
        if (warps, packs) not in built:
            path = folder / f"emulation_{warps}_{packs}.so"
            source = ROOT / "tests" / "native" / "cluster_emulation.cpp"
            subprocess.run(
                ["c++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
                 f"-DPYRL_ROW_WARPS={warps}", f"-DPYRL_SEGMENT_PACKS={packs}",
                 f"-I{ROOT / 'csrc'}", "-o", str(path), str(source)],
                check=True,
            )  # fmt: skip
            built[warps, packs] = ctypes.CDLL(str(path))
            assert built[warps, packs].job_size() == ctypes.sizeof(Job)
        return built[warps, packs]

    return load


def pointer(t):
    return None if t is None else t.data_ptr()


def emulate(lib, spec, z, at, dz, to, case, *, ctas, slots, clusters=1, seed=0):
    """logprob, entropy, lse of rows (stride, index) of z; the gradient goes to those of dz."""
    n, vocab = len(case["target"]), case["vocab"]
    stats = torch.full((3, n), 7.0)
    fields, params = case["fields"], spec.params()
    batch = Batch(
        rows=LogitsRows(
            z.data_ptr(), RowIndex(*at), DTYPES.index(z.dtype), vocab, pointer(case["target"]),
            pointer(case["inv_temperature"]), spec.logit_scale, spec.softcap or 0.0,
        ),
        dz=dz.data_ptr(), at=RowIndex(*to),
        logprob=pointer(stats[0]), entropy=pointer(stats[1]), lse=pointer(stats[2]),
        old=pointer(fields.old), ref=pointer(fields.ref), rollout=pointer(fields.rollout),
        advantage=pointer(fields.advantage), weight=pointer(fields.weight),
        keep=pointer(fields.keep),
    )  # fmt: skip
    job = Job(batch, pointer(params), n, ctas, slots, clusters, seed)
    message = ctypes.create_string_buffer(200)
    failed = lib.emulate(ctypes.byref(job), message)
    assert not failed, message.value.decode()
    return stats


def make(spec, n, vocab, dtype, seed=0, spread=2.0):
    """Logits [n, V]; some tokens masked, clipped, without advantage or old log-prob."""
    g = torch.Generator().manual_seed(seed)
    z = (spread * torch.randn(n, vocab, generator=g)).to(dtype)
    if spec.logit_scale > 0 or spec.softcap:  # else -inf would be a certain token
        z[torch.rand(n, vocab, generator=g) < 0.1] = -math.inf
    target = torch.randint(vocab, (n,), generator=g)
    z[torch.arange(n), target] = (spread * torch.randn(n, generator=g)).to(dtype)
    mask = torch.rand(n, generator=g) < 0.8
    mask[0] = True
    temperature = torch.rand(n, generator=g) + 0.5
    oracle = {"temperature": temperature, "mask": mask, "backend": "reference"}
    with torch.no_grad():
        logp = pyrl.logits_logprob(
            z.double(), target, softcap=spec.softcap, logit_scale=spec.logit_scale, **oracle
        ).logprob
    old, ref, rollout = (logp + 0.3 * torch.randn(n, generator=g) for _ in range(3))
    old[1::5] = math.nan
    advantages = torch.randn(n, generator=g)
    advantages[3::7] = 0.0
    vectors = {"old_logprob": old, "ref_logprob": ref, "rollout_logprob": rollout}
    fields = collect(
        layout(target, mask, None), spec, advantages, weights=None, denominator=None, **vectors
    )
    scale = gradient_scale(fields.weight, dtype)
    fields = fields._replace(weight=fields.weight * scale)
    case = {"target": target, "inv_temperature": 1 / temperature, "fields": fields, "vocab": vocab}
    leaf = z.double().requires_grad_()
    exact = pyrl.logits_policy_loss(leaf, target, advantages, spec, **oracle, **vectors)
    exact.loss.backward()
    return z, case, exact, leaf.grad * scale


def check(stats, dz, case, exact, gradient, dtype):
    keep = case["fields"].keep
    assert (stats[:, ~keep] == 0).all() and (dz[~keep] == 0).all()
    for ours, theirs in ((stats[0], exact.logprob), (stats[1], exact.entropy)):
        torch.testing.assert_close(ours[keep], theirs[keep], rtol=2e-6, atol=2e-6)
    # 1 - p of a certain token is what fp32 leaves of it: relative to the token's coefficient.
    fields = case["fields"]
    size = fields.weight.abs() * (1 + fields.advantage.abs()) * case["inv_temperature"]
    bound = ROUNDING[dtype] * gradient.abs() + 5e-7 * size[:, None] + SMALLEST[dtype]
    error = (dz.double() - gradient).abs()
    worst = int((error - bound).nan_to_num(math.inf).argmax())
    where = divmod(worst, case["vocab"])
    assert (error <= bound).all(), (where, dz[where], gradient[where], size[where[0]])


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_spec_in_place(library, dtype, name):
    """Rings of two slots for rows of up to two segments: every slot is used many times over."""
    lib, spec = library(2, 32), SPECS[name]
    for vocab, ctas in ((1, 1), (7, 2), (1000, 4)):
        z, case, exact, gradient = make(spec, 9, vocab, dtype, seed=vocab)
        stats = emulate(
            lib, spec, z, (vocab, None), z, (vocab, None), case, ctas=ctas, slots=2, clusters=2
        )
        check(stats, z, case, exact, gradient, dtype)


# Qwen's and a padded one's, an odd one above every tile, with the clusters an H100 would take.
@pytest.mark.parametrize("vocab", (32001, 151936, 152064))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_vocabularies(library, dtype, vocab):
    lib, spec = library(8, 128), SPECS["clip"]
    chosen = (ctypes.c_int32 * 3)()
    width = torch.empty(0, dtype=dtype).element_size()
    lib.spread(ctypes.c_int64(vocab * width), ctypes.c_int64(H100), 0, chosen)
    ctas, slots, size = chosen
    assert ctas > 0 and size <= H100
    z, case, exact, gradient = make(spec, 3, vocab, dtype, seed=vocab, spread=4.0)
    out = torch.full_like(z, 7.0)
    stats = emulate(lib, spec, z, (vocab, None), out, (vocab, None), case, ctas=ctas, slots=slots)
    check(stats, out, case, exact, gradient, dtype)


@settings(deadline=None, max_examples=25)
@given(
    vocab=st.integers(1, 700),
    n=st.integers(1, 8),
    ctas=st.sampled_from((1, 2, 4)),
    spare=st.integers(0, 3),
    clusters=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    begin=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    name=st.sampled_from(sorted(SPECS)),
    seed=st.integers(0, 2**16),
    inplace=st.booleans(),
)
def test_rows_anywhere(library, vocab, n, ctas, spare, clusters, dtype, begin, name, seed, inplace):
    """Rows that begin at any address, permuted, of a wider matrix; the gradient in place or in
    another that lies otherwise; nothing outside the rows is touched."""
    lib, spec = library(2, 32), SPECS[name]
    z, case, exact, gradient = make(spec, n, vocab, dtype, seed)
    stride, index = vocab + seed % 5, torch.randperm(n + 2, generator=torch.manual_seed(seed))[:n]
    wide = torch.full(((n + 2) * stride + 32,), 3.0, dtype=dtype)
    view = wide[begin[0] :].as_strided((n + 2, vocab), (stride, 1), begin[0])
    view[index] = z
    width = z.element_size()
    packs = math.ceil(vocab * width // 16 / (2 * ctas))
    slots = max(1, math.ceil(packs / 32)) + spare
    at = (stride, index.data_ptr())
    if inplace:
        out, target, to = wide, view, at
        rest = wide.clone()
        rest.as_strided((n + 2, vocab), (stride, 1), begin[0])[index] = 0
        source = target
        stats = emulate(
            lib, spec, source, at, out[begin[0] :], to, case, ctas=ctas, slots=slots,
            clusters=clusters, seed=seed,
        )  # fmt: skip
        written = view[index]
        check(stats, written, case, exact, gradient, dtype)
        view[index] = 0
        assert torch.equal(wide, rest)
        return
    out = torch.full((n * vocab + 32,), 5.0, dtype=dtype)
    before = wide.clone()
    stats = emulate(
        lib, spec, view, at, out[begin[1] :], (vocab, None), case, ctas=ctas, slots=slots,
        clusters=clusters, seed=seed,
    )  # fmt: skip
    check(stats, out[begin[1] : begin[1] + n * vocab].view(n, vocab), case, exact, gradient, dtype)
    assert torch.equal(wide, before)
    assert (out[: begin[1]] == 5).all() and (out[begin[1] + n * vocab :] == 5).all()


@pytest.mark.parametrize("ctas", (1, 2, 4, 8, 16))
def test_equal_bits_whatever_the_schedule(library, ctas):
    lib, spec = library(2, 32), SPECS["clip"]
    z, case, *_ = make(spec, 7, 1500, torch.bfloat16)
    needed = math.ceil(math.ceil(187 / (2 * ctas)) / 32)
    results = []
    for seed, slots, clusters in ((1, needed, 1), (2, needed + 1, 3), (3, 3 * needed, 7)):
        out = torch.empty_like(z)
        stats = emulate(
            lib, spec, z, (1500, None), out, (1500, None), case, ctas=ctas, slots=slots,
            clusters=clusters, seed=seed,
        )  # fmt: skip
        results.append((stats, out))
    for stats, out in results[1:]:
        assert torch.equal(stats, results[0][0]) and torch.equal(out, results[0][1])


def test_rows_without_a_probability(library):
    """All logits -inf, NaN among them, a wrong target: what the two-read kernels answer."""
    lib, spec = library(2, 32), LossSpec(objective="reinforce")
    z, case, *_ = make(spec, 4, 300, torch.float32)
    z[:] = torch.randn(4, 300, generator=torch.manual_seed(0))
    z[0], z[1, 5] = -math.inf, math.nan
    case["target"][2] = 300
    case["fields"].keep[:], case["fields"].advantage[:] = True, 1.0
    out = torch.empty_like(z)
    stats = emulate(lib, spec, z, (300, None), out, (300, None), case, ctas=2, slots=2)
    assert stats[0, 0] == stats[2, 0] == -math.inf and stats[1, 0] == 0
    slope = -case["fields"].weight[0] * case["inv_temperature"][0]
    assert out[0, case["target"][0]] == pytest.approx(float(slope)) and (out[0] != 0).sum() == 1
    assert stats[:, 1].isnan().all() and out[1].isnan().all()
    assert stats[0, 2].isnan() and stats[1:, 2:].isfinite().all() and out[2:].isfinite().all()


@pytest.mark.parametrize("value", (-3.3e38, -1e12, -1e10, -1e9, -1e7))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_tokens_masked_by_a_finite_number(library, dtype, value):
    """Sums that begin at one add 0, not 0 * inf, to what follows."""
    lib, spec, vocab = library(2, 32), LossSpec(temperature=3.0, entropy_coef=2.0), 3000
    z, case, *_ = make(spec, 3, vocab, dtype)
    target, keep, inv = case["target"] % 1000 + 2000, torch.ones(3, dtype=torch.bool), 1 / 3
    z[:, :2000], z[torch.arange(3), target] = value, 1.0
    case |= {"target": target, "inv_temperature": torch.full((3,), inv)}
    fields = case["fields"]._replace(keep=keep, old=None, weight=torch.full((3,), 1 / 3))
    case["fields"] = fields
    leaf = z.double().requires_grad_()
    exact = pyrl.logits_policy_loss(leaf, target, fields.advantage, spec, backend="reference")
    exact.loss.backward()
    out = torch.empty_like(z)
    stats = emulate(lib, spec, z, (vocab, None), out, (vocab, None), case, ctas=2, slots=12)
    check(stats, out, case, exact, leaf.grad, dtype)


def test_the_cluster_that_holds_a_row(library):
    lib, chosen = library(8, 128), (ctypes.c_int32 * 3)()
    for row_bytes, wanted, ctas in (
        (2, 0, 1), (32001 * 2, 0, 2), (151936 * 2, 0, 8), (151936 * 4, 0, 8), (262144 * 4, 0, 16),
        (151936 * 2, 4, 4), (151936 * 2, 1, 0), (151936 * 2, 3, 0), (2**23, 0, 0),
    ):  # fmt: skip
        lib.spread(ctypes.c_int64(row_bytes), ctypes.c_int64(H100), wanted, chosen)
        assert chosen[0] == ctas, (row_bytes, wanted, list(chosen))
