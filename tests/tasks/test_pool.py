"""The processes behind `Scorer`: nothing that happens to them loses more than a call."""

import math
import os
import random
import signal
import threading
from pathlib import Path

import psutil
import pytest

from pyrl.tasks import Scorer, get_task, pool, scoring

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


def test_ten_thousand_scorings_under_random_kills(numbers):
    """Every one has its reward in its place, or NaN and the reason; each kill costs one at most."""
    prompt = numbers.prompts("train")[0]
    stop, kills, rng = threading.Event(), [0], random.Random(0)

    def kill_some():
        while not stop.wait(rng.random() * 0.3):
            found = workers_of(psutil.Process())
            try:
                child = rng.choice(found or [None])
                if child is not None:
                    child.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV]))
                    kills[0] += 1
            except psutil.Error:  # ended meanwhile
                continue

    with Scorer(numbers, workers=2) as scorer:
        scorer.score([(prompt, "0")])
        killer = threading.Thread(target=kill_some)
        killer.start()
        try:
            scores = [s for k in range(10) for s in scorer.score(
                [(prompt, str(i)) for i in range(1000 * k, 1000 * k + 1000)])]  # fmt: skip
        finally:
            stop.set()
            killer.join()
    lost = [s for s in scores if math.isnan(s.reward)]
    assert len(scores) == 10_000
    assert all(math.isnan(s.reward) or s.reward == i for i, s in enumerate(scores))
    assert all(s.error for s in lost) and not any(s.error for s in scores if s not in lost)
    assert 0 < len(lost) <= kills[0]
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


def test_an_item_that_cannot_travel_costs_itself(numbers):
    from pyrl.tasks import user_prompt

    odd = user_prompt("odd", "x", call=lambda: 0)
    with Scorer(numbers) as scorer:
        lost, kept = scorer.score([(odd, "1"), (numbers.prompts("train")[0], "2")])
    assert "cannot be sent to its process" in lost.error and kept.reward == 2
