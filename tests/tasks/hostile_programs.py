"""Programs that misbehave, each with the reward it must get: a + b of two lines or arguments."""

#: The answer that no program can compute: it has to be found.
SECRET = "SECRET-5d1f0c"

RIGHT = "print(int(input()) + int(input()))\n"

#: Reward 1 says that the program went on after its attempt; the attempt's effect is checked too.
PRINTING = {
    # Processes
    "fork bomb": ("import os\nwhile True: os.fork()", 0),
    "fork bomb that goes on": (
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", 0),
    "threads without end": (
        "import threading, time\n"
        "while True: threading.Thread(target=time.sleep, args=(99,)).start()", 0),
    "subprocess": ("import subprocess\nprint(subprocess.check_output(['echo', '3']).decode())", 0),
    "daemon": (
        "import os, time\n"
        "if os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(99)\n" + RIGHT, 0),
    "sleep": ("import time\ntime.sleep(99)", 0),
    "busy": ("while True: pass", 0),
    "ignores signals": (
        "import signal, time\n"
        "for s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\ntime.sleep(99)", 0),
    "blocks signals": (
        "import signal, time\nsignal.pthread_sigmask(0, range(1, 65))\ntime.sleep(99)", 0),
    "kills others": (
        "import os\nfor p in (os.getppid(), 1, -1, -os.getppid(), 0x7ffffff):\n"
        "  try: os.kill(p, 9)\n  except OSError: pass\n" + RIGHT, 1),
    "kills its group": (
        "import os\ntry: os.killpg(0, 9)\nexcept OSError: pass\n" + RIGHT, 1),
    "traces its parent": (
        "import ctypes, os\nlibc = ctypes.CDLL(None)\n"
        "print(int(input()) + int(input()) - 1 - libc.ptrace(16, os.getppid(), 0, 0))", 1),
    "lowers its parent's limits": (
        "import os, resource\n"
        "try: resource.prlimit(os.getppid(), resource.RLIMIT_AS, (1, 1))\n"
        "except OSError: " + RIGHT, 1),
    "has the kernel signal its parent": (
        "import fcntl, os\ntry: fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())\n"
        "except OSError: " + RIGHT, 1),
    "has a socket signal its parent": (
        "import ctypes, fcntl, os, struct\nlibc = ctypes.CDLL(None)\npair = (ctypes.c_int * 2)()\n"
        "libc.socketpair(1, 1, 0, pair)\n"
        "for request in (0x8901, 0x8902, 0x5452):\n"
        "  try: fcntl.ioctl(pair[0], request, struct.pack('i', os.getppid())); print('did')\n"
        "  except PermissionError: pass\n" + RIGHT, 1),
    "outlives its parent": (
        "import ctypes, time\nprint(ctypes.CDLL(None).prctl(1, 0, 0, 0, 0))\ntime.sleep(99)", 0),
    # Memory and output
    "one large object": ("x = bytearray(10**11)", 0),
    "many objects": ("x = []\nwhile True: x.append(bytearray(1 << 20))", 0),
    "memory in files of memory": (
        "import os\nx = []\nwhile True:\n  x.append(os.memfd_create('x'))\n"
        "  os.write(x[-1], bytes(1 << 20))", 0),
    "raises its limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n" + RIGHT, 0),
    "gigabytes of output": ("import os\nx = b'x' * 65536\nwhile True: os.write(1, x)", 0),
    "much on standard error": (
        "import sys\nfor _ in range(200): sys.stderr.write('x' * 10**5)\n" + RIGHT, 1),
    "binary output": ("import os\nos.write(1, bytes(range(256)))\n" + RIGHT, 0),
    "invalid UTF-8 around it": (
        "import os\na = int(input()) + int(input())\n"
        "os.write(1, b'\\xff' + str(a).encode() + b'\\xfe')", 0),
    "a huge number": ("import sys\nsys.set_int_max_str_digits(0)\nprint(10 ** (10**5))", 0),
    "unicode digits": ("print('３' if input() == '1' else '９')", 0),
    "closes everything": ("import os\nos.closerange(0, 300)", 0),
    "closes everything and sleeps": ("import os, time\nos.closerange(0, 300)\ntime.sleep(99)", 0),
    # Ends
    "exit 0, no answer": ("import sys\nsys.exit(0)", 0),
    "exit 0, answer": (RIGHT + "import sys\nsys.exit(0)", 1),
    "exit 1, answer": (RIGHT + "import sys\nsys.exit(1)", 0),
    "os._exit": ("import os\nos._exit(0)", 0),
    "deep recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", 0),
    "deep recursion in C": (
        "x = ()\nfor _ in range(10**6): x = (x,)\nhash(x)", 0),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", 0),
    "abort": ("import os\nos.abort()", 0),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", 0),
    # The source
    "syntax error": ("def f(:", 0),
    "nothing": ("\n\n", 0),
    "null byte": ("x = '\0'\n" + RIGHT, 0),
    "half of a surrogate pair": ("x = '\ud800'\n" + RIGHT, 0),
    "a megabyte": ("# " + "x" * 10**6 + "\n" + RIGHT, 1),
    "nested too deep": ("x = " + "(" * 10**5 + ")" * 10**5, 0),
    "a large constant": ("x = ((((9 ** 99) ** 99) ** 99) ** 99) ** 99", 0),
    # The network
    "connects": (
        "import socket\ns = socket.create_connection(('127.0.0.1', PORT), timeout=1)\n" + RIGHT, 0),
    "listens": ("import socket\ns = socket.socket()\ns.bind(('0.0.0.0', 0))\n" + RIGHT, 0),
    "asks the network's table": (
        "import socket\ns = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)\n" + RIGHT, 0),
    # Files
    "deletes files": (
        "import os\nfor path in ('CANARY', os.path.dirname('CANARY'), '/usr', '/root', '.'):\n"
        "  for call in (os.remove, os.rmdir, lambda p: os.rename(p, p + 'x'),\n"
        "               lambda p: os.truncate(p, 0), lambda p: os.chmod(p, 0)):\n"
        "    try: call(path)\n    except OSError: pass\n" + RIGHT, 1),
    "leaves links and odd modes": (
        "import os\nfor make in (lambda: os.symlink('CANARY', 'x'), lambda: os.mkdir('y'),\n"
        "             lambda: os.chmod('.', 0), lambda: os.link('CANARY', 'z')):\n"
        "  try: make()\n  except OSError: pass\n" + RIGHT, 1),
    "gigabytes in a file": (
        "x = b'x' * (1 << 20)\nwith open('x', 'wb') as f:\n  while True: f.write(x)", 0),
    "gigabytes in many files": (
        "i = 0\nwhile True:\n  i += 1\n  open(str(i), 'wb').write(bytes(1 << 20))", 0),
    "overwrites the library": ("import os\nopen(os.__file__, 'a').write('x')\n" + RIGHT, 0),
    "mounts": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "done = [libc.unshare(f) for f in (0x10000000, 0x20000, 0x40000000)]\n"
        "done.append(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))\n"
        "done.append(libc.chroot(b'/tmp'))\n"
        "print(int(input()) + int(input()) if done == [-1] * 5 else done)", 1),
}  # fmt: skip

