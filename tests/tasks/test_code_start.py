"""`pyrl.tasks.code.start`: the interpreter that sandboxes are forked from."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyrl.tasks.code import Call, Limits, LocalSandbox, SandboxError, start

LIMITS = Limits(seconds=30, memory_mb=128)


def printed(program, stdin="", mode="auto"):
    (outcome,) = LocalSandbox(mode).run(program, [Call(stdin)], LIMITS)
    assert outcome.status == "done", outcome
    return outcome.stdout


def launcher():
    """Its process id."""
    printed("")
    return start._shared._launcher._process.pid


def ended(pid):
    for _ in range(500):
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("mode", ["auto", "rlimits"])
def test_programs_share_an_interpreter_and_nothing_of_each_other(mode):
    pid = launcher()
    trace = "import json, random\nprint(hasattr(json, 'mine'))\njson.mine = random.random = 1"
    assert [printed(trace, mode=mode) for _ in range(2)] == ["False\n"] * 2
    drawn = "import random\nprint(random.random())"
    assert len({printed(drawn, mode=mode) for _ in range(3)}) == 3
    assert launcher() == pid


def test_threads_share_it():
    with ThreadPoolExecutor(4) as pool:
        texts = [str(i) * 5000 for i in range(24)]
        found = list(pool.map(lambda text: printed("print(input())", text), texts))
    assert found == [text + "\n" for text in texts]


def test_one_that_was_killed_is_replaced():
    first = launcher()
    os.kill(first, signal.SIGKILL)
    assert ended(first)
    assert printed("print(1)") == "1\n" and launcher() != first


def test_killed_under_a_program_it_is_an_error_and_nothing_is_left():
    pid = launcher()
    family = Path(f"/proc/{pid}/task/{pid}/children")
    seen = []

    def kill():
        while not seen:
            time.sleep(0.01)
            seen.extend(int(child) for child in family.read_text().split())
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SandboxError, match="the sandbox ended"):
        printed("import time\ntime.sleep(60)")
    thread.join()
    assert seen and all(ended(child) for child in seen)
    assert printed("print(1)") == "1\n"


def test_a_forked_process_has_its_own():
    theirs = launcher()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if start._shared._launcher is None and launcher() != theirs else 2
            start._shared.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert launcher() == theirs


@pytest.mark.parametrize("end", ["SIGKILL", "exit"])
def test_it_ends_with_its_process(end):
    code = (
        "import time\nfrom pyrl.tasks.code import *\nfrom pyrl.tasks.code import start\n"
        "LocalSandbox().run('', [Call()], Limits())\n"
        "print(start._shared._launcher._process.pid, flush=True)\n"
    )
    code += "time.sleep(60)\n" if end == "SIGKILL" else ""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        if end == "SIGKILL":
            owner.kill()
    assert ended(pid)


def test_a_supervisor_that_does_not_end_is_killed():
    supervisor = start.by_command([sys.executable, "-c", "import time; time.sleep(60)"])
    assert supervisor.end(0.05) == ""
    supervisor = start.by_command([sys.executable, "-c", "import sys; sys.exit('why')"])
    assert supervisor.end(30) == "why\n"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError, match="/nowhere/bwrap"):
        start.by_command(["/nowhere/bwrap"])
    assert len(os.listdir("/proc/self/fd")) == before
