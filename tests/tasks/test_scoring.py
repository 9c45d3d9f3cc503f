import math
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pyrl.tasks import Scorer, get_task

OWN = Path(__file__).with_name("own_tasks.py")

#: completion → reward, or a part of the error text.
IN_A_PROCESS = {
    "fine": 0.5,
    "true": 1.0,
    "numpy": 0.25,
    "numpy_bool": 1.0,
    "fraction": 0.25,
    "print": 0.75,
    "raise": "KeyError: 'no such answer' (own_tasks.py:",
    "raise_unprintable": "Mute",
    "raise_huge": "ValueError: xxx",
    "nan": "the reward is nan",
    "inf": "the reward is inf",
    "beyond_fp32": "the reward is -1e+39, beyond float32",
    "edge_of_fp32": 3.4e38,
    "overflow": "OverflowError",
    "string": "the reward is no number: str '0.5'",
    "none": "the reward is no number: NoneType None",
    "array": "the reward is no number: ndarray",
    "complex": "the reward is no number: complex",
    "unpicklable": "the reward is no number: function",
    "huge": "the reward is no number: str 'xxx",
    "no_such_method": "AttributeError",
    "sys_exit": "SystemExit: 0",
    "interrupt": "KeyboardInterrupt",
}
NOT_HERE = ("print", "sys_exit", "interrupt", "raise_unprintable")
HERE = {k: v for k, v in IN_A_PROCESS.items() if k not in NOT_HERE}


@pytest.fixture(scope="module")
def bad():
    return get_task(f"{OWN}:Bad")


@pytest.fixture(scope="module")
def scorer(bad):
    with Scorer(bad, workers=1, deadline=3.0) as scorer:
        yield scorer


def items(task, *completions):
    prompt = task.prompts("train")[0]
    return [(prompt, c) for c in completions]


def check(score, expected):
    if isinstance(expected, float):
        assert score.reward == expected and score.error is None
    else:
        assert math.isnan(score.reward)
        assert expected in score.error and len(score.error) < 1000


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a killed grandchild may wait for init as a zombie
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_bad_rewards_cost_their_own_sample_only(bad, scorer, capfd):
    scores = scorer.score(items(bad, *(c for name in IN_A_PROCESS for c in (name, "fine"))))
    for score, expected in zip(scores[::2], IN_A_PROCESS.values(), strict=True):
        check(score, expected)
    assert all(s.reward == 0.5 for s in scores[1::2])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("completion", "error"),
    [
        ("hang", "the reward took longer than its 3 s"),
        ("exit", "the reward ended its process: exit code 3"),
        ("segfault", "the reward ended its process: exit code -6"),
    ],
)
def test_a_dead_process_is_replaced(bad, scorer, completion, error):
    before, lost, after = scorer.score(items(bad, "pid", completion, "pid"))
    check(lost, error)
    assert after.error is None and after.reward != before.reward
    assert gone(int(before.reward)) and alive(int(after.reward))


def test_a_killed_reward_takes_its_children_with_it(bad, tmp_path, monkeypatch):
    file = tmp_path / "pids"
    monkeypatch.setenv("PYRL_TEST_PIDS", str(file))
    with Scorer(bad, deadline=2.0) as scorer:
        check(scorer.score(items(bad, "hang_with_child"))[0], "longer than its 2 s")
        assert all(gone(int(pid)) for pid in file.read_text().split())


def test_close_leaves_nothing_running(bad):
    scorer = Scorer(bad, workers=2)
    pids = {int(s.reward) for s in scorer.score(items(bad, *["pid"] * 50))}
    assert os.getpid() not in pids
    scorer.close()
    assert all(gone(pid) for pid in pids)
    scorer.close()  # twice is fine
    with pytest.raises(ValueError, match="closed"):
        scorer.score(items(bad, "fine"))


def test_a_killed_run_leaves_nothing_running(tmp_path):
    """SIGKILL of the parent, while a reward hangs in its process."""
    file = tmp_path / "pids"
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
        from pyrl.tasks import Scorer, get_task
        if __name__ == "__main__":
            task = get_task({f"{OWN}:Bad"!r})
            Scorer(task, deadline=500.0).score([(task.prompts("train")[0], "hang_with_child")])
        """)
    )
    run = subprocess.Popen(
        [sys.executable, script], env={**os.environ, "PYRL_TEST_PIDS": str(file)}
    )
    end = time.monotonic() + 60
    while not (file.exists() and " " in file.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    pids = [int(pid) for pid in file.read_text().split()]
    assert all(alive(pid) for pid in pids)
    run.kill()
    run.wait()
    assert all(gone(pid) for pid in pids)


def run_script(path, text):
    path.write_text(textwrap.dedent(text))
    return subprocess.run(
        [sys.executable, path], capture_output=True, text=True, timeout=60
    )  # fmt: skip


def test_a_script_needs_no_main_guard_unless_the_task_is_its_own(tmp_path):
    done = run_script(tmp_path / "run.py", f"""
        from pyrl.tasks import Scorer, get_task
        task = get_task({f"{OWN}:Good"!r})
        print(Scorer(task).score([(task.prompts("train")[0], "x")])[0].reward)
        """)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "0.0\n"), done.stderr
    own = textwrap.dedent("""
        from pyrl.tasks import Scorer, user_prompt

        class Mine:
            name = "mine"

            def prompts(self, split):
                return [user_prompt("a", "b")]

            def score(self, prompt, completion):
                return 0.5

        def main():
            task = Mine()
            print(Scorer(task).score([(task.prompts("train")[0], "x")])[0].reward)
        """)
    guarded = run_script(tmp_path / "a.py", own + "if __name__ == '__main__':\n    main()\n")
    assert (guarded.returncode, guarded.stdout) == (0, "0.5\n"), guarded.stderr
    bare = run_script(tmp_path / "b.py", own + "main()\n")
    assert bare.returncode == 1 and "if __name__ == '__main__'" in bare.stderr


def test_standard_input_is_a_script_too(tmp_path):
    text = f"""
