"""The comparison reads run folders; those that are finished are not run again."""

import json

import pytest

from pyrl.repro import document, smollm2
from pyrl.repro.claim import Result
from pyrl.repro.run import reproduce
from pyrl.trainer.config import Config
from pyrl.trainer.recipe import load


def finished(folder, samples, after, values):
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(load(None, values).to_toml())
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
    summary = {"heldout_before": {"mean": 0.1}, "heldout_after": {"mean": after}, "seconds": 6.0,
               "commit": "b" * 40 if after > 0.35 else "a" * 40, "machine": "Linux, 2 CPUs",
               "versions": {"python": "3.11.7", "torch": "2.13.0"}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def result(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRL_REPRO_RUNS", str(tmp_path / "runs"))
    for seed in (0, 1):
        for name in smollm2.ARMS:
            tag = name.lower().replace("+", "p")
            values = smollm2.BASE | smollm2.ARMS[name] | {"train.seed": str(seed)}
            finished(tmp_path / f"runs/{tag}-{seed}", 64, 0.3 + seed / 10, values)
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


def test_conditions_are_those_of_the_runs(result, tmp_path, monkeypatch):
    assert result.conditions["seconds"] == 72 and result.conditions["commit"] == [
        "a" * 40,
        "b" * 40,
    ]
    monkeypatch.setattr(smollm2, "compare", lambda seeds, quick: result)
    (kept,) = reproduce(["smollm2"], out=tmp_path / "docs", say=lambda text: None)
    assert kept.conditions["seconds"] == 72 and kept.conditions["machine"] == "Linux, 2 CPUs"
    assert (
        "*2 seeds · 72 s in the steps of 12 runs, each on one thread · commit aaaaaaaaaaaa "
        "· commit bbbbbbbbbbbb · python 3.11.7 · torch 2.13.0*"
    ) in (tmp_path / "docs" / "reproductions.md").read_text()


@pytest.mark.usefixtures("result")
def test_a_finished_run_of_other_settings_is_named(tmp_path, monkeypatch):
    config = tmp_path / "runs/raftpp-0/config.toml"
    text = config.read_text()
    assert "top_k = 0\n" in text
    config.write_text(text.replace("top_k = 0\n", ""))  # what an older file lacks has its default
    smollm2.compare(1, False)
    config.write_text(text.replace("[rollout]\n", "[rollout]\ngone = 1\n"))
    with pytest.raises(smollm2.RunError, match=r"(?s)raftpp-0 .*unknown key 'rollout\.gone'"):
        smollm2.compare(1, False)
    config.write_text(text)
    changed = {"optimizer.lr": "1e-5", "eval.samples": "2"}
    monkeypatch.setattr(smollm2, "BASE", smollm2.BASE | changed)
    found = (
        r"raftpp-0 .*: eval\.samples = 4 there, 2 here; optimizer\.lr = 3e-05 there, 1e-05 here:"
    )
    with pytest.raises(smollm2.RunError, match=found):
        smollm2.compare(1, False)


@pytest.mark.parametrize("name", smollm2.ARMS)
def test_every_arm_has_a_quick_form(name):
    load(None, smollm2.BASE | smollm2.ARMS[name] | smollm2.QUICK)


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
