"""The remote sandboxes, with servers of our own that run what they are sent."""

import ast
import json
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pyrl.tasks import Prompt, get_task
from pyrl.tasks.code import Call, Limits, SandboxError, remote

LIMITS = Limits(seconds=30, memory_mb=512, output_bytes=1000)
#: program → (call, status, output or value): the driver does as the local sandbox does.
PROGRAMS = {
    "print(int(input()) + 1)": (Call("1\n"), "done", "2\n"),
    "def f(x): return x + [1]": (Call(function="f", arguments=[[0]]), "done", "[0, 1]"),
    "class Solution:\n  def f(self, x): return x": (
        Call(function="f", arguments=["ä"]), "done", '"\\u00e4"'),
    "1 / 0": (Call(), "crashed", ""),
    "def f(:": (Call(function="f"), "crashed", None),
    "import sys\ndef f(): sys.exit(0)": (Call(function="f"), "crashed", None),
    "print('x' * 10**5)": (Call(), "output", "x" * 1000),
    "while True: print('x' * 10**5)": (Call(), "output", "x" * 1000),
    "x = bytearray(10**10)": (Call(), "crashed", ""),
    "import os\nos.write(1, b'\\xff')": (Call(), "done", "\ufffd"),
    "print('\\n' + 'a' * 32 + '{}')": (Call(), "done", "\n" + "a" * 32 + "{}\n"),
}  # fmt: skip


