"""report.html and curves.png from synthetic runs: whole, tiny, broken, hostile."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pyrl.trainer import report
from pyrl.trainer.charts import CHARTS
from pyrl.trainer.report import write_report
from pyrl.trainer.tracking import RunFolder

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """\
# resolved recipe
[model]
name = "smollm2-135m"
dtype = "float32"

[rollout]
engine = "transformers"
n = 8
max_new_tokens = 32

[train]
steps = 60
seed = 0
"""


def make_metrics(step: int, steps: int, rng: random.Random) -> dict[str, Any]:
    """A step of a plausible run: reward rises, entropy falls, lengths shrink."""
    part = step / steps
    noise = rng.gauss(0, 1)
    sample, update = 3.1 + 0.3 * rng.random(), 1.6 + 0.2 * rng.random()
    seconds = sample + 0.02 + 0.4 + update + 0.01 + 0.05
    return {
        "step": step, "reward_std": 0.45, "lr": 1e-5, "groups": 8, "skipped_tokens": 0,
        "reward_mean": min(1.0, max(0.0, 0.25 + 0.5 * part + 0.05 * noise)),
        "zero_variance_groups": rng.randrange(0, 4), "nan_rewards": int(step == 7),
        "loss": -0.02 + 0.01 * noise, "policy_loss": -0.021 + 0.01 * noise,
        "kl_loss": 0.001 * part, "kl": 0.02 * part + 0.001 * abs(noise),
        "entropy": 1.9 - 0.8 * part + 0.05 * noise, "old_kl": 1e-5 * abs(noise),
        "ratio_mean": 1.0, "ratio_min": 0.8 - 0.1 * rng.random(),
        "ratio_max": 1.2 + 2 * rng.random() ** 6, "dual_clip_share": 0.0,
        "clip_low_share": 0.01 * rng.random(), "clip_high_share": 0.02 * rng.random(),
        "ess": 0.97 + 0.02 * rng.random(), "logprob_mean": -1.2 + 0.4 * part,
        "grad_norm": math.exp(0.3 * noise) * (30 if step == 40 else 1),
        "completion_length_mean": 27 - 8 * part + noise,
        "truncated_share": max(0.0, 0.4 - 0.4 * part), "tokens": 2600 + step,
        "shared_tokens": 3500 - step,
        "sampled_tokens": 1700 + int(50 * noise), "tokens_per_second": 1700 / seconds,
        "seconds": seconds, "seconds_sample": sample, "seconds_score": 0.02,
        "seconds_logprob": 0.4, "seconds_update": update, "seconds_sync": 0.01,
        "peak_rss_mib": 2900 + 3 * min(step, 10), "canary_max_diff": 2e-6 * (1 + rng.random()),
    }  # fmt: skip


def make_sample(step: int, phase: str, i: int, k: int, good: float) -> dict[str, Any]:
    rng = random.Random(f"{phase} {i} {k}")
    right = rng.random() < good
    a, b = 12 + i, 7 * i % 31
    answer = a + b if right else a + b + rng.randrange(1, 9)
    chatter = (
        f"The answer is {answer}."
        if rng.random() < good
        else f"Sure! Let's think about this step by step. First we take {a} and then we add {b} "
        f"to it, which gives us a total of {answer}, so the"
    )
    return {
        "step": step,
        "phase": phase,
        "prompt_id": f"sum-{i:04d}",
        "prompt": f"<|im_start|>user\nWhat is {a} + {b}? Answer in one short sentence.<|im_end|>\n"
        "<|im_start|>assistant\n",
        "completion": chatter,
        "reward": float(right and chatter.startswith("The")),
        "finish_reason": "stop" if chatter.endswith(".") else "length",
    }


def make_run(path: Path, *, steps: int = 60, prompts: int = 12, seed: int = 0) -> RunFolder:
    """A finished run's folder as the trainer would have left it."""
    rng = random.Random(seed)
    run = RunFolder(path).make()
    run.write_config(CONFIG)
    run.append_samples(
        [make_sample(0, "before", i, k, 0.35) for i in range(prompts) for k in (0, 1)]
    )
    metrics = [make_metrics(step, steps, rng) for step in range(1, steps + 1)]
    for m in metrics:
        run.append_metrics(m)
        run.append_samples([make_sample(m["step"], "train", m["step"], 0, m["step"] / steps)])
    run.append_samples(
        [make_sample(steps, "after", i, k, 0.85) for i in range(prompts) for k in (0, 1)]
    )
    counts = {"prompts": 64, "samples": 256}
    run.write_summary(
        {
            "heldout_before": {"mean": 0.312, "low": 0.251, "high": 0.374, **counts},
            "heldout_after": {"mean": 0.687, "low": 0.622, "high": 0.748, **counts},
            "steps": steps,
            "seconds": sum(m["seconds"] for m in metrics),
            "seconds_by_phase": {"sample": 190.0, "update": 100.0},
            "peak_rss_mib": 2930.0,
            "tokens_per_second": 330.1,
            "model": "smollm2-135m",
            "task": "sums",
            "seed": seed,
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "transformers": "5.19.0"},
        }
    )
    return run