#: Ways to find SECRET, which the expected output is.
SEARCHING = {
    "frames and objects": """
import gc, sys
frame = sys._getframe()
while frame:
    print([v for v in (*frame.f_locals.values(), *frame.f_globals.values()) if MARK in str(v)])
    frame = frame.f_back
for thing in gc.get_objects():
    for found in (thing.values() if type(thing) is dict else thing if type(thing) is list else ()):
        if type(found) in (str, bytes) and MARK in str(found) and found != MARK:
            print(found)
""",
    "files": """
import os
for folder, inner, names in os.walk('/'):
    inner[:] = [name for name in inner if name[:3] not in ('lib', 'sys')]
    for name in names:
        try:
            text = open(os.path.join(folder, name), errors='replace').read(1 << 20)
        except OSError:
            continue
        if MARK in text:
            print(text)
for path in ('CANARY', '/proc/self/fd/0', '/proc/1/environ', '/proc/self/root/' + 'CANARY'):
    try: print(open(path).read())
    except OSError: pass
""",
    "memory of others": """
import os
for pid in (1, os.getppid(), OUTSIDE):
    for name in ('mem', 'environ', 'cmdline', 'maps', 'fd/0', 'fd/3'):
        try: print(open(f'/proc/{pid}/{name}', 'rb').read(1 << 16))
        except OSError: pass
import ctypes
libc = ctypes.CDLL(None)
for pid in (1, os.getppid(), OUTSIDE):
    here = ctypes.create_string_buffer(64)
    pair = (ctypes.c_void_p * 2)(ctypes.addressof(here), 64)
    libc.process_vm_readv(pid, pair, 1, pair, 1, 0)
    if MARK.encode() in here.raw: print(here.raw)
""",
    "descriptors": """
import os
for fd in range(256):
    try: print(os.read(fd, 1 << 20).decode())
    except OSError: pass
""",
    "reference solutions": """
import glob, sys
sys.path += glob.glob(sys.prefix + '/lib/python*/site-packages') + ['REPOSITORY']
import pyrl.tasks.code.families
print('SECRET-5d1f0c')
""",
}