def execute(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


class Server(BaseHTTPRequestHandler):
    """Answers as SandboxFusion does; `behaviour` of the server is how it misbehaves."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        status, reply = self.server.behaviour or (200, None)
        if reply is None:
            done = execute(body["code"])
            reply = {
                "status": "Success" if done.returncode == 0 else "Failed",
                "message": "",
                "run_result": {
                    "status": "Finished",
                    "return_code": done.returncode,
                    "stdout": done.stdout,
                    "stderr": done.stderr,
                },
            }
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        if status == 0:
            self.connection.close()
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        found.requests, found.behaviour = [], None
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def fusion(server):
    return remote.SandboxFusion("http://{}:{}/".format(*server.server_address))


@pytest.fixture
def e2b(monkeypatch):
    """A module with the names of e2b_code_interpreter that are used; `made` has its sandboxes."""
    module = types.ModuleType("e2b_code_interpreter")
    module.SandboxException = type("SandboxException", (Exception,), {})
    module.TimeoutException = type("TimeoutException", (module.SandboxException,), {})
    module.made, module.failure = [], {}

    class Box:
        def __init__(self, options):
            self.options, self.killed = options, False

        @classmethod
        def create(cls, **options):
            if "create" in module.failure:
                raise module.failure["create"]
            module.made.append(cls(options))
            return module.made[-1]

        def run_code(self, code, timeout):
            assert timeout > LIMITS.seconds
            if "run" in module.failure:
                raise module.failure["run"]
            done = execute(code)
            half = len(done.stdout) // 2  # it arrives in parts
            logs = types.SimpleNamespace(stdout=[done.stdout[:half], done.stdout[half:]], stderr=[])
            return types.SimpleNamespace(logs=logs, error=module.failure.get("error"))

        def kill(self):
            self.killed = True

    module.Sandbox = Box
    monkeypatch.setitem(sys.modules, "e2b_code_interpreter", module)
    return module


@pytest.mark.slow
def test_outcomes_are_the_same_as_here(fusion, e2b, server):
    for sandbox in (fusion, remote.E2B()):
        some = PROGRAMS if sandbox is fusion else list(PROGRAMS)[:3]
        for program in some:
            call, status, told = PROGRAMS[program]
            (outcome,) = sandbox.run(program, [call], LIMITS)
            given = outcome.result if call.function else outcome.stdout
            assert (outcome.status, given) == (status, told), (program, outcome)
        calls = [Call(str(i)) for i in range(3)]
        assert [o.stdout for o in sandbox.run("print(input())", calls, LIMITS)] == [
            "0\n", "1\n", "2\n",
        ]  # fmt: skip
        short = Limits(seconds=0.3)
        late = sandbox.run("while True: pass", [Call(), Call()], short)
        assert [o.status for o in late] == ["timeout", "timeout"]
    path, body = server.requests[0]
    assert path == "/run_code" and body["language"] == "python"
    assert body["run_timeout"] > LIMITS.seconds
    assert len(server.requests) == len(PROGRAMS) + 2  # one a program, whatever its calls
    assert all(box.killed for box in e2b.made)
    assert e2b.made[0].options["allow_internet_access"] is False


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ((503, b"busy"), "HTTP 503: busy"),
        ((404, b"no such page"), "HTTP 404"),
        ((200, b"<html>"), "the reply is not JSON"),
        ((200, []), "the reply has no run_result"),
        ((200, {"status": "SandboxError", "message": "no disk"}), "no run_result: .*no disk"),
        ((200, {"run_result": {"stdout": "", "stderr": "a\nkilled"}}), "0 of 1 calls .*: killed"),
        ((0, b""), "SandboxFusion at http://127.0.0.1:[0-9]+: "),
    ],
)
def test_what_a_server_may_answer_instead(server, fusion, behaviour, message):
    server.behaviour = behaviour
    with pytest.raises(SandboxError, match=message):
        fusion.run("print(1)", [Call()], LIMITS)


def test_a_server_that_is_slow_or_not_there(monkeypatch):
    with pytest.raises(SandboxError, match="ConnectionRefusedError"):
        remote.SandboxFusion("http://127.0.0.1:9").run("", [Call()], LIMITS)
    import socket

    monkeypatch.setattr(remote, "MARGIN", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        slow = remote.SandboxFusion(f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(SandboxError, match="timed out"):
            slow.run("", [Call()], Limits(seconds=0.1))


def test_answers_of_another_shape_are_errors(monkeypatch, server, fusion):
    monkeypatch.setattr(remote.secrets, "token_hex", lambda n: "mark")
    for line in ("mark{", 'mark{"status": "done", "passed": true}', "mark[]"):
        server.behaviour = (200, {"run_result": {"stdout": line + "\n"}})
        with pytest.raises(SandboxError, match="an answer of another shape"):
            fusion.run("", [Call()], LIMITS)


def test_failures_of_e2b(e2b, monkeypatch):
    run = lambda: remote.E2B("image").run("print(1)", [Call()], LIMITS)  # noqa: E731
    assert run()[0].stdout == "1\n" and e2b.made[0].options["template"] == "image"
    e2b.failure = {"create": e2b.SandboxException("no key")}
    with pytest.raises(SandboxError, match="e2b: SandboxException: no key"):
        run()
    e2b.failure = {"run": e2b.TimeoutException("too long")}
    with pytest.raises(SandboxError, match="e2b: TimeoutException: too long"):
        run()
    assert e2b.made[-1].killed
    monkeypatch.setitem(sys.modules, "e2b_code_interpreter", None)
    with pytest.raises(ModuleNotFoundError, match="pip install e2b-code-interpreter"):
        run()


def test_as_a_task(server, e2b):
    address = "http://{}:{}".format(*server.server_address)
    tests = [{"input": "1\n", "output": "2"}, {"input": "5\n", "output": "6"}]
    prompt = Prompt("p", "p", {"function": "", "tests": tests})
    for options in ({"sandbox": "e2b"}, {"sandbox": "sandboxfusion", "endpoint": address}):
        task = get_task("code", timeout=30.0, **options)
        assert task.score(prompt, "```python\nprint(int(input()) + 1)\n```") == 1
        assert task.score(prompt, "```python\nprint(2)\n```") == 0.5
    for _, body in server.requests:  # what is sent has the inputs, and no expected answer
        sent = json.loads(ast.literal_eval(body["code"].partition("\n")[0].partition(" = ")[2]))
        assert sent["calls"] == [{"function": "", "stdin": t["input"]} for t in tests]
