"""The comparison reads run folders; those that are finished are not run again."""

import json

import pytest

from pyrl.repro import document, smollm2
from pyrl.repro.claim import Result
from pyrl.trainer.config import Config
from pyrl.trainer.recipe import load


def finished(folder, samples, after):
    folder.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "seconds": 2.0,
            "samples_total": samples * step,
            "signal_share": 0.5,
            "updates": 2,
            "entropy": 1.0,
            "heldout_mean": 0.2 if step == 2 else None,
            "budget_pilot_samples": 4,
        }
        for step in (1, 2, 3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {"heldout_before": {"mean": 0.1}, "heldout_after": {"mean": after}}
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRL_REPRO_RUNS", str(tmp_path / "runs"))
    for seed in (0, 1):
        for name in smollm2.ARMS:
            tag = name.lower().replace("+", "p")
            finished(tmp_path / f"runs/{tag}-{seed}", 64, 0.3 + seed / 10)
    return smollm2.compare(2, False)


def test_finished_runs_become_a_table_and_two_charts(result, tmp_path):
    (table,), (by_samples, by_seconds) = result.tables, result.charts
    assert [row[0] for row in table.rows] == list(smollm2.ARMS)
    assert table.rows[0][2].startswith("0.350 [") and table.rows[0][3] == "0.300 0.400"
    assert table.rows[0][4:8] == ["192", "12", "6", "50%"]
    line = by_samples.lines[0]
    assert line.x == [0, 128, 192] and line.y == [[0.1, 0.2, 0.3], [0.1, 0.2, 0.4]]
    assert by_seconds.lines[0].x == [0, 4, 6]
    assert not result.claims  # no verdict from two seeds
    document.save(result, tmp_path / "docs")
    text = document.write(tmp_path / "docs").read_text()
    assert "GVM-GRPO" in text and "Settings of all arms" in text
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result


@pytest.mark.parametrize("name", smollm2.ARMS)
def test_every_arm_is_a_recipe_with_the_same_updates(name):
    config = load(None, smollm2.BASE | smollm2.ARMS[name])
    assert isinstance(config, Config)
    assert (config.train.steps, config.train.updates_per_step) == (smollm2.STEPS, 2)
    assert config.train.steps % config.budget.steps == 0 or config.budget.kind == "uniform"


def test_a_failed_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRL_REPRO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(smollm2, "BASE", smollm2.BASE | {"task.name": "nothing"})
    monkeypatch.setattr(smollm2, "ARMS", {"GRPO": {}})
    with pytest.raises(smollm2.RunError, match=r"(?s)quick-.*unknown task 'nothing'"):
        smollm2.compare(1, True)
