"""Sandboxes on other machines: e2b, and servers of SandboxFusion.

Each program costs one request. What is sent is `driver.py`, which runs the program's calls there
and prints their outcomes; expected answers stay here, as with every sandbox.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyrl.tasks.code.sandbox import Call, Limits, Outcome, SandboxError

#: Seconds that a remote machine may take beyond the program's own.
MARGIN = 30.0
_LONGEST_REPLY = 256 << 20


class SandboxFusion:
    """A server of SandboxFusion (github.com/bytedance/SandboxFusion): POST `endpoint`/run_code.

    ValueError for an endpoint that is no http address; SandboxError from `run` for a server that
    is not there, takes too long, or answers anything but outcomes.
    """

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"endpoint={endpoint!r}: expected an address such as http://host:8080")
        self.endpoint = endpoint.rstrip("/").removesuffix("/run_code")

    def isolation(self) -> str:
        """Where programs run."""
        return f"SandboxFusion at {self.endpoint}"

    def run(self, program: str, calls: Sequence[Call], limits: Limits) -> list[Outcome]:
        """See `Sandbox.run`."""
        code, mark = _driver(program, calls, limits)
        body = {
            "code": code,
            "language": "python",
            "run_timeout": limits.seconds + MARGIN,
            # The driver's own process included, which needs little.
            "memory_limit_MB": limits.memory_mb + 256,
        }
        request = urllib.request.Request(
            f"{self.endpoint}/run_code",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=limits.seconds + 2 * MARGIN) as response:
                reply = json.loads(response.read(_LONGEST_REPLY))
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            raise SandboxError(f"{self.isolation()}: HTTP {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, timed out
            why = getattr(error, "reason", None) or error
            raise SandboxError(f"{self.isolation()}: {type(why).__name__}: {why}") from error
        except ValueError as error:
            raise SandboxError(f"{self.isolation()}: the reply is not JSON: {error}") from error
        ran = reply.get("run_result") if isinstance(reply, dict) else None
        if not isinstance(ran, dict) or not isinstance(ran.get("stdout"), str):
            said = json.dumps(reply)[:300]
            raise SandboxError(f"{self.isolation()}: the reply has no run_result: {said}")
        return _outcomes(ran["stdout"], mark, len(calls), self.isolation(), ran.get("stderr"))


class E2B:
    """A sandbox of e2b.dev for each program, without internet access.

    Needs the package `e2b-code-interpreter` and, as that does, the variable E2B_API_KEY.
    ModuleNotFoundError from `run` without the package; SandboxError for what its service refuses.
    """

    def __init__(self, template: str | None = None) -> None:
        """template: the image of the sandbox; None = the service's own for Python."""
        self.template = template

    def isolation(self) -> str:
        """Where programs run."""
        return "e2b"

    def run(self, program: str, calls: Sequence[Call], limits: Limits) -> list[Outcome]:
        """See `Sandbox.run`."""
        try:
            package = importlib.import_module("e2b_code_interpreter")
        except ModuleNotFoundError as error:
            if error.name != "e2b_code_interpreter":
                raise
            raise ModuleNotFoundError(
                'sandbox="e2b" needs: pip install e2b-code-interpreter', name=error.name
            ) from None
        code, mark = _driver(program, calls, limits)
        seconds = limits.seconds + MARGIN
        try:
            box = package.Sandbox.create(
                **({"template": self.template} if self.template else {}),
                timeout=int(seconds + MARGIN),  # the sandbox's own life, should we die
                allow_internet_access=False,
            )
            try:
                execution = box.run_code(code, timeout=seconds)
            finally:
                box.kill()
        except _errors(package) as error:
            raise SandboxError(f"e2b: {type(error).__name__}: {error}") from error
        problem = execution.error
        said = None if problem is None else f"{problem.name}: {problem.value}"
        return _outcomes("".join(execution.logs.stdout), mark, len(calls), "e2b", said)


def _errors(package: Any) -> tuple[type[BaseException], ...]:
    """What the package raises for its service: by name, since versions differ in what they have."""
    names = ("SandboxException", "AuthenticationException", "RateLimitException")
    found = [getattr(package, name, None) for name in names]
    with contextlib.suppress(ModuleNotFoundError):
        found.append(importlib.import_module("httpx").HTTPError)
    return (OSError, *(kind for kind in found if isinstance(kind, type)))


def _driver(program: str, calls: Sequence[Call], limits: Limits) -> tuple[str, str]:
    """The text to run, and the mark of the lines that are the driver's own."""
    mark = secrets.token_hex(16)
    request = {
        "mark": mark,
        "program": program,
        "seconds": limits.seconds,
        "memory_mb": limits.memory_mb,
        "file_mb": limits.file_mb,
        "output_bytes": limits.output_bytes,
        "calls": [
            {
                "function": call.function,
                "stdin": json.dumps(call.arguments) if call.function else call.stdin,
            }
            for call in calls
        ],
    }
    text = Path(__file__).with_name("driver.py").read_text(encoding="utf-8")
    return f"REQUEST = {json.dumps(request)!r}\n{text}", mark


def _outcomes(stdout: str, mark: str, count: int, where: str, said: str | None) -> list[Outcome]:
    """The marked lines of the driver's output; SandboxError unless there are `count`."""
    lines = [line[len(mark) :] for line in stdout.split("\n") if line.startswith(mark)]
    if len(lines) != count:
        last = (said or "").strip().splitlines()[-1:] or ["no message"]
        raise SandboxError(f"{where}: {len(lines)} of {count} calls were answered: {last[0][:300]}")
    try:
        return [Outcome(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise SandboxError(f"{where}: an answer of another shape: {error}") from error
