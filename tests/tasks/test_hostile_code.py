"""Hostile programs get their rewards and nothing else; nothing of them is left running."""

import contextlib
import os
import re
import socket
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import pytest

from pyrl.tasks import Prompt, Scorer, get_task
from pyrl.tasks.code import Call, Limits, LocalSandbox, SandboxError
from pyrl.tasks.registry import load_file

table = load_file(str(Path(__file__).with_name("hostile_programs.py")))
REPOSITORY = Path(__file__).resolve().parents[2]
SUMS = [{"input": "1\n2\n", "output": "3"}, {"input": "4\n5\n", "output": "9"}]
#: These only end when their time is out; a short time cannot make them pass.
LASTING = {
    "fork bomb that goes on", "threads without end", "sleep", "busy", "ignores signals",
    "blocks signals", "outlives its parent", "closes everything and sleeps", "stops itself",
    "a large constant", "sleeps on import", "deep recursion",
}  # fmt: skip


def commands() -> dict[int, str]:
    """Process id → command line of everything that runs."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if ") Z " not in path.with_name("stat").read_text():
                found[int(path.parent.name)] = text
        except OSError:  # it has ended meanwhile
            continue
    return found


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:  # it has ended meanwhile
        return 0


def left(owner: int) -> list[int]:
    """What runs of the programs of a process; its launcher, a child of it, may be there."""
    found = [pid for pid, command in commands().items() if f"of-{owner} " in command + " "]
    launchers = [pid for pid in found if parent(pid) == owner]
    assert len(launchers) <= 1
    return [pid for pid in found if pid not in launchers]


def works(mode: str) -> bool:
    try:
        LocalSandbox(mode).isolation()
    except SandboxError:
        return False
    return True


needs_namespaces = pytest.mark.skipif(
    not works("namespaces"), reason="this kernel or container gives no namespaces"
)


@pytest.fixture(params=["auto", "rlimits"])
def mode(request):
    return request.param


def score(mode, program, tests, function="", timeout=20.0, tmp=None):
    task = get_task("code", sandbox=mode, timeout=timeout, memory_mb=128)
    prompt = Prompt("p", "p", {"function": function, "tests": tests})
    mounts = Path("/proc/self/mountinfo").read_text()
    reward = task.score(prompt, f"```python\n{program}\n```")
    assert left(os.getpid()) == []
    assert Path("/proc/self/mountinfo").read_text() == mounts
    return reward


@pytest.fixture(scope="module")
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server
        with pytest.raises(BlockingIOError):  # nobody has come
            server.accept()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is the current one and the one for temporary files, with a canary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    canary = tmp_path / "canary"
    canary.write_text(table.SECRET)
    canary.chmod(0o666)
    tmp_path.chmod(0o777)
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["canary"]
    assert canary.read_text() == table.SECRET and canary.stat().st_mode & 0o777 == 0o666
    assert tmp_path.stat().st_mode & 0o777 == 0o777


@pytest.mark.parametrize("name", table.PRINTING)
def test_programs(mode, name, folder, listener):
    program, reward = table.PRINTING[name]
    program = program.replace("PORT", str(listener.getsockname()[1]))
    program = program.replace("CANARY", str(folder / "canary"))
    timeout = 0.25 if name in LASTING else 20.0
    assert score(mode, program, SUMS, timeout=timeout) == reward


@pytest.mark.parametrize("name", table.CALLED)
def test_functions(name):
    program, reward = table.CALLED[name]
    tests = [{"input": [1, 2], "output": 3}, {"input": [4, 5], "output": 9}]
    timeout = 0.25 if name in LASTING else 20.0
    assert score("auto", program, tests, "f", timeout) == reward


@pytest.mark.parametrize("name", table.SEARCHING)
def test_no_answer_can_be_found(mode, name, folder, monkeypatch):
    monkeypatch.setenv("PYRL_TEST_ANSWER", table.SECRET)  # in this process's memory as well
    program = (
        table.SEARCHING[name].replace("MARK", "'SEC' + 'RET-'").replace("OUTSIDE", str(os.getpid()))
    )
    program = program.replace("CANARY", str(folder / "canary"))
    program = program.replace("REPOSITORY", str(REPOSITORY))
    assert score(mode, program, [{"input": "", "output": table.SECRET}]) == 0
    outcome = LocalSandbox(mode).run(program, [Call()], Limits(seconds=20))[0]
    assert table.SECRET not in outcome.stdout + outcome.error


@needs_namespaces
def test_without_the_filter_the_namespaces_hold(folder, listener):
    """As on a processor whose system calls are not listed."""
    sandbox = LocalSandbox("namespaces", syscall_filter=False)
    limits = Limits(seconds=20, memory_mb=128, processes=8)
    bounded = """
import os, time
made = 0
try:
    for _ in range(40):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
except OSError:
    print(made)
"""
    # Before anything stronger runs: the limit of processes is in force.
    first, second = sandbox.run(bounded, [Call()] * 2, limits)
    assert int(first.stdout) == int(second.stdout) == limits.processes - 1
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    short = Limits(seconds=0.5, memory_mb=128, processes=8)
    assert [o.status for o in sandbox.run(bomb, [Call()], short)] == ["timeout"]
    assert left(os.getpid()) == []
    for name in ("daemon", "kills others", "traces its parent", "deletes files", "connects"):
        program = table.PRINTING[name][0].replace("PORT", str(listener.getsockname()[1]))
        program = program.replace("CANARY", str(folder / "canary"))
        outcome = sandbox.run(program, [Call("1\n2\n")], limits)[0]
        assert outcome.stdout == ("" if name == "connects" else "3\n"), (name, outcome)
        assert left(os.getpid()) == []


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def workers() -> list[int]:
    """Processes of this one that have a program running."""
    owners = {int(n) for c in commands().values() for n in re.findall(r" of-(\d+)(?= |$)", c)}
    mine = []
    for pid in owners:
        if parent(pid) == os.getpid() and len(left(pid)) >= 2:
            mine.append(pid)
    return mine


@pytest.mark.parametrize("end", ["SIGKILL", "deadline", "close"])
def test_a_scoring_process_that_ends_takes_its_programs_along(mode, end):
    task = get_task("code", sandbox=mode, timeout=100.0)
    prompt = Prompt("p", "p", {"function": "", "tests": SUMS})
    scorer = Scorer(task, deadline=2.0 if end == "deadline" else 100.0)
    scores = []
    text = f"```python\n{table.PRINTING['blocks signals'][0]}\n```"

    def run():
        with contextlib.suppress(RuntimeError, CancelledError):  # of a pool that is closed
            scores.extend(scorer.score([(prompt, text)]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    (worker,) = wait_for(workers)
    if end == "SIGKILL":
        os.kill(worker, 9)
    if end == "close":
        scorer.close()  # whoever waits for the score meanwhile is not told
    else:
        thread.join(30)
        assert len(scores) == 1 and "the reward" in scores[0].error
    wait_for(lambda: not left(worker))
    assert left(worker) == []
    scorer.close()
