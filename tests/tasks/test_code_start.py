"""`pyrl.tasks.code.start`: the interpreter that sandboxes are forked from."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyrl.tasks.code import Call, Limits, LocalSandbox, SandboxError, sandbox, start

LIMITS = Limits(seconds=30, memory_mb=128)


def printed(program, stdin="", mode="auto"):
    (outcome,) = LocalSandbox(mode).run(program, [Call(stdin)], LIMITS)
    assert outcome.status == "done", outcome
    return outcome.stdout


def launcher():
    """Its process id."""
    printed("")
    return start._shared.launcher.process.pid


def ended(pid):
    for _ in range(500):
        try:
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def children(pid):
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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
    seen = []

    def kill():
        while not seen:
            time.sleep(0.01)
            seen.extend(children(pid))
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SandboxError, match=r"sandbox ended .*: its launcher ended: exit code -9"):
        printed("import time\ntime.sleep(60)")
    thread.join()
    assert seen and all(ended(child) for child in seen)
    assert printed("print(1)") == "1\n"


def test_a_supervisor_that_is_stuck_is_killed_alone(monkeypatch):
    pid = launcher()
    monkeypatch.setattr(sandbox, "_MARGIN", 0.2)
    stuck = []

    def stop():
        while not stuck:
            time.sleep(0.01)
            stuck.extend(children(pid))
        os.kill(stuck[0], signal.SIGSTOP)

    thread = threading.Thread(target=stop)
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        other = Limits(seconds=1.5, memory_mb=128)
        first = pool.submit(LocalSandbox().run, "import time\ntime.sleep(1)", [Call()], other)
        thread.join()
        good = printed("import time\ntime.sleep(3)\nprint(1)")
        try:
            (outcome,) = first.result()
            assert outcome.status == "done"  # it was stopped after it had forked
        except SandboxError as error:
            assert "it did not end within 0.2 s" in str(error) or "exit code -9" in str(error)
    assert ended(stuck[0])
    assert good == "1\n" and launcher() == pid


def test_what_the_caller_blocks_and_ignores_does_not_matter():
    start._shared.close()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        began = time.monotonic()
        assert printed("import signal\nprint(signal.pthread_sigmask(0, []))") == "set()\n"
        assert time.monotonic() - began < sandbox._MARGIN
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        start._shared.close()


def test_without_descriptors_or_processes_it_is_an_error_and_the_next_one_runs():
    pid = launcher()
    before = os.listdir("/proc/self/fd")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    for free in range(6):
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, limit[1]))
        try:
            with pytest.raises(SandboxError, match=r"could not be started: .*Too many open files"):
                printed("")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    if os.geteuid() != 0:  # no limit of processes binds root
        none = resource.prlimit(pid, resource.RLIMIT_NPROC, (1, 1))
        assert none
        with pytest.raises(SandboxError, match="no process for it"):
            printed("")
        start._shared.close()
    assert printed("print(1)") == "1\n"


def test_a_launcher_that_cannot_start_says_why(monkeypatch):
    start._shared.close()
    monkeypatch.setattr(sandbox, "_JAIL", "/nowhere/jail")
    with pytest.raises(SandboxError, match="can't open file '/nowhere/jail'"):
        printed("", mode="rlimits")


def test_a_launcher_that_closes_its_streams_before_its_end_says_why():
    code = "import os, time; os.closerange(0, 2); os.write(2, b'why'); time.sleep(0.2)"
    launcher = start._Launcher([sys.executable, "-c", code])
    try:
        assert launcher.last_words() == "its launcher ended: why"
    finally:
        launcher.close()


def test_a_forked_process_has_its_own():
    theirs = launcher()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if start._shared.launcher is None and launcher() != theirs else 2
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
        "print(start._shared.launcher.process.pid, flush=True)\n"
    )
    code += "time.sleep(60)\n" if end == "SIGKILL" else ""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        if end == "SIGKILL":
            owner.kill()
    assert ended(pid)


def test_a_supervisor_that_does_not_end_is_killed():
    supervisor = start.by_command([sys.executable, "-c", "import time; time.sleep(60)"])
    assert supervisor.end(0.05) == "killed: it did not end within 0.05 s\n"
    quiet = "import os, time; os.close(2); time.sleep(60)"
    supervisor = start.by_command([sys.executable, "-c", quiet])
    assert supervisor.end(0.5) == ""
    assert supervisor.why() == "exit code -9"
    supervisor = start.by_command([sys.executable, "-c", "import sys; sys.exit('why')"])
    assert supervisor.end(30) == "why\n"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError, match="/nowhere/bwrap"):
        start.by_command(["/nowhere/bwrap"])
    assert len(os.listdir("/proc/self/fd")) == before
