"""The tiny model for puzzles, and the miniature that trains it."""

import pytest
import torch

from pyrl.models import load_policy
from pyrl.repro import clue_model, temporal_clue
from pyrl.repro.claim import Verdict
from pyrl.tasks.generated import side
from pyrl.tasks.temporal_clue.canonical import key
from pyrl.tasks.temporal_clue.compact import render_compact
from pyrl.tasks.temporal_clue.prompt import answers
from pyrl.tasks.temporal_clue.sheet import perfect_sheet, score_sheet

SMALL = clue_model.Recipe(width=16, layers=1, heads=2, puzzles=12, steps=3, batch=4, warmup=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that has hardly learned anything."""
    folder = tmp_path_factory.mktemp("clue") / "model"
    clue_model.make(folder, SMALL)
    return folder


def test_a_line_is_a_token_and_sheets_survive():
    puzzles = clue_model.training_puzzles(20)
    texts = [(render_compact(puzzle), perfect_sheet(answers(puzzle)) + "\n") for puzzle in puzzles]
    tokenizer = clue_model.line_tokenizer(text for pair in texts for text in pair)
    assert {side(key(puzzle)) for puzzle in puzzles} == {"train"}
    for puzzle, (shown, sheet) in zip(puzzles, texts, strict=True):
        asked = len(puzzle.questions)
        lines = tokenizer.encode(shown)
        assert len(lines) == shown.count("\n") + asked  # letters of questions are tokens
        assert len(tokenizer.encode(sheet)) == 2 * asked
        assert tokenizer.unk_token_id not in [*lines, *tokenizer.encode(sheet)]
        decoded = tokenizer.decode(tokenizer.encode(sheet), skip_special_tokens=True)
        assert score_sheet(answers(puzzle), decoded) == 1
    strange = tokenizer.encode("A hitherto unseen text.")
    assert strange == [tokenizer.unk_token_id] * 5


def test_a_made_model_loads_and_ends_where_sheets_end(small):
    policy = load_policy(str(small))
    end = policy.tokenizer.eos_token_id
    assert policy.model.generation_config.eos_token_id == end
    assert policy.tokenizer.convert_ids_to_tokens(end) == clue_model.END


def test_the_same_recipe_makes_the_same_model(small, tmp_path):
    before = torch.random.get_rng_state()
    clue_model.make(tmp_path, SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    once, again = (load_policy(str(f), check=False).model for f in (small, tmp_path))
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_folder_is_made_once_and_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRL_CACHE", str(tmp_path))

    def broken(folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(clue_model, "make", broken)
    with pytest.raises(KeyboardInterrupt):
        clue_model.folder()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(clue_model, "make", lambda folder: (folder / "a").touch())
    made = clue_model.folder()
    monkeypatch.setattr(clue_model, "make", broken)
    assert clue_model.folder() == made and (made / "a").is_file()


def test_the_arms_differ_in_the_pool_only():
    full, few = (temporal_clue.configuration(arm, 3) for arm in temporal_clue.ARMS)
    assert few.task.options == full.task.options | {"limit": 16}
    assert full.task.options["seed"] == full.train.seed == 3
    same = {key: value for key, value in full.identity().items() if key != "task.options.limit"}
    assert {k: v for k, v in few.identity().items() if k != "task.options.limit"} == same


def test_what_a_run_says():
    ends = [{"mean": m, "low": m - 0.1, "high": m + 0.1} for m in (0.5, 0.75)]
    rows = [
        {"step": 1, "reward_mean": 0.4, "heldout_mean": 0.6}
        | {"heldout_low": 0.5, "heldout_high": 0.7},
        {"step": 2, "reward_mean": 0.5},
    ]
    summary = {"heldout_before": ends[0], "heldout_after": ends[1], "seconds": 4.0}
    run = temporal_clue.read(summary, rows)
    assert run.steps == [0, 1, 2] and run.accuracy == [0.5, 0.6, 0.75]
    assert run.low == [0.4, 0.5, 0.65] and run.reward == [0.4, 0.5]


def test_claims_and_charts_come_from_the_runs():
    def run(end, reward):
        return temporal_clue.Run([0, 10, 20], [0.6, 0.7, end], [0.5] * 3, [0.9] * 3, reward, 1.0)

    runs = {
        temporal_clue.FULL: [run(0.8 + i / 100, [0.5] * 20) for i in range(4)],
        temporal_clue.FEW: [run(0.4 + i / 99, [0.9] * 20) for i in range(4)],
    }
    result = temporal_clue._result(runs, temporal_clue.configuration(temporal_clue.FULL, 0))
    found = [result.verdict(claim) for claim in result.claims]
    assert found == [Verdict.AGREES, Verdict.DISAGREES, Verdict.AGREES]
    heldout, training = result.charts
    assert heldout.lines[0].x == [0, 10, 20] and heldout.lines[0].y[1] == [0.6, 0.7, 0.81]
    assert training.lines[1].x == [5.5, 15.5] and training.lines[1].y[0] == [0.9, 0.9]
    assert result.tables[0].rows[0] == [
        "full pool", "0", "0.600 [0.500, 0.900]", "0.800 [0.500, 0.900]", "1"
    ]  # fmt: skip