class Page(HTMLParser):
    """A page taken apart: its tags, the text of its prompts and completions, its scripts."""

    VOID = frozenset({"meta", "br", "img", "path", "line", "rect", "link", "input"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words = ""
        self.feed(self.source)
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        entry = (tag, dict(attrs))
        self.tags.append(entry)
        if tag not in self.VOID:
            self.open.append(entry)
        if entry[1].get("class") == "text":
            self.texts.append("")
        if tag == "script":
            self.scripts.append((entry[1], ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ("", {})
        if inside[0] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif inside[0] != "style":
            self.words += data
        if inside[1].get("class") == "text":
            self.texts[-1] += data

    def has(self, phrase: str) -> bool:
        return phrase in re.sub(r"\s+", " ", self.words)

    def titles(self) -> list[str]:
        return re.findall(r"<figcaption><b>(.*?)</b>", self.source)


@pytest.fixture(autouse=True, scope="module")
def _without_curves() -> Iterator[None]:
    # Drawing takes most of a report's time and nothing here looks at it; test_charts.py does.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    run = make_run(tmp_path_factory.mktemp("runs") / "sums")
    assert write_report(run.path) == run.report_path
    return Page(run.report_path)


def test_headline(page: Page) -> None:
    assert page.has("0.312→0.687 +0.375")
    assert page.has("0.251 to 0.374 · 64 prompts, 256 samples")
    assert page.has("The intervals do not overlap.")
    assert page.has("sumsfinished")
    assert page.has("smollm2-135m on sums")


def test_shows_every_metric_that_moves(page: Page) -> None:
    # A run of GRPO has no critic, pairs, reward terms or reference that is reset.
    absent = {"Learning rate", "Reward terms", "Critic", "Preference"}
    absent |= {"Samples with an advantage", "Completions", "Age of the reference"}
    assert page.titles() == [chart.title for chart in CHARTS if chart.title not in absent]
    assert page.has("probability ratio (mean) 1, clipped tokens (dual) 0, learning rate 1e−5")


def test_charts_carry_the_numbers_of_the_metrics(page: Page) -> None:
    data = [json.loads(text) for attributes, text in page.scripts if attributes.get("type")]
    reward = data[page.titles().index("Reward")]
    assert (reward["first"], reward["last"]) == (0, 60)
    rng = random.Random(0)
    expected = [(step, make_metrics(step, 60, rng)["reward_mean"]) for step in range(1, 61)]
    assert [tuple(p) for p in reward["series"][0]["values"]] == [
        (step, float(f"{value:.4g}")) for step, value in expected
    ]


def test_counts(page: Page) -> None:
    rng = random.Random(0)
    flat = sum(make_metrics(step, 60, rng)["zero_variance_groups"] for step in range(1, 61))
    rows = dict(re.findall(r"<td>.*?</span>(.*?)</td><td>(.*?)</td>", page.source))
    assert rows["Zero-variance groups"] == f"{flat} of 480 ({flat / 480:.0%})"
    assert rows["Rewards without a value"] == "1"
    assert rows["Tokens skipped"] == "0"
    assert re.fullmatch(r"[34]\.\de-06 at step \d+", rows["Engine against trainer"])


def test_phase_times_add_up(page: Page) -> None:
    shares = re.findall(
        r"(sample|score|logprob|update|sync|other) [\d.ms ]+?s (<?\d+)%", page.words
    )
    assert [name for name, _ in shares] == ["sample", "score", "logprob", "update", "sync", "other"]
    assert abs(sum(int(share) for _, share in shares if "<" not in share) - 100) <= 3


def test_samples_stand_side_by_side(page: Page) -> None:
    assert page.has("Samples before and after training")
    first = [make_sample(step, phase, 0, k, good)
             for step, phase, good in ((0, "before", 0.35), (60, "after", 0.85))
             for k in (0, 1)]  # fmt: skip
    assert page.texts[:5] == [first[0]["prompt"], *(s["completion"] for s in first)]
    assert page.has("6 more prompts")
    assert page.has("24 samples from training")


def test_configuration_and_origin(page: Page) -> None:
    assert page.words.count('name = "smollm2-135m"') == 1
    assert page.has("0123456789abcdef0123456789abcdef01234567")
    assert page.has("2.13.0+cpu")


def test_asks_the_network_for_nothing(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "img", "base"}, tag
        for name in ("src", "href", "action", "data", "srcset"):
            assert name not in attributes, (tag, attributes)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp", page.source)


def test_only_our_script_may_run(page: Page) -> None:
    run = [(a, text) for a, text in page.scripts if a.get("type") != "application/json"]
    assert len(run) == 1 and run[0][0] == {}
    digest = base64.b64encode(hashlib.sha256(run[0][1].encode()).digest()).decode()
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    assert not any(name.startswith("on") for _, a in page.tags for name in a)


HOSTILE = (
    '</div></script><script>alert(1)</script><img src="//evil" onerror=alert(1)> & "q" \'s\' '
    "{{ 7 * 7 }} {% raw %} <!-- ]]> \x00\x1b[31m \u202eabc \ud800"
)
SHOWN = HOSTILE.replace("\x00", "⟨U+0000⟩").replace("\x1b", "⟨U+001B⟩").replace(
    "\u202e", "⟨U+202E⟩").replace("\ud800", "⟨U+D800⟩")  # fmt: skip


def test_hostile_text_is_only_text(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "<script>run").make()
    run.write_config(f'# {HOSTILE[:90]}\nkey = "</pre><script>alert(2)</script>"\n')
    run.append_metrics({"step": 1, "reward_mean": 0.5, "</script><script>": 1.0})
    run.append_samples(
        [
            {"step": 0, "phase": "before", "prompt_id": HOSTILE, "prompt": HOSTILE,
             "completion": HOSTILE, "reward": 1, "finish_reason": HOSTILE, "error": HOSTILE},
            {"step": 1, "phase": "train", "prompt_id": 1, "prompt": [{"content": HOSTILE}],
             "completion": HOSTILE, "reward": None},
        ]
    )  # fmt: skip
    run.write_summary({"model": HOSTILE, "task": HOSTILE, "commit": HOSTILE, "steps": 1})
    page = Page(write_report(run))
    assert page.texts == [SHOWN] * 4
    assert sum(tag == "script" for tag, _ in page.tags) == len(page.titles()) + 1
    assert not any(tag == "img" or "onerror" in a for tag, a in page.tags)


def test_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    run.append_samples([{"step": 0, "phase": "before", "prompt_id": 1, "completion": "x" * 5000}])
    page = Page(write_report(run))
    assert page.texts[1] == "x" * 4000 + "\n[… 1,000 more characters in samples.jsonl]"


def test_one_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=1, prompts=1)
    page = Page(write_report(run))
    dots = [a for tag, a in page.tags if (a.get("class") or "").startswith("dot ")]
    assert len(dots) > 10  # a line of one point has no length: it is drawn as a dot
    assert not page.has("moving average")


def test_the_fewest_fields(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_metrics({"step": 1})
    page = Page(write_report(run))
    assert page.titles() == []
    assert page.has("unfinished: 1 steps so far")
    assert page.has("no config.toml in this folder")


def test_before_the_first_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_config(CONFIG)
    assert Page(write_report(run)).has("no step yet")
    assert not run.curves_path.exists()


def test_a_killed_and_resumed_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rng = random.Random(0)
    for step in [*range(1, 11), *range(8, 14), 16]:
        metrics = make_metrics(step, 20, rng)
        if step == 9:
            metrics["loss"] = float("nan")
        if step == 5:  # no update, and so no loss: not a loss that is not finite
            metrics |= {"loss": None, "tokens": 0}
        run.append_metrics(metrics)
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"step": 17, "rew')
    run.append_samples([make_sample(0, "before", 0, 0, 0.5)])
    page = Page(write_report(run))
    assert page.has("unfinished: 16 steps so far")
    assert re.search(r"Steps missing</td><td>2</td>", page.source)
    assert page.has("1, first at step 9")
    assert page.has("Unreadable in metrics.jsonl")
    assert page.has("Samples before training")
    data = json.loads(page.scripts[page.titles().index("Loss")][1])
    values = dict(map(tuple, data["series"][0]["values"]))
    assert sorted(values) == [*range(1, 14), 16]
    assert values[9] is None


def test_a_summary_of_an_earlier_end_does_not_count_as_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=3, prompts=1)
    run.append_metrics(make_metrics(4, 8, random.Random(0)))
    assert Page(write_report(run)).has("unfinished: 4 steps so far")


def test_evaluations_during_training_are_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=4, prompts=1)
    middle = {"heldout_mean": 0.5, "heldout_low": 0.4, "heldout_high": 0.6}
    run.append_metrics({**make_metrics(2, 4, random.Random(0)), **middle})
    page = Page(write_report(run))
    marks = [a for _, a in page.tags if a.get("class") == "mark"]
    assert [re.match(r"left:([\d.]+)%", a["style"] or "")[1] for a in marks] == [
        "0.0", "50.0", "100.0",
    ]  # fmt: skip


def test_a_reward_that_did_not_rise_is_told_as_it_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2, prompts=1)
    same = {"mean": 0.30, "low": 0.25, "high": 0.36, "prompts": 64, "samples": 64}
    summary = run.read().summary
    run.write_summary({**summary, "heldout_after": same})
    page = Page(write_report(run))
    assert page.has("−0.012")
    assert page.has("The intervals overlap.")
    assert any(a.get("class") == "change down" for _, a in page.tags)


def test_a_long_run_stays_light_and_keeps_its_spikes(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=900, prompts=1)
    page = Page(write_report(run))
    assert len(page.source) < 500_000
    norm = json.loads(page.scripts[page.titles().index("Gradient norm")][1])["series"][0]["values"]
    assert len(norm) <= 404
    assert 40 in [step for step, value in norm if value > 10]


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a run folder: it has none of config\.toml"):
        write_report(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
