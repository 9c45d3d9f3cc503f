"""`pyrl.tasks.code.sandbox`: what a program can use, and what it cannot."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pyrl.tasks.code import Call, Limits, LocalSandbox, SandboxError, sandbox, start
from pyrl.tasks.code.jail import cases, seccomp

LIMITS = Limits(seconds=30, memory_mb=256)


def run(program, *calls, mode="auto", limits=LIMITS):
    return LocalSandbox(mode).run(program, calls or [Call()], limits)


def printed(program, mode="auto", stdin=""):
    (outcome,) = run(program, Call(stdin), mode=mode)
    assert outcome.status == "done", outcome
    return outcome.stdout


@pytest.mark.parametrize("mode", ["auto", "rlimits"])
def test_calls_are_separate_and_in_order(mode):
    program = "n = 0\ndef f(x):\n  global n\n  n += 1\n  return [x, n]"
    calls = [Call(function="f", arguments=[i]) for i in range(4)]
    assert [json.loads(o.result) for o in run(program, *calls, mode=mode)] == [
        [i, 1] for i in range(4)
    ]
    text = "ä\u2028\n" + "x" * 200_000
    assert printed("import sys\nprint(sys.stdin.read(), end='')", mode, text) == text
    assert printed("print(open(0).read().upper())", mode, "a") == "A\n"
    assert run("", mode=mode)[0].status == "done" and LocalSandbox(mode).run("", [], LIMITS) == []


def test_a_program_is_like_a_script():
    assert printed("import sys\nif __name__ == '__main__': print(sys.argv)") == "['<program>']\n"
    assert printed("import atexit\natexit.register(print, 2)\nprint(1)") == "1\n2\n"
    wait = "import threading, time\ndef f(): time.sleep(.05); print(1)\nthreading.Thread(target=f)"
    wait += ".start()"
    assert printed(wait) == "1\n"
    pool = "from concurrent.futures import ThreadPoolExecutor as P\nprint(*P(2).map(abs, [-1, 2]))"
    assert printed(pool) == "1 2\n"
    data = "import dataclasses, pickle\n@dataclasses.dataclass\nclass A: x: int\n"
    assert printed(data + "print(pickle.loads(pickle.dumps(A(3))).x)") == "3\n"
    with_modules = "import decimal, heapq, re, sqlite3, zlib\nprint(decimal.Decimal('.1') * 3)"
    assert printed(with_modules, "auto") == "0.3\n"
    assert printed("import " + ", ".join(cases.PRELOADED), "rlimits") == ""
    # The order of a set does not change from run to run, so neither does a reward.
    mixed = "print({str(i) for i in range(50)})"
    assert printed(mixed) == printed(mixed)
    assert os.environ.get("HOME") not in printed("import os\nprint(os.environ)")


def test_how_a_call_ended():
    table = {
        "1 / 0": ("crashed", "ZeroDivisionError: division by zero (exit 1)"),
        "import sys; sys.exit('no')": ("crashed", "exit 1"),
        "import os; os._exit(7)": ("crashed", "exit 7"),
        "import os; os.abort()": ("crashed", "signal 6"),
        "def f(:": ("crashed", "SyntaxError: invalid syntax (exit 1)"),
    }
    for program, (status, error) in table.items():
        (outcome,) = run(program)
        assert outcome.status == status and error in outcome.error, outcome
    first, second = run("import time; time.sleep(99)", Call(), Call(), limits=Limits(seconds=0.2))
    assert (first.status, second.status) == ("timeout", "timeout")
    assert first.seconds > 0 and second.seconds == 0
    small = Limits(seconds=30, output_bytes=10)
    assert [o.status for o in run("print('x' * 9)", limits=small)] == ["done"]
    assert [o.status for o in run("print('x' * 10)", limits=small)] == ["output"]
    call = Call(function="f", arguments=["x" * 8])
    assert run("def f(x): return x", call, limits=small)[0].result == json.dumps("x" * 8)
    call = Call(function="f", arguments=["x" * 9])
    assert run("def f(x): return x", call, limits=small)[0].status == "output"


def test_limits_are_in_force():
    ask = "import resource as r\nprint(*(r.getrlimit(getattr(r, 'RLIMIT_' + n))[1] for n in {}))"
    names = ["AS", "CPU", "FSIZE", "NOFILE", "CORE"]
    limits = Limits(seconds=9.5, memory_mb=100, file_mb=2, open_files=20)
    (outcome,) = run(ask.format(names), limits=limits)
    assert outcome.stdout.split() == [str(100 << 20), "10", str(2 << 20), "20", "0"]
    status = "import os\nprint(os.cpu_count() > 0, os.getuid() == os.geteuid())"
    assert printed(status) == "True True\n"


def test_mistakes():
    with pytest.raises(ValueError, match=r"sandbox='docker': expected one of auto, namespaces"):
        LocalSandbox("docker")
    for name in ("seconds", "processes", "output_bytes"):
        with pytest.raises(ValueError, match=f"{name}=0: expected a number > 0"):
            Limits(**{name: 0})
    with pytest.raises(ValueError, match="memory_mb=63: expected a number >= 64"):
        Limits(memory_mb=63)


def test_an_explicit_mode_never_falls_back(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="bubblewrap: no program `bwrap` on the PATH"):
        run("", mode="bubblewrap")
    with pytest.raises(SandboxError, match=r"rlimits: there is no filter.*turned off"):
        LocalSandbox("rlimits", syscall_filter=False).isolation()


def test_automatic_choice_takes_the_next_and_tells_why_there_is_none(monkeypatch):
    sandbox._best.cache_clear()
    supervisor = sandbox._supervisor
    broken = ["namespaces"]

    def missing(mode):
        if mode in broken:
            raise sandbox._Unavailable(f"{mode}: not here")
        return supervisor(mode)

    monkeypatch.setattr(sandbox, "_supervisor", missing)
    monkeypatch.setenv("PATH", "/nowhere")
    try:
        assert "no namespaces" in LocalSandbox().isolation()
        sandbox._best.cache_clear()
        broken.append("rlimits")
        with pytest.raises(SandboxError, match=r"no sandbox works here: namespaces: not here; bub"):
            LocalSandbox().run("", [Call()], LIMITS)
    finally:
        sandbox._best.cache_clear()


def test_bubblewrap_is_given_a_root_without_the_users_files(tmp_path, monkeypatch):
    """A stand-in that notes its arguments and runs the command."""
    fake = tmp_path / "bwrap"
    fake.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/told\n'
        'while [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert printed("import heapq\nprint(1)", "bubblewrap") == "1\n"
    told = (tmp_path / "told").read_text()
    assert "--unshare-all --die-with-parent --new-session" in told
    binds = told.split(" -- ")[0].split("--ro-bind ")[1:]
    assert binds and not any(bind.startswith(("/ ", "/home", "/etc")) for bind in binds)
    (outcome,) = run("open('x', 'w')", mode="bubblewrap")
    assert "Read-only file system" in outcome.error
    fake.write_text("#!/bin/sh\necho bwrap: No permissions to create a new namespace >&2\nexit 1\n")
    with pytest.raises(SandboxError, match="bubblewrap: the sandbox ended at its start: bwrap: No"):
        run("", mode="bubblewrap")


def test_a_sandbox_that_breaks_is_an_error_and_no_outcome(monkeypatch):
    command = [sys.executable, "-c", "import sys\nprint('{\"ready\": true}')\nsys.exit('broken')"]
    monkeypatch.setattr(sandbox, "_supervisor", lambda mode: start.by_command(command))
    with pytest.raises(SandboxError, match="ended after 0 of 1 calls: broken"):
        run("print(1)", mode="rlimits")
    line = json.dumps({"status": "failed", "error": "PermissionError (exit 1)", "seconds": 0.1})
    command[2] = f"print('{{\"ready\": true}}')\nprint('{line}')"
    with pytest.raises(SandboxError, match="call 0 could not be limited: PermissionError"):
        run("print(1)", mode="rlimits")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the header is of x86_64")
def test_numbers_of_system_calls_are_the_headers():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no header of the kernel here")
    lines = [line.split() for line in header.read_text().splitlines()]
    numbers = {w[1][5:]: int(w[2]) for w in lines if len(w) == 3 and w[1].startswith("__NR_")}
    tables = seccomp.DENIED | seccomp.CHANGES | seccomp.OPENS | seccomp.INSPECTED
    for name, (number, _) in tables.items():
        assert numbers.get(name, number) == number, name
    assert len([name for name in tables if name in numbers]) > 70


def simulate(code, nr, args, architecture):
    """The kernel's machine."""
    words = {0: nr, 4: architecture, **{16 + 8 * i: a & 0xFFFFFFFF for i, a in enumerate(args)}}
    at = accumulator = 0
    while True:
        kind, yes, no, k = code[at]
        at += 1
        if kind == 0x06:
            return k
        if kind == 0x20:
            accumulator = words[k]
        else:
            tests = {0x15: accumulator == k, 0x35: accumulator >= k, 0x45: accumulator & k}
            at += yes if tests[kind] else no


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_filter_denies_what_it_lists(machine, monkeypatch):
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(["", "", "", "", machine]))
    architecture, column = seccomp.ARCHITECTURES[machine]
    allowed, killed, denied = 0x7FFF0000, 0x80000000, 0x00050000
    special = {n: c[column] for n, c in seccomp.INSPECTED.items()}
    for files in ("all", "read", "none"):
        code = seccomp.instructions(77, files)

        def verdict(nr, *args, code=code):
            return simulate(code, nr, (*args, 0, 0, 0, 0), architecture)

        assert simulate(code, 0, (0,), architecture ^ 1) == killed
        for table, applies in (
            (seccomp.DENIED, True),
            (seccomp.CHANGES, files != "all"),
            (seccomp.OPENS, files == "none"),
        ):
            for call in table.values():
                if call[column] is not None:
                    assert (verdict(call[column]) & ~0xFF == denied) == applies or files == "read"
        listed = {
            c[column] for t in (seccomp.DENIED, seccomp.CHANGES, seccomp.OPENS) for c in t.values()
        }
        for nr in set(range(450)) - listed - set(special.values()):
            assert verdict(nr) == allowed
        assert verdict(special["clone"], 0x3D0F00) == allowed  # a thread, as glibc makes it
        assert verdict(special["clone"], 17) != allowed  # a fork
        assert verdict(special["clone"], 0x10000000 | 17) != allowed  # a namespace
        assert verdict(special["kill"], 77) == allowed == verdict(special["tgkill"], 77)
        assert all(verdict(special["kill"], pid) != allowed for pid in (0, 1, -1, -77, 76))
        assert verdict(special["prlimit64"], 0) == allowed != verdict(special["prlimit64"], 1)
        assert verdict(special["fcntl"], 0, 1) == allowed != verdict(special["fcntl"], 0, 8)
        assert (
            verdict(special["ioctl"], 0, 0x5401) == allowed != verdict(special["ioctl"], 0, 0x8901)
        )
        assert (
            verdict(special["ioctl"], 0, 0x8902) != allowed != verdict(special["ioctl"], 0, 0x5452)
        )
        assert verdict(special["prctl"], 15) == allowed != verdict(special["prctl"], 1)
        opening = seccomp.OPENS["openat"][column]
        assert (verdict(opening, 3, 0, os.O_CLOEXEC) == allowed) == (files != "none")
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC):
            assert (verdict(opening, 3, 0, flags) == allowed) == (files == "all")
        if machine == "x86_64":
            assert verdict(0x40000000 + 39) == killed


def test_the_jail_needs_nothing_but_the_standard_library():
    """It must start fast, and with no package on its path."""
    code = (
        f"import runpy, sys; sys.argv = ['x', 'y']; sys.path[:] = [{sandbox._JAIL!r}] + sys.path\n"
    )
    code += "import importlib; sys.path[0] = sys.path[0].rpartition('/')[0]\n"
    code += "importlib.import_module('jail.supervisor'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
