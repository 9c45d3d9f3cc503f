"""The tiny model for puzzles, and the miniature that trains it."""

import pytest
import torch

from pyrl.models import load_policy
from pyrl.repro import clue_model, temporal_clue
from pyrl.repro.claim import Result, Verdict
from pyrl.tasks import get_task
from pyrl.tasks.generated import side
from pyrl.tasks.temporal_clue.canonical import key
from pyrl.tasks.temporal_clue.sheet import perfect_sheet

SMALL = clue_model.Recipe(width=16, layers=1, heads=2, puzzles=12, steps=3, batch=4, warmup=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model that has hardly learned anything."""
    folder = tmp_path_factory.mktemp("clue") / "model"
    clue_model.make(folder, SMALL)
    return folder


def test_sheets_survive_the_tokenizer(small):
    policy = load_policy(str(small))
    tokenizer = policy.tokenizer
    task = get_task("temporal_clue", level="2x2", style="compact", train=8, heldout=2)
    for prompt in (*task.prompts("train"), *task.prompts("heldout")):
        sheet = perfect_sheet(prompt.data["answers"])
        tokens = tokenizer.encode(sheet)
        assert len(tokens) == 3 * len(prompt.data["answers"]) - 1  # letter, name, new line
        assert tokenizer.unk_token_id not in tokens
        assert task.score(prompt, tokenizer.decode(tokens, skip_special_tokens=True)) == 1
        assert len(tokenizer.encode(prompt.text)) < 130
    assert policy.model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_every_name_and_phrase_is_a_token(small):
    tokenizer = load_policy(str(small)).tokenizer
    for text in [*clue_model.names.SUSPECTS[:2], *clue_model.PHRASES, "12:00 AM", "A.", "\n"]:
        assert len(tokenizer.encode(text)) == 1, text


def test_the_same_recipe_makes_the_same_model(small, tmp_path):
    before = torch.random.get_rng_state()
    clue_model.make(tmp_path, SMALL)
    assert torch.equal(torch.random.get_rng_state(), before)
    once, again = (load_policy(str(f), check=False).model for f in (small, tmp_path))
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_it_learns_from_training_puzzles_only():
    puzzles = clue_model.training_puzzles(20)
    assert {side(key(puzzle)) for puzzle in puzzles} == {"train"}


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


def test_a_quick_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRL_CACHE", str(tmp_path))
    result = temporal_clue.temporal_clue(1, True)
    assert Result.from_dict(result.to_dict()) == result
    assert {result.verdict(claim) for claim in result.claims} == {Verdict.UNDECIDED}
    assert result.charts[0].lines[0].x == [0, 1, 2] and len(result.tables[0].rows) == 2


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
