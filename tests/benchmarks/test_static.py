"""Bytes and flops in closed form against a walk over the accesses; rows and document."""

import json

import pytest
import report
import static
import static_counts
import static_table
from static_counts import GPUS, Pipeline, row_counts, vector_counts

H100, H200 = GPUS


def test_limits_are_the_vendors():
    assert (H100.bandwidth, H200.bandwidth) == (3.35e12, 4.8e12)
    assert H100.flops == H200.flops == 989e12


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_row_kernels_move_each_logit_once_a_pass(dtype, size):
    n, vocab = 8192, 151936
    stats, grad, both = row_counts(n, vocab, dtype)
    row = 64 * n  # what a row reads and writes besides logits: far below a thousandth
    assert 0 <= stats.moved - n * vocab * size < row
    assert 0 <= grad.moved - 2 * n * vocab * size < row
    assert both.moved == stats.moved + grad.moved
    assert both.moved / both.least == pytest.approx(1.5, rel=1e-4)
    assert stats.moved == stats.least


def test_the_floor_of_the_statistics_is_the_published_one():
    # .74 ms at 3.35 TB/s for 8192 x 151936 in bf16.
    stats = row_counts(8192, 151936, "bfloat16")[0]
    assert stats.floor_ms(H100) == pytest.approx(0.743, abs=1e-3)
    assert stats.floor_ms(H200) == pytest.approx(0.743 * 3.35 / 4.8, abs=1e-3)
    # Twice the bandwidth would leave the exponentials as the limit.
    fast = static_counts.Gpu(
        name="x", bandwidth=1e14, flops=H100.flops, exponentials=H100.exponentials
    )
    assert stats.floor_ms(fast) == 1e3 * 8192 * 151936 / H100.exponentials


def test_vector_ops_count_each_element():
    for tokens in (1, 7, 1000):
        objective, group, gae = vector_counts(tokens, group=8)
        read = {"logprob": 4, "entropy": 4, "old": 4, "advantage": 4, "weight": 4, "keep": 1}
        written = {"c": 4, "h": 4}
        assert objective.moved == tokens * (sum(read.values()) + sum(written.values()))
        assert group.moved == tokens * 21 + 8 * (-(-tokens // 8) + 1)
        assert gae.moved == gae.least == tokens * 17
        assert objective.least < objective.moved and group.least < group.moved


@pytest.mark.parametrize("kept", [8192, 4096, 1638, 100])
def test_the_pipeline_adds_up_chunk_by_chunk(kept):
    n, d, v = 8192, 4096, 151936
    pipe = Pipeline(tokens=n, hidden=d, vocab=v, kept=kept)
    flops, glue, sums, chunks = 0.0, 0, 0, 0
    for start in range(0, kept, pipe.rows):
        rows = min(pipe.rows, kept - start)
        flops += 3 * 2 * rows * d * v
        glue += rows * v * (4 + (4 + 4) + (4 + 2))
        sums += 4 * (4 * v * d)
        chunks += 1
    assert (pipe.flops, pipe.glue_bytes, pipe.chunks) == (flops, glue, chunks)
    assert pipe.sum_bytes == sums + (4 + 2) * v * d
    assert pipe.rows * v * 4 <= static_counts.CHUNK_BYTES
    assert pipe.gemm_ms(H100) < pipe.least_ms(H100) < pipe.floor_ms(H100)
    assert pipe.floor_ms(H200) < pipe.floor_ms(H100)


def test_the_chunk_is_the_ops_own():
    from pyrl.ops.linear_logprob import CHUNK_BYTES

    assert CHUNK_BYTES["cuda"] == static_counts.CHUNK_BYTES


def test_peak_is_flat_beyond_one_chunk_and_linear_below():
    def peak(n):
        return Pipeline(tokens=n, hidden=4096, vocab=151936, kept=n).peak_bytes

    assert peak(8192) == peak(65536) < 6 * 2**30  # the target: 6 GiB
    assert peak(400) - peak(200) == peak(600) - peak(400) == 200 * 151936 * 6


def test_rows_and_document(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("aot_cuda.find", lambda program: None)
    rows = static.run(tmp_path, say=lambda text: None)
    kinds = {row["kind"] for row in rows}
    assert kinds == {"kernel", "pipeline", "compiled"}
    absent = {r["implementation"]: r["reason"] for r in rows if r["status"] == "absent"}
    assert set(absent) == {"triton", "cuda"} and "no nvcc" in absent["cuda"]
    for row in rows:
        json.dumps(row)
        assert row["measured"] is False
        assert {"op", "version", "dtype", "shape", "kept_share", "device", "torch", "triton",
                "commit"} <= set(row)  # fmt: skip
    (target,) = report.write(tmp_path)
    text = target.read_text()
    assert "No GPU figure of this package has been measured yet." in text
    assert "| 8192 4096 151936 | 50% |" in text and "no nvcc" in text
    static_table.show(rows)


def test_compiled_rows_hold_registers_and_spills(monkeypatch):
    import aot_cuda

    used = aot_cuda.Resources(40, 128, 0, 8, 4)
    monkeypatch.setattr(aot_cuda, "find", lambda program: "nvcc")
    monkeypatch.setattr(
        aot_cuda, "compiled", lambda *a: iter([("gae", "k<float>", "90a", used), "x.cu does not"])
    )
    good, bad = static.compiled_cuda(quick=False)
    assert (good["registers"], good["shared_bytes"], good["spill_bytes"]) == (40, 128, 12)
    assert good["status"] == "failed" and bad["reason"] == "x.cu does not"
    lines = static_table.families([good, bad])
    assert lines[0][:3] == ["k (1)", "cuda gae.cu", "40"] and "failed" in lines[1][2]
