"""`pyrl eval` and the training loop's evaluations: the same numbers, and the pages of both."""

import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pyrl.algorithms import Attempt, Group
from pyrl.cli import main
from pyrl.trainer import evaluation_views as views
from pyrl.trainer import heldout_view, report, session
from pyrl.trainer.evaluate import Evaluation, heldout_metrics
from pyrl.trainer.evaluation_page import write_evaluation
from pyrl.trainer.evaluation_stats import Outcome, describe
from pyrl.trainer.loop import train
from pyrl.trainer.report import write_report
from pyrl.trainer.session import Session
from pyrl.trainer.tracking import RunFolder

VOID = {"meta", "path", "line", "rect"}


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts; every tag must be closed."""

    def __init__(self, path):
        super().__init__()
        self.source, self.open, self.tags, self.words = path.read_text("utf-8"), [], [], ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words += data

    def has(self, phrase):
        return phrase in re.sub(r"\s+", " ", self.words)


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch):
    monkeypatch.setattr(report, "write_curves", lambda *_: None)


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    """A finished run on two domains, with evaluations before, during and after."""
    toys = Path(__file__).with_name("toys.py")
    folder = tmp_path_factory.mktemp("run") / "run"
    config = make_config(task__name=f"{toys}:Domains", eval__prompts=6, eval__samples=4,
                         eval__every=1, train__save_model="true", train__steps=3)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "write_report", lambda path: path / "report.html")
        train(config, folder)
    return RunFolder(folder)


def evaluate(capsys, model, *arguments):
    assert main(["eval", str(model), "--json", *map(str, arguments)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress where there is no terminal
    return json.loads(printed.out)


def test_pyrl_eval_repeats_the_evaluations_of_training(run, capsys):
    record = run.read()
    assert [e["label"] for e in record.evaluations] == ["before", "step 1", "step 2", "after"]
    assert [e["step"] for e in record.evaluations] == [0, 1, 2, 3]
    after = evaluate(capsys, run.model_path, "--recipe", run.config_path)
    assert after["details"] == record.evaluations[-1]["details"]
    summary = record.summary["heldout_after"]
    assert set(summary) == {"mean", "low", "high", "prompts", "samples", "nan_rewards"}
    assert {k: after[k] for k in summary} == summary
    model = re.search(r'name = "(.*)"', record.config)[1]
    before = evaluate(capsys, model, "--recipe", run.config_path)
    assert before["details"] == record.evaluations[0]["details"]
    assert before["details"] != after["details"]


def test_metrics_of_evaluations_during_training(run):
    record = run.read()
    for metrics, evaluation in zip(record.metrics[:2], record.evaluations[1:3], strict=True):
        details = evaluation["details"]
        assert {k: v for k, v in metrics.items() if k.startswith("heldout_")} == {
            "heldout_mean": details["overall"]["mean"],
            "heldout_low": details["overall"]["low"],
            "heldout_high": details["overall"]["high"],
            "heldout_pass_at_4": details["overall"]["pass"]["4"]["mean"],
            "heldout_even": details["domains"]["even"]["mean"],
            "heldout_odd": details["domains"]["odd"]["mean"],
        }
    assert not [k for k in record.metrics[2] if k.startswith("heldout_")]
    # Only prompts with a notion of an answer vote.
    last = record.evaluations[-1]["details"]
    assert last["overall"]["majority"]["4"]["prompts"] == 3
    assert last["domains"]["odd"]["majority"] is None and last["answers_absent"] is None


def test_a_domain_with_another_keys_name_does_not_take_its_place():
    rows = [Outcome(rewards=[1.0], lengths=[1], truncated=[False], empty=[False], domain="mean"),
            Outcome(rewards=[0.0], lengths=[1], truncated=[False], empty=[False])]  # fmt: skip
    found = heldout_metrics(describe(rows))
    assert found["heldout_mean"] == 0.5
    assert set(found) == {f"heldout_{k}" for k in ("mean", "low", "high", "pass_at_1")}


def test_the_session_keeps_the_newest_details(make_config, toy, tmp_path, console, without_report):
    config = make_config(task__name=toy("Domains"), eval__prompts=4, train__steps=1)
    with Session.open(config, tmp_path / "run", resume=False, console=console) as session:
        assert session.last_evaluation is None
        result = session.heldout("before")
        assert session.last_evaluation["overall"]["mean"] == result["mean"]
        assert session.last_evaluation["blended"]["weights"] == {"even": 0.5, "odd": 0.5}


def test_evaluation_does_not_depend_on_answers_or_domains(make_config, toy, tmp_path, console):
    """What a task says beside the reward changes no sample."""
    completions = []
    for name in ("Domains", "SomeLost"):
        config = make_config(task__name=toy(name), eval__prompts=4, train__steps=1)
        with Session.open(config, tmp_path / name, resume=False, console=console) as session:
            session.heldout("before")
        completions.append([s["completion"] for s in session.folder.read().samples])
    assert completions[0] == completions[1]


def test_the_report_shows_before_and_after(run):
    page = Page(write_report(run.path))
    assert page.has("Held-out avg@k: mean reward")
    assert re.search(r"before\s*after\s*avg@4", page.words)
    details = [run.read().evaluations[i]["details"] for i in (0, -1)]
    for d in details:
        for name in ("even", "odd"):
            assert page.has(views.number(d["domains"][name]["mean"]))
    assert page.source.count('<path class="band"') == 2
    assert not re.search(r"<figcaption><b>heldout", page.source)  # points, not another curve


def test_the_report_without_evaluations_has_no_such_section(tmp_path):
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    assert "<h2>Held-out</h2>" not in write_report(run).read_text()


@pytest.mark.parametrize(
    "details",
    [None, [], {"overall": None}, {"overall": {"mean": "1"}},
     {"overall": {"mean": 0.5, "pass": [], "length": 3}, "domains": 7, "blended": ""},
     {"overall": {"mean": 0.5, "pass": {"x": 1, "2": {"mean": None}}, "solved": []},
      "domains": {"<b>": None, "a": {"mean": True}}, "success": "many"}],
)  # fmt: skip
def test_the_report_survives_evaluations_that_somebody_edited(tmp_path, details):
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    for label in ("before", 3):
        run.append_evaluation({"step": 0, "label": label, "details": details})
    page = Page(write_report(run))
    assert page.has("Held-out avg@k") == (details is not None and "domains" in details)
    assert page.has("<b>") == ("<b>" in str(details))


def test_only_a_periodic_evaluation_stands_for_the_latest():
    details = describe([Outcome(rewards=[1.0], lengths=[1], truncated=[False], empty=[False])])
    rows = [{"label": label, "details": details} for label in ("before", "step 5", "step 9")]
    assert heldout_view.view(rows)["names"] == ["before", "step 9"]
    assert heldout_view.view(rows[:1])["names"] == ["before"]
    assert heldout_view.view([]) is None


def test_text_output_has_a_row_a_domain_and_the_conditions(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    argv = ["eval", str(run.model_path), "--recipe", str(run.config_path), "--eval.success", "0.5"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert re.search(r"on .*Domains, held-out: \d\.\d+ \[.*\] on 6 prompts, 24 samples", text)
    parts = [r"avg@4 +0\.", r"pass@1 ", r"maj@4 .*, 3 prompts", r"\neven +3 ", r"\nodd +3 "]
    parts += [r"\nblended ", r"temperature 1, at most 6 tokens, seed 0, transformers float32"]
    for part in parts:
        assert re.search(part, text), part
    monkeypatch.setenv("COLUMNS", "50")
    assert main(argv) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("even ")]
    assert len(rows) == 1 and len(rows[0]) <= 50


def test_a_log_in_ascii_gets_the_numbers_too(run, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    assert main(["eval", str(run.model_path), "--recipe", str(run.config_path)]) == 0
    assert re.search(rb"\nodd +3 .* \? ", raw.getvalue())  # no maj@4 there: a dash


def test_out_leaves_three_files(run, capsys, tmp_path):
    out = tmp_path / "a" / "b"
    found = evaluate(capsys, run.model_path, "--recipe", run.config_path)
    assert main(["eval", str(run.model_path), "--recipe", str(run.config_path),
                 "--out", str(out)]) == 0  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "eval.html")
    assert sorted(p.name for p in out.iterdir()) == ["eval.html", "eval.json", "samples.jsonl"]
    written = json.loads((out / "eval.json").read_text())
    assert written["details"] == found["details"] and written["versions"]["torch"]
    assert written["conditions"]["temperature"] == 1.0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and rows[0]["domain"] == "even"
    assert rows[4]["prompt_id"] == rows[7]["prompt_id"] != rows[3]["prompt_id"]
    assert sum(r["reward"] for r in rows) / 24 == pytest.approx(found["mean"], abs=1e-12)
    assert sum(r["tokens"] for r in rows) == written["conditions"]["sampled_tokens"]
    page = Page(out / "eval.html")
    phrases = ["Statistics", "pass@k and maj@k", "pass@k by domain", "Highest mean reward"]
    phrases += ["Lowest mean reward", "Completion length", "6 prompts in the order"]
    for phrase in phrases:
        assert page.has(phrase), phrase
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}
        assert not {"src", "href", "action", "srcset"} & set(attributes)


def test_what_a_task_says_is_only_text(tiny, toy, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["eval", tiny, "--task", toy("Hostile"), "--prompts", "4", "--samples", "4"]
    argv += ["--model.dtype", "float32", "--train.threads", "1", "--rollout.max_new_tokens", "6"]
    assert main([*argv, "--out", str(out)]) == 0
    assert "samples lost: " in capsys.readouterr().out
    page = Page(out / "eval.html")
    assert page.has("onerror=alert(1)") and page.has("{{ 7 * 7 }}")
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 1


def test_no_score_at_all_is_said_and_exits_with_1(tiny, toy, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["eval", tiny, "--task", toy("Raises"), "--prompts", "2", "--samples", "2", "--json"]
    argv += ["--model.dtype", "float32", "--train.threads", "1", "--rollout.max_new_tokens", "4"]
    assert main([*argv, "--out", str(out)]) == 1
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["mean"] is None and result["nan_rewards"] == 4
    assert "samples lost: 4 (first reason: RuntimeError: the verifier is broken" in printed.err
    assert "Highest" not in Page(out / "eval.html").words


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--samples", "0"], ["eval.samples = 0", "> 0"]),
        (["--prompts", "0"], ["eval.prompts = 0: there is nothing to evaluate"]),
        (["--prompts", "-1"], ["eval.prompts = -1"]),
        (["--eval.success", "nan"], ["--eval.success", "nan"]),
        (["--eval.success", "high"], ["eval.success = 'high'"]),
        (["--eval.sucess", "1"], ["did you mean 'success'"]),
        (["--task", "nothing"], ["unknown task 'nothing'"]),
        (["--outt", "x"], ["unknown flag '--outt'"]),
    ],
)
def test_bad_input_is_named_and_exits_with_2(tiny, flags, parts, capsys):
    assert main(["eval", tiny, *flags]) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text and all(part in text for part in parts), text


def test_a_folder_that_cannot_be_made_is_one_sentence(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    argv = ["eval", tiny, "--task", "letters", "--prompts", "1", "--samples", "1", "--out"]
    argv += [str(tmp_path / "file" / "out"), "--model.dtype", "float32", "--train.threads", "1"]
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith("pyrl eval: ")


def made(rewards, texts=None):
    """An Evaluation of one prompt's rewards."""
    attempts = [
        Attempt([1] * (i + 1), [0.0] * (i + 1), "stop", (texts or {}).get(i, f"text {i}"), r)
        for i, r in enumerate(rewards)
    ]
    row = Outcome(rewards=rewards, lengths=[len(a.tokens) for a in attempts],
                  truncated=[False] * len(rewards), empty=[False] * len(rewards))  # fmt: skip
    details = {**describe([row]), "lost_reason": None, "answers_absent": None}
    return Evaluation({}, [Group("p", "prompt", [1], attempts)], details, None, {})


