"""The memory benchmark: one variant measured small, tables, failures named."""

import json

import memory
import pytest
import report
from harness import write_rows

pytest.importorskip("peft", reason="peft is an extra")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    from pyrl.testing import tiny_model_folder

    monkeypatch.setattr(memory, "MODEL", tiny_model_folder(tmp_path / "m", vocab_size=40_000))
    return {"sequences": 2, "length": 32, "steps": 2, "threads": 1, "sampled": 2}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_variant_holds(tiny, checkpointing):
    whole = memory.Variant(name="w", dtype="bfloat16", gradient_checkpointing=checkpointing)
    lean = memory.Variant(name="l", lora_rank=2, gradient_checkpointing=checkpointing)
    all_weights, adapters = (memory.measure(v, tiny) for v in (whole, lean))
    mib = 2**20
    numbers = all_weights["trained"]
    # fp32 masters and two moments of every trained number, bf16 weights
    assert all_weights["optimizer_mib"] == pytest.approx(12 * numbers / mib, rel=0.02)
    assert all_weights["weights_mib"] == pytest.approx(2 * numbers / mib, rel=0.02)
    assert adapters["trained"] < 0.01 * numbers
    assert adapters["optimizer_mib"] < 0.02 * all_weights["optimizer_mib"]
    assert adapters["saved_mib"] >= adapters["saved_offloaded_mib"]
    assert json.loads(json.dumps(adapters))["seconds"] >= 0


def test_tables_hold_every_variant_and_why_one_is_missing(tmp_path):
    ok = {
        "op": "memory", "implementation": "LoRA 16", "dtype": "bfloat16", "shape": [8, 256],
        "status": "ok", "seconds": 1.5, "peak_mib": 900.0, "weights_mib": 266.0, "threads": 1,
        "optimizer_mib": 56.0, "saved_mib": 49.0, "saved_offloaded_mib": 3.0, "ms_token": 118.4,
        "device": "cpu", "torch": "2", "python": "3", "commit": "c", "date": "2026-01-01T00:00",
        "load": 0.0, "kept_share": 1.0, "settings": "smollm2-135m",
    }  # fmt: skip
    failed = {**ok, "implementation": "LoRA 16, int8", "status": "failed", "reason": "no torchao"}
    write_rows(tmp_path / "memory.jsonl", [ok, failed])
    (target,) = report.write(tmp_path)
    text = target.read_text()
    assert "## Training in less memory" in text
    assert "| LoRA 16 | bfloat16 | 1.50 | 900 | 266 | 56 | 49 | 3 | 118 |" in text
    assert "failed: no torchao" in text
    with pytest.raises(ValueError, match="memory has no implementation 'x'"):
        memory.run(tmp_path, names=("x",))
