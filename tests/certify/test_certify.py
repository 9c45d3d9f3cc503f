"""The certificate itself: what is wrong is caught, what is right passes, the document says so."""

import itertools

import pytest
import torch

import pyrl.certify.run
from pyrl import LossSpec
from pyrl.certify import advantages, cases, formulas, report, run
from pyrl.certify.batches import PADDED, RAGGED, Shape, laid_out, numbers
from pyrl.certify.measure import linear_row, objective_row
from pyrl.certify.peers.base import Case, Comparison, judge
from pyrl.certify.rule import Row, Sample, distance
from pyrl.certify.rule import judge as judge_row
from pyrl.cli import main
from pyrl.ops.backends import torch as plain_backend
from pyrl.parity import serving

SPEC = LossSpec(kl_coef=0.1, entropy_coef=0.02)
FAST = [name for name in serving() if name not in run.interpreted()]


def row(dtype=torch.float32, **options):
    return linear_row("shapes", "case", SPEC, RAGGED, dtype, ["torch"], **options)


@pytest.mark.parametrize("dtype", run.DTYPES)
def test_a_wrong_log_prob_is_caught(monkeypatch, dtype):
    right, off = plain_backend.logits_stats, 1e-4 if dtype == torch.float32 else 0.05

    def wrong(*args, **options):
        logprob, *rest = right(*args, **options)
        return (logprob + off, *rest)

    assert not row(dtype).failures
    monkeypatch.setattr(plain_backend, "logits_stats", wrong)
    assert any("loss is off by" in text for text in row(dtype).failures)


def test_a_wrong_gradient_is_caught(monkeypatch):
    right = plain_backend.logits_grad_

    def wrong(z, *args, **options):
        right(z, *args, **options)
        z[0] *= 1.001

    monkeypatch.setattr(plain_backend, "logits_grad_", wrong)
    failures = row().failures
    assert {f"d{name}" for name in ("hidden", "weight", "bias")} == {
        text.split(": ")[1].split()[0] for text in failures
    }
    assert "shapes · case · ragged, one completion empty · f32 · torch: " in failures[0]


def test_a_loss_that_reads_padding_is_caught(monkeypatch):
    right = pyrl.policy_objective

    def wrong(logprob, *args, **options):
        out = right(logprob, *args, **options)
        return out._replace(loss=out.loss + 0 * logprob.sum())  # the padding holds NaN

    assert not objective_row("policy_objective", "case", SPEC, PADDED, ["torch"]).failures
    monkeypatch.setattr(pyrl, "policy_objective", wrong, raising=False)
    failures = objective_row("policy_objective", "case", SPEC, PADDED, ["torch"]).failures
    assert "loss is off by inf" in failures[0]


def test_what_is_not_finite_or_of_another_shape_is_infinitely_far():
    truth = torch.tensor([1.0, 2.0])
    assert distance(truth, truth) == 0
    assert distance(torch.tensor([1.0, torch.nan]), truth) == float("inf")
    assert distance(torch.ones(3), truth) == float("inf")
    assert distance(torch.tensor([0.5, 0.0]), torch.zeros(2)) == 0.5


def test_a_refusal_must_name_the_backend_and_must_come():
    def answer(backend):
        if backend == "silent":
            return {"loss": torch.ones(())}
        raise NotImplementedError("no such op" if backend == "vague" else f"{backend}: no such op")

    def judged(backend, refuse):
        blank = Row(section="s", case="c", option="", shape="x", dtype=torch.float32, plain=None)
        sample = Sample({"loss": torch.ones(())}, None, answer)
        return judge_row(blank, [backend], [sample], refuse)

    assert judged("named", ["named"]).refused == ["named"]
    assert not judged("named", ["named"]).failures and not judged("silent", []).failures
    assert judged("vague", ["vague"]).failures and judged("silent", ["silent"]).failures
    assert judged("named", []).failures


