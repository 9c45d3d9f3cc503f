"""RESULTS.md: targets first, made from files alone, old files no obstacle."""

import harness
import headline
import plots
import pytest
import report
import table
from harness import write_rows


def loss_rows():
    """A synthetic grid: naive linear in N, ours flat and twice as fast."""
    base = {
        "op": "linear_policy_loss", "package": "x", "version": "1", "status": "ok",
        "device": "cpu", "threads": 2, "torch": "2", "triton": None, "python": "3", "commit": "c",
        "date": "2026-01-01T00:00:00+00:00", "load": 0.0, "rounds": 3, "backend": "torch",
        "errors": {"loss": 1e-7, "grad_hidden": 2e-7}, "within_rule": True,
    }  # fmt: skip
    rows = []
    for dtype in ("float32", "bfloat16"):
        for n in (512, 1024, 2048):
            for kept in (1.0, 0.5, 0.2) if n == 1024 else (1.0,):
                for name, role, factor, peak in (
                    ("gemm", "limit", 1.0, 0), ("naive", "peer", 1.5, n), ("trl", "peer", 4, 300),
                    ("pyrl-cpu", "pyrl", 1.02, 60),
                ):  # fmt: skip
                    share = 1.0 if name in ("naive", "trl") else kept
                    ms = n * factor * share
                    rows.append(base | {
                        "implementation": name, "role": role, "dtype": dtype,
                        "shape": [n, 576, 49152], "kept_share": kept, "ms_p20": ms, "ms_p50": ms,
                        "ms_p80": ms, "ratio_to_limit": factor * share / kept,
                        "share_of_limit": kept / factor / share, "gflops": 100.0,
                        "peak_mib": float(peak), "grads_mib": 55.0,
                    })  # fmt: skip
    return rows


def test_the_document_is_the_same_bytes_from_the_same_files(tmp_path):
    harness.write_rows(tmp_path / "linear_policy_loss.jsonl", loss_rows())
    first = {path.name: path.read_bytes() for path in report.write(tmp_path)}
    second = {path.name: path.read_bytes() for path in report.write(tmp_path)}
    assert first == second and len(first) == 4
    text = first["RESULTS.md"].decode()
    assert "| 1024 576 49152 | bfloat16 | 50% | 512 | pyrl-cpu | 522 | 1.02 | 5 | naive |" in text
    assert "| pyrl-cpu | N 1024 D 576 V 49152 | float32 | 1044 | 0.50 | 0.20 |" in text
    assert "| naive | N 1024 D 576 V 49152 | float32 | 1536 | 1.00 | 1.00 |" in text


def test_scoring_rows_look_different_and_are_shown():
    text = report.scoring_markdown([{
        "commit": "0123456789", "machine": "m", "versions": {"torch": "2"}, "steps": 1,
        "added": {"none": 0.0, "after": 0.08},
        "rows": {arm: [{"seconds": 2.0, "score": 0.5}] for arm in ("none", "after")},
    }])  # fmt: skip
    assert "| after | 2.00 | 0.500 | +8.0% |" in text and "commit 0123456" in text


def test_no_curve_without_three_sizes_and_no_picture_without_rows(tmp_path):
    rows = [r for r in loss_rows() if r["shape"][0] == 1024]
    assert plots.curves(rows, tmp_path / "x.png") is None
    assert plots.bars([], tmp_path / "x.png") is None
    assert plots.shares([], tmp_path / "x.png") is None
    assert plots.curves(loss_rows(), tmp_path / "x.png") == tmp_path / "x.png"


def test_rates_of_a_gpu_read_in_teraflops():
    row = loss_rows()[0] | {"gflops": 612_345.0}
    assert table.cells(row)[4] == "612 TFLOP/s"
    assert table.cells(row | {"rounds": 1})[2] == "512 (once)"


def head_row(**changes):
    row = next(r for r in loss_rows() if r["implementation"] == "pyrl-cpu")
    return row | {"backend": "cpu", "shape": [2048, 576, 49152], **changes}