#: Functions `f(a, b)`.
CALLED = {
    "right": ("def f(a, b): return a + b", 1),
    "prints as well": ("def f(a, b):\n  print('x' * 10**6)\n  return a + b", 1),
    "method": ("class Solution:\n  def f(self, a, b): return a + b", 1),
    "exits": ("import sys\ndef f(a, b): sys.exit(0)", 0),
    "exits at once": ("import os\ndef f(a, b): os._exit(0)", 0),
    "exits on import": ("import sys\nsys.exit(0)\ndef f(a, b): return a + b", 0),
    "equal to everything": (
        "class E(int):\n  def __eq__(s, o): return True\n  __hash__ = None\n"
        "def f(a, b): return E(0)", 0),
    "object equal to everything": (
        "class E:\n  def __eq__(s, o): return True\ndef f(a, b): return E()", 0),
    "patches json": (
        "import json\njson.dumps = json.encoder.c_make_encoder = lambda *a, **k: 'true'\n"
        "def f(a, b): return 0", 0),
    "patches builtins": (
        "import builtins, operator\nbuiltins.all = builtins.isinstance = lambda *a: True\n"
        "operator.eq = lambda a, b: True\ndef f(a, b): return 0", 0),
    "writes to every descriptor": (
        "import os\ndef f(a, b):\n  for fd in range(64):\n"
        "    try: os.write(fd, b'{\"passed\": true, \"status\": \"done\"}')\n"
        "    except OSError: pass\n  os._exit(0)", 0),
    "writes results for the others": (
        "import os\n"
        "for _ in range(9): os.write(3, b'\\n{\"status\": \"done\", \"result\": \"3\"}\\n')\n"
        "def f(a, b): return a + b", 0),
    "writes at exit": (
        "import atexit, os\natexit.register(os.write, 1, b'3')\ndef f(a, b): return None", 0),
    "true for one": ("def f(a, b): return True", 0),
    "not a number": ("def f(a, b): return float('nan')", 0),
    "text of it": ("def f(a, b): return str(a + b)", 0),
    "nested too deep": (
        "def f(a, b):\n  import os\n  os.write(3, b'[' * 10**5 + b']' * 10**5)\n  os._exit(0)", 0),
    "a megabyte of it": ("def f(a, b): return 'x' * (1 << 21)", 0),
    "digits without end": (
        "import os\ndef f(a, b):\n  os.write(3, b'9' * 60000)\n  os._exit(0)", 0),
    "no such function": ("def g(a, b): return a + b", 0),
    "syntax error": ("def f(a, b) return a + b", 0),
    "sleeps on import": ("import time\ntime.sleep(99)\ndef f(a, b): return a + b", 0),
}  # fmt: skip