def test_the_margin_alone_bounds_what_has_no_plain_torch():
    def judged(off):
        blank = Row(section="s", case="c", option="", shape="x", dtype=torch.float32, plain=None)
        sample = Sample({"a": torch.ones(4)}, None, lambda _: {"a": torch.full((4,), 1 + off)})
        return judge_row(blank, ["torch"], [sample])

    assert not judged(4e-6).failures and judged(7e-6).failures


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        (run._objectives, 24), (run._losses, 12), (run._logits, 4), (run._heads, 24),
        (run._shapes, 16), (run._supports, 8), (advantages.groups, 40), (advantages.gae, 8),
        (formulas.value, 20), (formulas.preference, 12), (advantages.kl_reward, 10),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_the_quick_run_passes(rows, count):
    found = list(itertools.islice(rows(FAST, True), count))
    assert found and not [text for row in found for text in row.failures]


def test_every_objective_takes_every_option_that_its_spec_allows():
    refused = {
        (name, option)
        for name, objective in cases.OBJECTIVES.items()
        for option, extra in cases.OPTIONS.items()
        if cases.spec(objective, extra) is None
    }
    levels = ("tis, sequence", "mis, sequence", "icepop, geometric")
    assert refused == {("vespo", level) for level in levels}


def test_padding_is_poisoned_and_the_rest_unchanged():
    packed = numbers(Shape(name="", lengths=(2, 0, 3), kept=1.0))
    shape = Shape(name="", lengths=(2, 0, 3), kept=1.0, padded=True)
    padded = laid_out(packed, shape)
    inside = padded["mask"]
    assert inside.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert torch.equal(padded["logprob"][inside], packed["logprob"])
    assert padded["old_logprob"][~inside].isnan().all() and "cu_seqlens" not in padded


def comparison(theirs, ours, **more):
    def result(value):
        return lambda: [torch.tensor(value), torch.ones(2)]

    more = {k: result(v) if k == "formula" else v for k, v in more.items()}
    case = Case(name="c", theirs="t", ours="o", run=result(theirs), oracle=result(ours), **more)
    return judge("peer 1.0", case)


def test_peers_agree_or_differ_by_the_formula_that_is_named():
    assert comparison(1.0, 1.0).verdict == "agrees"
    assert "off by" in comparison(1.1, 1.0).failures[0]
    named = comparison(2.0, 1.0, differs="theirs is twice ours", formula=2.0)
    assert not named.failures and named.verdict == "theirs is twice ours"
    assert comparison(3.0, 1.0, differs="theirs is twice ours", formula=2.0).failures
    assert "agrees" in comparison(1.0, 1.0, differs="gone", formula=1.0).failures[0]
    assert not comparison(float("nan"), 1.0, differs="NaN").failures
    assert comparison(2.0, 1.0, differs="NaN").failures
    assert "our own" in comparison(float("nan"), float("nan"), differs="NaN").failures[0]


def certificate(monkeypatch, wrong):
    rows = [row(), next(advantages.gae(["torch"], True))]
    rows += list(itertools.islice(formulas.value(["torch", *FAST[:1]], True), 1))
    if wrong:
        right = plain_backend.logits_stats
        monkeypatch.setattr(
            plain_backend,
            "logits_stats",
            lambda *a, **k: (right(*a, **k)[0] + 1, *right(*a, **k)[1:]),
        )
        rows.append(row())
    peers = [
        comparison(1.0, 1.0),
        Comparison("verl", "all", ran=False, verdict="not installed"),
    ]
    return run.Certificate(rows, peers, ["torch"], [], {"cuda": "no CUDA"})


@pytest.mark.parametrize("wrong", [False, True])
def test_the_document_and_the_exit_status(monkeypatch, tmp_path, capsys, wrong):
    found = certificate(monkeypatch, wrong)
    monkeypatch.setattr(pyrl.certify.run, "certify", lambda **_: found)
    out = tmp_path / "docs" / "parity.md"
    assert main(["certify", "--out", str(out)]) == int(wrong)
    printed, text = capsys.readouterr().out, out.read_text()
    assert text == report.markdown(found) and str(tmp_path) not in text
    assert "error(backend) <= error(plain torch, same dtype) + margin" in text
    assert "make certify" in text and "- not measured, `cuda`: no CUDA" in text
    for section in ("shapes", "gae", "value_loss", "Peers"):
        assert f"\n## {section}\n" in text
    assert "| c | t | o | 0 | 0 | agrees |" in text and "### verl\n\nnot installed" in text
    assert ("**" in text.partition("## Summary")[2]) == wrong
    assert ("FAILED shapes · case" in printed) == ("## Failures" in text) == wrong