def test_targets_say_whether_they_are_met():
    rows = [
        head_row(peak_mib=119.0, ms_p50=100.0),
        head_row(peak_mib=None, ms_p50=56.0, kept_share=0.5),
        head_row(peak_mib=None, ms_p50=25.0, kept_share=0.2, ratio_to_limit=1.2),
        head_row(shape=[1024, 576, 49152], peak_mib=120.0, ratio_to_limit=1.051),
        head_row(implementation="pyrl-torch", backend="torch", ratio_to_limit=9.0),
        {"op": "linear_policy_loss", "role": "peer", "status": "absent", "backend": "torch"},
    ]
    steps = [
        {"implementation": name, "status": "ok", "seconds": s, "peak_mib": m, "dtype": "float32",
         "run": run}
        for name, s, m, run in (
            ("trl", 60.0, 9e3, "b"), ("trl-lean", 50.0, 4e3, "b"), ("pyrl", 10.0, 4.5e3, "b"),
            ("trl-bf16", 9.0, 9e3, "a"), ("pyrl-bf16", 5.0, 4e3, "b"),  # of different runs
        )
    ]  # fmt: skip
    packed = [
        {"implementation": "a", "status": "ok", "shape": [10**6], "ms_p50": ms,
         "rows_over_bound": over} for ms, over in ((400.0, 1.001), (900.0, 1.0005))
    ]  # fmt: skip
    given = {"linear_policy_loss": rows, "trainer_step": steps, "packing": packed}
    text = headline.markdown(given)
    target = "≤ ×1.05 of the bare products, ≤ gradients + 64 MiB"
    head = "| hidden → loss, CPU, N {} D 576 V 49152, float32 | " + target
    assert head.format(2048) + " | ×1.020, + 64 MiB | yes |" in text
    assert head.format(1024) + " | ×1.051, + 65 MiB | **no** |" in text
    assert (
        "| 50% of the rows kept, N 2048, float32 | ≤ 0.55 of the whole time | 0.560 | **no**"
        in text
    )
    assert (
        "| 20% of the rows kept, N 2048, float32 | ≤ 0.25 of the whole time | 0.250 | yes |" in text
    )
    assert "beside trl-lean | ≤ ⅓ of its seconds | 0.20 | yes |" in text
    assert "| 4500 against 4000 MiB | **no** |" in text
    assert "trl-bf16" not in text
    assert "| 0.90 s, × 1.0010 | yes |" in text
    assert headline.NO_GPU_FIGURE in text
    assert headline.NO_GPU_FIGURE not in headline.markdown(given | {"gpu_check": [{}]})
    assert headline.markdown({}) == ""


def test_a_row_of_an_older_version_costs_its_section_only(tmp_path):
    rows = loss_rows()
    del rows[0]["load"]
    write_rows(tmp_path / "linear_policy_loss.jsonl", rows)
    packed = head_row(op="packing", status="absent", reason="not built", settings="short")
    write_rows(tmp_path / "packing.jsonl", [packed])
    text = report.write(tmp_path)[0].read_text()
    assert "Not shown: results/linear_policy_loss.jsonl has a row without 'load'" in text
    assert "`pyrl bench --only linear_policy_loss` writes it anew" in text
    assert "## Packing" in text and "absent: not built" in text


def test_a_broken_line_is_named_and_an_empty_folder_too(tmp_path):
    with pytest.raises(ValueError, match=r"no \*\.jsonl to report on"):
        report.write(tmp_path)
    (tmp_path / "packing.jsonl").write_text('{"op": 1}\n{"op"\n')
    with pytest.raises(ValueError, match=r"packing\.jsonl, line 2"):
        report.write(tmp_path)


def test_conditions_are_one_line_where_they_differ_in_load_alone():
    rows = [head_row(load=0.5), head_row(load=2.9), head_row(load=9.0, commit="d")]
    first, second = table.conditions_text(rows).splitlines()
    assert first.endswith("commit c, 2026-01-01, load 0.5–2.9 before the run")
    assert second.endswith("commit d, 2026-01-01, load 9 before the run")
    assert "other work 0.02 cores" in table.conditions_text([head_row(other_cores=0.02)])


def test_tables_need_no_rich(monkeypatch, capsys):
    monkeypatch.setattr(table, "Console", None)
    monkeypatch.setattr(table, "Table", None)
    table.terminal().print("[dim]checking")
    table.show(loss_rows()[:2])
    out = capsys.readouterr().out
    assert out.startswith("checking\n") and "| gemm | 1 | 512 (512–512) |" in out


def test_report_is_made_from_files_alone(tmp_path):
    members = [row for row in loss_rows() if row["shape"][0] == 1024]
    write_rows(tmp_path / "linear_policy_loss.jsonl", members)
    steps = {
        "op": "trainer_step", "implementation": "trl", "version": "1", "dtype": "float32",
        "shape": [8, 8, 32], "kept_share": 1.0, "settings": "dense reward", "note": "as is",
        "status": "failed", "reason": "no memory", "device": "cpu", "threads": 2, "torch": "2",
        "commit": "c", "date": "2026-01-01T00:00:00+00:00", "load": 0.1,
    }  # fmt: skip
    write_rows(tmp_path / "trainer_step.jsonl", [steps])
    text_path, *pictures = report.write(tmp_path)
    text = text_path.read_text()
    assert [p.name for p in pictures] == [
        "linear_policy_loss.png", "linear_policy_loss_share.png",
    ]  # fmt: skip
    assert all(picture.name in text for picture in pictures)
    assert "failed: no memory" in text and "× limit" in text