from pyrl.tasks import Scorer, get_task
task = get_task({f"{OWN}:Good"!r})
print(Scorer(task).score([(task.prompts("train")[0], "x")])[0].reward)
class Mine(type(task)):
    pass
Scorer(Mine())
"""
    done = subprocess.run([sys.executable, "-"], input=text, capture_output=True, text=True,
                          timeout=60, cwd=tmp_path)  # fmt: skip
    assert done.stdout == "0.0\n"
    assert "interactive session cannot be sent to another process" in done.stderr


def test_trusted_tasks_are_scored_right_here():
    task = get_task(f"{OWN}:Trusted")
    with Scorer(task) as scorer:
        assert scorer.score(items(task, "pid"))[0].reward == os.getpid()
        for score, expected in zip(scorer.score(items(task, *HERE)), HERE.values(), strict=True):
            check(score, expected)


#: completion → reward (None: lost), answer, a part of the answer's error.
ANSWERS = {
    "fine four": (0.5, "4", None),
    "fine nothing": (0.5, None, None),
    "raise four": (None, "4", None),
    "fine subclass": (0.5, "quiet", None),
    "fine number": (0.5, None, "the answer is no string: int 4"),
    "fine not_here": (0.5, None, "NotImplementedError: no notion of an answer"),
    "fine hang": (0.5, None, "the answer took longer than its 2 s"),
    "fine exit": (0.5, None, "the answer ended its process: exit code 4"),
    "true four": (1.0, "4", None),
}


@pytest.mark.parametrize("name", ["Answers", "TrustedAnswers"])
def test_answers_come_beside_the_rewards_and_cost_none(name):
    task = get_task(f"{OWN}:{name}")
    texts = [t for t in ANSWERS if name == "Answers" or t.split()[1] not in ("hang", "exit")]
    with Scorer(task, deadline=2.0) as scorer:
        assert scorer.has_answers
        scores = scorer.score(items(task, *texts), answers=True)
        for score, (reward, answer, error) in zip(scores, map(ANSWERS.get, texts), strict=True):
            assert score.reward == reward if reward is not None else math.isnan(score.reward)
            assert score.answer == answer and type(score.answer) in (str, type(None))
            assert (score.answer_error is None) == (error is None)
            assert (error or "") in (score.answer_error or "")
        plain = scorer.score(items(task, "fine four"))[0]
        assert (plain.reward, plain.answer, plain.answer_error) == (0.5, None, None)


def test_answers_of_a_task_without_any(bad, scorer):
    assert not scorer.has_answers
    with pytest.raises(ValueError, match="task 'good' has no method 'answer'"):
        scorer.score(items(bad, "fine"), answers=True)


def test_options_travel_to_the_process():
    task = get_task(f"{OWN}:Good", bonus=0.25)
    prompt = task.prompts("train")[0]
    with Scorer(task) as scorer:
        assert [s.reward for s in scorer.score([(prompt, "x"), (prompt, prompt.id)])] == [
            0.25,
            1.25,
        ]


def test_nothing_starts_before_there_is_something_to_score(bad):
    with Scorer(bad) as scorer:
        assert scorer.score([]) == []
        assert scorer._pool is None


def test_a_task_that_cannot_be_sent_or_loaded_is_an_error_of_the_run(bad):
    with pytest.raises(ValueError, match=r"'good' cannot be sent to a scoring process.*lambdas"):
        Scorer(get_task(f"{OWN}:Unsendable"))
    broken = get_task(f"{OWN}:Broken")
    with (
        Scorer(broken) as scorer,
        pytest.raises(RuntimeError, match=r"could not load the task: OSError: the data file"),
    ):
        scorer.score(items(broken, "x"))


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"deadline": 0.0}, {"deadline": math.nan}])
def test_argument_mistakes(bad, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Scorer(bad, **arguments)
