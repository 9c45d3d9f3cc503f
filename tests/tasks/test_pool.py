"""The processes behind `Scorer`: nothing that happens to them loses more than a call."""

import contextlib
import math
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

import psutil
import pytest

from pyrl.tasks import Scorer, get_task, pool, scoring, user_prompt

OWN = Path(__file__).with_name("own_tasks.py")


@pytest.fixture
def numbers():
    return get_task(f"{OWN}:Number")


def workers_of(parent):
    found = []
    for child in parent.children():
        try:
            if "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:  # ended meanwhile
            continue
    return found


def kill_one(rng):
    """1 if a worker got a deadly signal."""
    child = rng.choice(workers_of(psutil.Process()) or [None])
    try:
        if child is not None:
            child.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV]))
    except psutil.Error:  # ended meanwhile
        return 0
    return int(child is not None)


def test_ten_thousand_scorings_under_random_kills(numbers):
    """Every one has its reward in its place, or NaN and the reason; each kill costs one at most."""
    prompt = numbers.prompts("train")[0]
    rng, kills, scores = random.Random(0), 0, []
    with Scorer(numbers, workers=2) as scorer:
        scorer.score([(prompt, "0")])
        for begin in range(0, 10_000, 1000):
            pending = []
            for i in range(begin, begin + 1000):
                pending.append(scorer.submit(prompt, str(i)))
                if rng.random() < 0.001 or i == begin + 500:
                    kills += kill_one(rng)
            scores += [one.result() for one in pending]
    lost = [s for s in scores if math.isnan(s.reward)]
    assert len(scores) == 10_000
    assert all(math.isnan(s.reward) or s.reward == i for i, s in enumerate(scores))
    assert all(s.error for s in lost) and not any(s.error for s in scores if s not in lost)
    assert kills >= 10 and len(lost) <= kills
    assert not workers_of(psutil.Process())


def test_submitting_waits_for_room(numbers, monkeypatch):
    monkeypatch.setattr(scoring, "WAITING", 4)
    task = get_task(f"{OWN}:Bad")
    prompt = task.prompts("train")[0]
    with Scorer(task, deadline=1.0) as scorer:
        scorer.score([(prompt, "fine")])
        pending = [scorer.submit(prompt, c) for c in ("hang", *["fine"] * 5)]
        assert pending[0].future.done()  # the last one waited for the first to be killed
        results = [one.result() for one in pending]
    assert math.isnan(results[0].reward) and [s.reward for s in results[1:]] == [0.5] * 5


def test_many_threads_may_submit(numbers):
    prompt = numbers.prompts("train")[0]
    found = {}

    def work(k):
        found[k] = [scorer.submit(prompt, str(100 * k + i)) for i in range(100)]

    with Scorer(numbers, workers=2) as scorer:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k, pending in found.items():
            assert [p.result().reward for p in pending] == [100 * k + i for i in range(100)]


def test_close_answers_what_is_open():
    task = get_task(f"{OWN}:Bad")
    prompt = task.prompts("train")[0]
    scorer = Scorer(task, deadline=100.0)
    scorer.score([(prompt, "fine")])
    pending = [scorer.submit(prompt, "hang") for _ in range(5)]
    scorer.close()
    errors = [p.result().error for p in pending]
    assert all(e.startswith("the reward ") for e in errors)
    assert errors[-1] == "the reward " + pool.STOPPED


def test_a_process_stopped_by_a_signal_is_overdue():
    """SIGSTOP: alive, silent, and not reading what is sent to it."""
    task = get_task(f"{OWN}:Bad")
    prompt = task.prompts("train")[0]
    with Scorer(task, deadline=1.0) as scorer:
        pid = int(scorer.score([(prompt, "pid")])[0].reward)
        os.kill(pid, signal.SIGSTOP)
        big = scorer.score([(prompt, "x" * 10_000_000)])[0]
        assert big.error == "the reward took longer than its 1 s"
        assert scorer.score([(prompt, "fine")])[0].reward == 0.5


class Reluctant:
    def __reduce__(self):
        raise ZeroDivisionError("not me")


@pytest.mark.parametrize("value", [lambda: 0, Reluctant()])
def test_an_item_that_cannot_travel_costs_itself(numbers, value):
    odd = user_prompt("odd", "x", value=value)
    with Scorer(numbers) as scorer:
        lost, kept = scorer.score([(odd, "1"), (numbers.prompts("train")[0], "2")])
    assert "cannot be sent to its process" in lost.error and kept.reward == 2


def test_a_reward_that_writes_into_the_pipe_costs_itself():
    task = get_task(f"{OWN}:Writer")
    prompt = task.prompts("train")[0]
    with Scorer(task, deadline=3.0) as scorer:
        lost, kept = scorer.score([(prompt, "write"), (prompt, "fine")])
    assert math.isnan(lost.reward) and lost.error and kept.reward == 1


def test_no_pipe_to_a_process_is_an_error_of_the_run(numbers, monkeypatch):
    def refused(*args):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(multiprocessing, "Pipe", refused)
    with Scorer(numbers) as scorer, pytest.raises(RuntimeError, match="Too many open files"):
        scorer.score([(numbers.prompts("train")[0], "1")])


def test_submit_against_close_loses_nothing(numbers, monkeypatch):
    """Each call is refused or answered."""
    monkeypatch.setattr(scoring, "WAITING", 2)
    prompt = numbers.prompts("train")[0]
    found, scorer = [], Scorer(numbers)

    def work():
        with contextlib.suppress(ValueError):
            while True:
                found.append(scorer.submit(prompt, "1"))

    scorer.score([(prompt, "1")])
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(found) < 200:
        for pending in found[-1:]:
            pending.result()
    scorer.close()
    for thread in threads:
        thread.join()
    assert all(one.future.done() for one in found)
