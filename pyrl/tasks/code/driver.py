"""What a remote sandbox runs in place of the program: it runs the program, a process a call, and
prints a line of JSON for each.

`pyrl.tasks.code.remote` sends this file's text with the request in front of it, as REQUEST. Python
3.8, standard library, nothing of pyrl.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time

HARNESS = """
import json, os, sys
program, function = json.load(open(sys.argv[1])), sys.argv[2]
arguments, dumps, write = json.load(sys.stdin), json.dumps, os.write
names = {"__name__": "solution"}
exec(compile(program, "<program>", "exec"), names)
found = names.get(function)
if found is None:
    found = getattr(names["Solution"](), function)
data = dumps(found(*arguments)).encode()
while data:
    data = data[write(int(sys.argv[3]), data):]
"""
PLAIN = """
import json, sys
program, sys.argv = json.load(open(sys.argv[1])), ["<program>"]
exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
"""


def limit(memory_mb, file_mb, seconds):
    """What the program's process does before it runs."""

    def apply():
        import resource

        for kind, value in (
            (resource.RLIMIT_AS, memory_mb << 20),
            (resource.RLIMIT_FSIZE, file_mb << 20),
            (resource.RLIMIT_CPU, int(seconds) + 1),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (value, value))

    return apply


def run(request, call, folder, left):
    """One call. Output goes to files, whose size is limited; no pipe can fill or block."""
    most = request["output_bytes"]
    paths = [os.path.join(folder, name) for name in ("in", "out", "err", "value")]
    with open(paths[0], "w", encoding="utf-8", errors="replace") as file:
        file.write(call["stdin"])
    streams = [open(path, mode) for path, mode in zip(paths, ("rb", "wb", "wb", "wb"))]  # noqa: B905, SIM115
    command = [sys.executable, "-s", "-c", HARNESS if call["function"] else PLAIN]
    command += [os.path.join(folder, "program"), call["function"], str(streams[3].fileno())]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=streams[0],
        stdout=streams[1],
        stderr=streams[2],
        pass_fds=(streams[3].fileno(),) if call["function"] else (),
        cwd=folder,
        start_new_session=True,
        preexec_fn=limit(request["memory_mb"], request["file_mb"], request["seconds"]),
    )
    status = ""
    try:
        code = process.wait(left)
    except subprocess.TimeoutExpired:
        status, code = "timeout", None
    with contextlib.suppress(OSError):
        os.killpg(process.pid, 9)
    process.wait()
    seconds = time.monotonic() - start
    for stream in streams:
        stream.close()
    texts = []
    for path in paths[1:]:
        with open(path, "rb") as file:
            texts.append(file.read(most + 1).decode("utf-8", "replace"))
        os.remove(path)
    out, err, value = texts
    judged = value if call["function"] else out
    if not status and len(judged) > most:
        status = "output"
    if not status:
        status = "done" if code == 0 and (value or not call["function"]) else "crashed"
    told = {"status": status, "stdout": out[:most], "error": "", "seconds": seconds}
    if status == "crashed":
        last = err.strip().splitlines()[-1:]
        told["error"] = f"{last[0][:300] if last else 'no message'} (exit {code})"
    if call["function"]:
        told["stdout"] = ""
        if status == "done":
            told["result"] = value
    return told


def main(request):
    """Runs the calls of the request in turn."""
    end = time.monotonic() + request["seconds"]
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "program"), "w") as file:
            json.dump(request["program"], file)
        for call in request["calls"]:
            left = end - time.monotonic()
            told = {"status": "timeout", "seconds": 0.0}
            if left > 0:
                told = run(request, call, folder, left)
            print("\n" + request["mark"] + json.dumps(told), flush=True)


if "REQUEST" in globals():
    main(json.loads(globals()["REQUEST"]))
