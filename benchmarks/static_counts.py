"""Bytes and flops of the GPU kernels, counted from what each reads and writes, against limits.

Nothing here is measured. `least` is what the op cannot do without; `moved` what the kernel as it
stands moves, a byte that a cache may keep counted once a pass. The floor is the longest of bytes /
bandwidth, flops / rate and exponentials / rate: no launch, no tail, no imperfect overlap.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """Vendor's figures: bytes/s of memory, dense bf16 flop/s, and exponentials/s of the special
    function units (16 a cycle and SM)."""

    name: str
    bandwidth: float
    flops: float
    exponentials: float


GPUS: tuple[Gpu, ...] = (
    Gpu(name="H100 SXM", bandwidth=3.35e12, flops=989e12, exponentials=132 * 16 * 1.83e9),
    Gpu(name="H200", bandwidth=4.8e12, flops=989e12, exponentials=132 * 16 * 1.83e9),
)
#: Bytes of logits that the head holds at once on a GPU: pyrl.ops.linear_logprob.CHUNK_BYTES.
CHUNK_BYTES = 1 << 30
SIZES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Count:
    """One kernel, or one chain of kernels, at one shape."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    least: int
    moved: int
    exponentials: int = 0

    def floor_ms(self, gpu: Gpu) -> float:
        return 1e3 * max(self.moved / gpu.bandwidth, self.exponentials / gpu.exponentials)

    def least_ms(self, gpu: Gpu) -> float:
        return 1e3 * self.least / gpu.bandwidth


def row_counts(n: int, vocab: int, dtype: str) -> list[Count]:
    """The two kernels over logits [n, V], and both in a row: log-probs and the gradient in place.
    Of a row also: target 8, 1 / temperature 4, and three fp32 statistics out; the gradient reads
    those and c, h."""
    z = n * vocab * SIZES[dtype]
    stats, grad = n * (8 + 4 + 12), n * (8 + 4 + 8 + 8)
    shape, e = (n, vocab), n * vocab

    def count(name: str, least: int, moved: int, exponentials: int) -> Count:
        return Count(name=name, shape=shape, dtype=dtype, least=least, moved=moved,
                     exponentials=exponentials)  # fmt: skip

    return [
        count("logits_stats", z + stats, z + stats, e),
        count("logits_grad_", 2 * z + grad, 2 * z + grad, e),
        # Logits → loss: one read and one write would do; the statistics are a pass of their own.
        count("logits_stats + logits_grad_", 2 * z + stats, 3 * z + stats + grad, 2 * e),
    ]


def vector_counts(tokens: int, group: int = 8) -> list[Count]:
    """The ops on [T]: bytes of every fp32 vector 4, of a mask 1, of an id or offset 8."""
    t, groups = tokens, -(-tokens // group)

    def count(name: str, least: int, moved: int) -> Count:
        return Count(name=name, shape=(t,), dtype="float32", least=least, moved=moved)

    return [
        # logprob, old, advantage, keep → c; the kernel also reads entropy and weight, writes h.
        count("policy_objective", t * (12 + 1 + 4), t * (20 + 1 + 8)),
        # rewards fp32 and a group id → advantage; the kernel takes float64 rewards in group order.
        count("group_advantage", t * (4 + 8 + 4), t * (8 + 8 + 4 + 1) + 8 * (groups + 1)),
        # reward, value, keep → advantage and return.
        count("gae", t * (8 + 1 + 8), t * (8 + 1 + 8)),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """`linear_policy_loss` forward + backward of a token-level objective on bf16 hidden [N, D] and
    weight [V, D], `kept` of the N rows with loss (pyrl/losses/linear.py, pyrl/ops/head.py)."""

    tokens: int
    hidden: int
    vocab: int
    kept: int

    @property
    def flops(self) -> float:
        """6NDV: logits, d hidden, d weight."""
        return 6.0 * self.kept * self.hidden * self.vocab

    @property
    def rows(self) -> int:
        """Of a chunk: its fp32 logits take CHUNK_BYTES."""
        return min(self.kept, max(1, CHUNK_BYTES // (4 * self.vocab)))

    @property
    def chunks(self) -> int:
        return math.ceil(self.kept / self.rows)

    @property
    def glue_bytes(self) -> int:
        """Between the GEMMs, of each logit: statistics read 4, gradient in place 4 + 4, cast to
        bf16 reads 4 and writes 2."""
        return self.kept * self.vocab * (4 + 8 + 6)

    @property
    def glue_least(self) -> int:
        """One pass: 4 read, 2 written."""
        return self.kept * self.vocab * 6

    @property
    def sum_bytes(self) -> int:
        """d weight in fp32: each chunk's product is written, read, and added to the sum (read and
        written); at the end the sum is read and cast."""
        each = 4 * self.vocab * self.hidden
        return self.chunks * 4 * each + each + each // 2

    @property
    def sum_least(self) -> int:
        """The product added to the sum by the GEMM itself (beta = 1), and the cast."""
        each = 4 * self.vocab * self.hidden
        return (2 * self.chunks - 1) * each + each + each // 2

    @property
    def peak_bytes(self) -> int:
        """Above inputs and gradients out: while a chunk's d weight is added, its fp32 logits, their
        bf16 copy, the sum and the product are alive and the bf16 d weight is not."""
        each = self.vocab * self.hidden
        return self.rows * self.vocab * 6 + (4 + 4 - 2) * each

    def gemm_ms(self, gpu: Gpu) -> float:
        return 1e3 * self.flops / gpu.flops

    def floor_ms(self, gpu: Gpu) -> float:
        """The GEMMs at the full rate, and the passes between them at full bandwidth: one stream,
        so one after the other."""
        return self.gemm_ms(gpu) + 1e3 * (self.glue_bytes + self.sum_bytes) / gpu.bandwidth

    def least_ms(self, gpu: Gpu) -> float:
        """The same with one glue pass and the sum inside the GEMM."""
        return self.gemm_ms(gpu) + 1e3 * (self.glue_least + self.sum_least) / gpu.bandwidth