CONDITIONS = {"model": "m", "task": "t", "prompts": 1, "samples_per_prompt": 1, "temperature": 1.0,
              "max_new_tokens": 4, "seed": 0, "seconds": 1.0, "tokens_per_second": 2.0}  # fmt: skip


@pytest.mark.parametrize("rewards", [[0.5], [math.nan], [-3.0, 7.5], [0.1 * i for i in range(40)]])
def test_the_page_of_few_and_of_odd_rewards(tmp_path, rewards):
    page = Page(write_evaluation(tmp_path, made(rewards), CONDITIONS))
    assert page.has("1 prompt in the order") and not page.has("no domain")


def test_histograms_count_every_value():
    for values in ([3] * 5, [0.0, 1.0, 1.0], list(range(100)), [0.1 * i for i in range(77)],
                   [1, 1, 2, 5000], [-1.5, 2.25], [0.3]):  # fmt: skip
        view = views.histogram("h", "", [("a", "s0", values), ("b", "s1", [math.nan])])
        said = [int(n) for bar in view["bars"] for n in re.findall(r": a (\d+)", bar["title"])]
        assert sum(said) == len(values)
        assert all(top >= 0 and top + high <= 100.001 for bar in view["bars"]
                   for _, top, high in bar["boxes"])  # fmt: skip
    assert views.histogram("h", "", [("a", "s0", [])]) is None
    gaps = views.histogram("h", "", [("a", "s0", [2, 2, 5])])
    assert [text for _, text in gaps["x"]] == ["2", "3", "4", "5"]  # a length that is missing shows


def test_curves_of_one_k_and_of_none():
    entry = {"mean": 0.5, "low": 0.25, "high": 0.75}
    (line,) = views.curves("c", "", [("a", "s0", {"1": entry})])["lines"]
    assert line["band"] == "" and len(line["stems"]) == 1 and line["dots"][0][0] == 50
    view = views.curves("c", "", [("a", "s0", {"1": entry, "16": entry, "2": entry})])
    assert [text for _, text in view["x"]] == ["1", "2", "16"]  # numbers, not strings
    assert views.curves("c", "", [("a", "s0", {"1": {"mean": None}})]) is None
    assert views.number(-1e-9) == "0.000" and views.number(None) == "–"
