"""Processes of one gloo group that run functions of a test file and hand back what they return.

The processes stay for the next call: a call costs a message, not a start. When one raises, dies or
hangs, all are killed, and the next call starts new ones. Run as a script it is one rank.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Listener, wait
from pathlib import Path
from typing import Any


class RankError(RuntimeError):
    """A rank raised, died or did not answer; the message holds its traceback."""


class Ranks:
    """`world` ranks; `run` calls a module-level function of a file on each of them."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # new groups meet there

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """[function(rank, *args) for every rank], in rank order; RankError past `timeout` s."""
        if not self._processes:
            self._start()
        call = (sys.modules[function.__module__].__file__, function.__name__, args)
        deadline = time.monotonic() + timeout
        for link in self._links:
            link.send_bytes(pickle.dumps(call))
        answers: dict[int, Any] = {}
        while len(answers) < self.world:
            waiting = [link for i, link in enumerate(self._links) if i not in answers]
            ready = wait(waiting, max(deadline - time.monotonic(), 0))
            if not ready:
                self._fail(f"no answer of {self.world - len(answers)} ranks in {timeout} s")
            for link in ready:
                rank = self._links.index(link)
                try:
                    ok, value = pickle.loads(link.recv_bytes())
                except EOFError:
                    self._fail(f"rank {rank} died")
                if not ok:
                    self._fail(f"rank {rank} raised\n{value}")
                answers[rank] = value
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        """Ends the processes that this object started."""
        for process in self._processes:
            process.kill()
            process.wait()
        for link in self._links:
            link.close()
        self._processes, self._links = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _fail(self, why: str) -> None:
        self.close()
        raise RankError(why)

    def _start(self, timeout: float = 300) -> None:
        # One thread each: they share the machine. Loopback only, and a file to meet at, not a port.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._folder = tempfile.TemporaryDirectory()
        folder = self._folder.name
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            with Listener(str(Path(folder, "socket")), "AF_UNIX") as listener:
                listener._listener._socket.settimeout(timeout)
                for rank in range(self.world):
                    command = [sys.executable, __file__, str(rank), str(self.world), folder]
                    self._processes.append(subprocess.Popen(command, env=environment))
                links: dict[int, Any] = {}
                while len(links) < self.world:
                    link = listener.accept()
                    links[pickle.loads(link.recv_bytes())] = link
            self._links = [links[rank] for rank in range(self.world)]
            self.run(meet, timeout=timeout)
            on_error.pop_all()


def meet(rank: int) -> None:
    """Nothing: a rank answers once it is in the group."""


def _serve(rank: int, world: int, folder: str) -> None:
    link = Client(str(Path(folder, "socket")), "AF_UNIX")
    link.send_bytes(pickle.dumps(rank))
    import torch
    import torch._dynamo  # seconds on a busy machine: now, not within the first call's time
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    modules: dict[str, Any] = {}
    while True:
        try:
            path, name, args = pickle.loads(link.recv_bytes())
        except EOFError:
            return  # the parent is gone
        try:
            if path not in modules:
                spec = importlib.util.spec_from_file_location(f"rank_{Path(path).stem}", path)
                modules[path] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[path])
            answer = (True, getattr(modules[path], name)(rank, *args))
        except BaseException:  # noqa: BLE001 - whatever it is, the parent shows it
            answer = (False, traceback.format_exc())
        link.send_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
